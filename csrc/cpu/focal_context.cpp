// focal_context on the CPU: cuts the work into (image, channel block, strip of rows) tasks.
#include "cpu/tensors.h"

namespace focalnet::cpu {

void run_context_fwd(const Kernels& k, const ContextForward& p) {
  const Geometry& g = p.g;
  const int64_t blocks = (g.C + k.lanes - 1) / k.lanes, tasks = g.B * blocks;
  if (tasks == 0 || g.pixels() == 0) return;
  const int64_t scratch = k.context_fwd_scratch(p), slab = g.M * g.W * k.lanes;
  const int64_t threads = torch::stable::get_num_threads();

  if (tasks >= threads || g.T == 1) {  // a task owns its map and finishes it while it is in cache
    const int64_t plane = (g.T * slab + 15) / 16 * 16;
    parallel(tasks, [&](int64_t i) {
      float* memory = static_cast<float*>(thread_scratch((plane + 16 + scratch) * 4));
      float* sum = memory + plane;
      k.context_fwd_levels(p, i / blocks, i % blocks, 0, g.T, memory, sum, sum + 16);
      k.context_fwd_finish(p, i / blocks, i % blocks, 0, g.T, memory, sum);
    });
    return;
  }

  // few and large maps: strips of rows, which recompute the rows that the levels reach beyond them
  const int64_t strips = std::min(g.T, 2 * threads / tasks + 1);
  const auto row = [&](int64_t strip) { return g.T * strip / strips; };
  Buffer planes(tasks * g.T * slab * 4), sums(tasks * strips * 16 * 4);
  const auto plane = [&](int64_t task, int64_t strip) { return planes.floats() + (task * g.T + row(strip)) * slab; };
  parallel(tasks * strips, [&](int64_t i) {
    const int64_t task = i / strips, strip = i % strips;
    k.context_fwd_levels(p, task / blocks, task % blocks, row(strip), row(strip + 1), plane(task, strip),
                         sums.floats() + i * 16, static_cast<float*>(thread_scratch(scratch * 4)));
  });
  parallel(tasks * strips, [&](int64_t i) {
    const int64_t task = i / strips, strip = i % strips;
    float sum[16] = {};
    for (int64_t s = 0; s < strips; ++s)
      for (int lane = 0; lane < k.lanes; ++lane) sum[lane] += sums.floats()[(task * strips + s) * 16 + lane];
    k.context_fwd_finish(p, task / blocks, task % blocks, row(strip), row(strip + 1), plane(task, strip), sum);
  });
}

Tensor focal_context_fwd(Tensor ctx, Tensor gates, std::vector<Tensor> weights, bool normalize) {
  const Kernels& k = kernels();
  Tensor out = torch::stable::empty_like(ctx);
  PackedLevels packed(k, weights, ctx.size(1));
  ContextForward p{};
  p.g = geometry_of(ctx, 2, 1);
  p.dtype = dtype_of(ctx);
  p.L = int64_t(weights.size());
  p.levels = packed.levels.data();
  p.weights = packed.weights.data();
  p.ctx = map_of(ctx, 2, 1);
  p.gates = map_of(gates, 2, 1);
  p.out = map_of(out, 2, 1);
  p.normalize = normalize;
  run_context_fwd(k, p);
  return out;
}

}  // namespace focalnet::cpu

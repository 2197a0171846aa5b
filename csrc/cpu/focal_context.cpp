// focal_context on the CPU: cuts the work into (image, channel block, strip of rows) tasks.
#include "cpu/tensors.h"

namespace focalnet::cpu {

void run_context_fwd(const Kernels& k, ContextForward p) {
  const Geometry& g = p.g;
  const int64_t blocks = k.channel_blocks(g.C), tasks = g.B * blocks;
  if (tasks == 0 || g.pixels() == 0) return;
  const int64_t scratch = k.context_fwd_scratch(p), slab = g.M * g.W * k.lanes;
  const int64_t threads = torch::stable::get_num_threads();
  p.summed = (g.T + 63) / 64;  // by the shape alone: however strips are cut, the mean keeps its bits
  const int64_t all_sums = p.sums() * k.lanes;

  if (tasks >= threads || g.T == 1) {  // a task owns its map and finishes it while it is in cache
    parallel(tasks, [&](int64_t i) {
      const Buffer plane(g.T * slab * 4), sums(all_sums * 4), memory(scratch);
      k.context_fwd_levels(p, i / blocks, i % blocks, 0, g.T, plane.floats(), sums.floats(), memory.data);
      k.context_fwd_finish(p, i / blocks, i % blocks, 0, g.T, plane.floats(), sums.floats());
    });
    return;
  }

  // few and large maps: strips of rows, which recompute the rows that the levels reach beyond them
  const int64_t strips = std::min(p.sums(), 2 * threads / tasks + 1);
  const auto row = [&](int64_t strip) { return std::min(g.T, p.sums() * strip / strips * p.summed); };
  Buffer planes(tasks * g.T * slab * 4), sums(tasks * all_sums * 4);
  const auto plane = [&](int64_t task, int64_t strip) { return planes.floats() + (task * g.T + row(strip)) * slab; };
  parallel(tasks * strips, [&](int64_t i) {
    const int64_t task = i / strips, strip = i % strips;
    const Buffer memory(scratch);
    k.context_fwd_levels(p, task / blocks, task % blocks, row(strip), row(strip + 1), plane(task, strip),
                         sums.floats() + task * all_sums, memory.data);
  });
  parallel(tasks * strips, [&](int64_t i) {
    const int64_t task = i / strips, strip = i % strips;
    k.context_fwd_finish(p, task / blocks, task % blocks, row(strip), row(strip + 1), plane(task, strip),
                         sums.floats() + task * all_sums);
  });
}

void run_context_bwd(const Kernels& k, const ContextBackward& p) {
  const Geometry& g = p.forward.g;
  const int64_t blocks = k.channel_blocks(g.C);
  if (g.pixels() == 0) return;
  const int64_t scratch = k.context_bwd_scratch(p);
  parallel(g.B * blocks, [&](int64_t i) {
    const Buffer memory(scratch);
    k.context_bwd(p, i / blocks, i % blocks, memory.data);
  });
}

namespace {

ContextForward describe(const Tensor& ctx, const Tensor& gates, const PackedLevels& levels, bool normalize) {
  ContextForward p{};
  p.g = geometry_of(ctx, 2, 1);
  p.dtype = dtype_of(ctx);
  p.L = levels.count();
  p.levels = levels.levels.data();
  p.weights = levels.weights.data();
  p.biases = levels.biases.data();
  p.ctx = map_of(ctx, 2, 1);
  p.gates = map_of(gates, 2, 1);
  p.normalize = normalize;
  return p;
}

}  // namespace

std::tuple<Tensor, Tensor> focal_context_fwd(Tensor ctx, Tensor gates, std::vector<Tensor> weights, bool normalize) {
  const Kernels& k = kernels();
  Tensor out = torch::stable::empty_like(ctx);
  Tensor mean = torch::stable::new_empty(ctx, {ctx.size(0), ctx.size(1)}, ScalarType::Float);
  const PackedLevels levels(k, weights, ctx.size(1));
  ContextForward p = describe(ctx, gates, levels, normalize);
  p.out = map_of(out, 2, 1);
  p.mean = static_cast<float*>(mean.mutable_data_ptr());
  run_context_fwd(k, p);
  return {out, mean};
}

// needed: bit 0 ctx, bit 1 gates, bit 2 + l weights[l]. An empty tensor where not needed.
std::vector<Tensor> focal_context_bwd(Tensor grad_out, Tensor ctx, Tensor gates, std::vector<Tensor> weights,
                                      Tensor mean, bool normalize, int64_t needed) {
  const Kernels& k = kernels();
  const int64_t C = ctx.size(1), L = int64_t(weights.size());
  const PackedLevels levels(k, weights, C), flipped(k, weights, C, true);
  ContextBackward p{};
  p.forward = describe(ctx, gates, levels, normalize);
  const Geometry& g = p.forward.g;
  const int64_t blocks = k.channel_blocks(C);
  p.flipped = flipped.weights.data();
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.grad_out = map_of(grad_out, 2, 1);

  Tensor grad_ctx = needed & 1 ? torch::stable::empty_like(ctx) : torch::stable::new_empty(ctx, {0});
  if (needed & 1) p.grad_ctx = map_of(grad_ctx, 2, 1);
  Tensor gate_sums = torch::stable::empty({needed & 2 ? g.B : 0, blocks, (L + 1) * g.pixels()}, ScalarType::Float);
  const Buffer tap_sums(needed >> 2 ? g.B * blocks * levels.sums * k.lanes * 4 : 0);
  if (needed & 2) p.grad_gates = static_cast<float*>(gate_sums.mutable_data_ptr());
  if (needed >> 2) p.grad_weights = tap_sums.floats();
  run_context_bwd(k, p);

  Tensor grad_gates = torch::stable::new_empty(gates, {0});
  if (needed & 2) {
    Tensor sum = torch::stable::sum(gate_sums, std::array<int64_t, 1>{1}, false);
    grad_gates = torch::stable::empty_like(gates);
    torch::stable::copy_(grad_gates, torch::stable::reshape(sum, gates.sizes()));
  }
  std::vector<Tensor> gradients{grad_ctx, grad_gates};
  std::vector<char> wanted;
  for (size_t l = 0; l < weights.size(); ++l) wanted.push_back(needed >> (2 + l) & 1);
  for (Tensor& t : focal_weight_gradients(k, levels, weights, wanted, tap_sums.floats(), g.B)) gradients.push_back(t);
  return gradients;
}

}  // namespace focalnet::cpu

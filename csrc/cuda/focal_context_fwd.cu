// focal_context, forward, for every shape, kernel and dtype: a channel's levels run over planes of floats in shared
// memory (or in scratch, where a map is too large), on CUDA cores.
#include "cuda/planes_plan.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextForward p;
  PlanesPlan plan;
};

template <class T, bool IN_SHARED>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) context_fwd_kernel(Arguments arguments) {
  const ContextForward& p = arguments.p;
  const PlanesSchedule& schedule = arguments.plan.schedule;
  const Chain& chain = p.chain;
  const Frame f(chain);
  const Group group(chain, arguments.plan.block, f, IN_SHARED ? nullptr : p.scratch, false);
  float* const planes = group.planes;
  float* const total = planes + 2 * f.size;  // of the levels so far, segment by segment

  for (int i = group.thread; i < 2 * f.size; i += group.threads()) planes[i] = 0;

  for (int64_t task = blockIdx.x; task < schedule.tasks(); task += gridDim.x) {
    const int64_t image = task / schedule.channel_blocks;
    const int64_t channel = task % schedule.channel_blocks * arguments.plan.block.channels + group.index;
    const bool valid = channel < chain.g.C;
    __syncthreads();
    if (valid) load_taps<T>(chain, channel, group.taps, false, group.thread, group.threads());
    float sum = load_ctx<T>(chain, f, image, channel, valid, planes, group.thread, group.threads());
    const float* level_taps = group.taps;
    for (int l = 0; l < chain.L; ++l) {
      const float* from = planes + l % 2 * f.size;
      float* to = planes + (1 - l % 2) * f.size;
      const Level& k = chain.levels[l].size;
      __syncthreads();
      sum = 0;
      for (int i = group.thread; i < f.segments && valid; i += group.threads()) {
        const Segment s(f, i);
        float acc[ROWS][4] = {};
        convolve(from, f, level_taps, k, s, acc);
        for (int r = 0; r < ROWS && s.t + r < f.T; ++r) {
          float gate[4];
          load_gate<T>(chain, image, l, s, r, gate);
          for (int c = 0; c < 4; ++c) {
            const float value = c < s.columns ? gelu<T>(acc[r][c]) : 0.0f;
            float& so_far = total[(i * ROWS + r) * 4 + c];
            so_far = gate[c] * value + (l ? so_far : 0.0f);
            sum += value;
            to[f.offset(s.t + r, s.m, s.w + c)] = value;
          }
        }
      }
      level_taps += padded_taps(k);
    }
    const float mean = group_sum(sum, group.sums, group.threads()) / float(chain.g.pixels());
    if (valid && group.thread == 0) p.mean[image * chain.g.C + channel] = mean;
    const float global = gelu<T>(mean);
    for (int i = group.thread; i < f.segments && valid; i += group.threads()) {
      const Segment s(f, i);
      for (int r = 0; r < ROWS && s.t + r < f.T; ++r) {
        float gate[4], out[4];
        load_gate<T>(chain, image, chain.L, s, r, gate);
        for (int c = 0; c < 4; ++c)
          out[c] = ((chain.L ? total[(i * ROWS + r) * 4 + c] : 0.0f) + gate[c] * global) * chain.scale;
        store_quad(element<T>(p.out, image, channel, s.t + r, s.m, s.w), p.out.w, s.columns, out);
      }
    }
  }
}

}  // namespace

PlanesPlan plan_planes_fwd(const Chain& chain) { return plan_planes(chain, false); }

void run_context_fwd(const ContextForward& p, const PlanesPlan& plan, void* stream) {
  with_type(p.chain.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(plan.block.planes_in_shared ? context_fwd_kernel<T, true> : context_fwd_kernel<T, false>,
           plan.schedule.blocks, plan.block.group_threads * plan.block.channels, plan.block.shared_bytes, stream,
           Arguments{p, plan});
  });
}

}  // namespace focalnet::cuda

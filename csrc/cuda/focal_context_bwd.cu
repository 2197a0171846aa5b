// focal_context, backward, for every shape, kernel and dtype: the levels are computed again over planes of floats, then
// followed back, on CUDA cores. ops/focal_context/README.md derives the gradients.
#include "cuda/planes_plan.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextBackward p;
  PlanesPlan plan;
};

// Adds to this thread's partial sums of a gate's gradient: always the same pixels, so no synchronization is needed.
__device__ inline void add_quad(float* to, int columns, bool first, const float (&values)[4]) {
  for (int c = 0; c < columns; ++c) to[c] = values[c] + (first ? 0.0f : to[c]);
}

// One kernel row of a level's weight gradient: the sum over all pixels of `grad` times `plane` moved by the row's taps.
// A warp's work; `to`: that row's taps.
template <int KW>
__device__ void row_gradient(const float* grad, const float* plane, const Frame& f, int dt, int dm, int kw, bool first,
                             float* to) {
  constexpr int TAPS = KW ? KW : 1;
  for (int a0 = 0; a0 < (KW ? 1 : kw); ++a0) {
    float acc[TAPS] = {};
    for (int i = threadIdx.x % 32; i < f.T * f.M * f.across; i += 32) {
      const int w = i % f.across * 4, m = i / f.across % f.M, t = i / f.across / f.M;
      float g[4];
      load_quads(grad + f.offset(t, m, w), g);
      const float* row = plane + f.offset(t + dt, m + dm, w);
      if constexpr (KW > 0) {
        constexpr int REACH = KW / 2, LEFT = (REACH + 3) / 4 * 4;
        float x[2 * LEFT + 4];
        load_quads(row - LEFT, x);
#pragma unroll
        for (int a = 0; a < KW; ++a)
#pragma unroll
          for (int c = 0; c < 4; ++c) acc[a] += g[c] * x[LEFT - REACH + a + c];
      } else {
        for (int c = 0; c < 4; ++c) acc[0] += g[c] * row[a0 - kw / 2 + c];
      }
    }
#pragma unroll
    for (int a = 0; a < TAPS; ++a) {
      const float sum = warp_sum(acc[a]);
      if (threadIdx.x % 32 == 0) to[a0 + a] = sum + (first ? 0.0f : to[a0 + a]);
    }
  }
}

// All levels' weight gradients, kernel rows distributed over the warps of a channel.
__device__ inline void weight_gradients(const Chain& chain, const Frame& f, const float* planes, const float* grads,
                                        bool first, int warp, int warps, float* to) {
  int row = 0;
  for (int l = 0; l < chain.L; ++l) {
    const Level& k = chain.levels[l].size;
    const float *plane = planes + l * f.size, *grad = grads + l * f.size;
    const int km = int(k.km), kw = int(k.kw);
    for (int i = 0; i < int(k.kt) * km; ++i, ++row, to += kw) {
      if (row % warps != warp) continue;
      const int dt = i / km - int(k.rt()), dm = i % km - int(k.rm());
      const auto run = [&](auto width) { row_gradient<width>(grad, plane, f, dt, dm, kw, first, to); };
      if (!with_constant<3, 5, 7, 9>(kw, run)) run(std::integral_constant<int, 0>());
    }
  }
}

// What a group of threads works on: a channel of an image.
template <class T>
struct State {
  const ContextBackward& p;
  const Chain& chain;
  const Frame& f;
  const Group& group;
  float* const planes;  // of what enters level l
  float* const grads;   // of what leaves its convolution; then of the gradient of that
  int64_t image, channel;
  int64_t gate_part;   // partial sum of the gates' gradients that it adds to,
  bool first_of_part;  // or that it starts
  bool valid;          // the channel exists

  __device__ float* gate_gradient(int level, const Segment& s, int r) const {
    return p.gate_sums + ((gate_part * (chain.L + 1) + level) * chain.g.B + image) * chain.g.pixels() +
           (int64_t(s.t + r) * f.M + s.m) * f.W + s.w;
  }
  __device__ void load_grad_out(const Segment& s, int r, float (&to)[4]) const {
    load_quad(element<const T>(p.grad_out, image, channel, s.t + r, s.m, s.w), p.grad_out.w, s.columns, to);
    for (int c = 0; c < 4; ++c) to[c] *= chain.scale;
  }
};

// The forward again: planes[l] enters level l, grads[l] leaves its convolution.
template <class T>
__device__ __forceinline__ void recompute_levels(const State<T>& s) {
  const Chain& chain = s.chain;
  const Frame& f = s.f;
  __syncthreads();
  if (s.valid) {
    load_taps<T>(chain, s.channel, s.group.taps, false, s.group.thread, s.group.threads());
    load_taps<T>(chain, s.channel, s.group.flipped, true, s.group.thread, s.group.threads());
    if (chain.L) load_ctx<T>(chain, f, s.image, s.channel, true, s.planes, s.group.thread, s.group.threads());
  }
  const float* taps = s.group.taps;
  for (int l = 0; l < chain.L; ++l) {
    const Level& k = chain.levels[l].size;
    __syncthreads();
    for (int i = s.group.thread; i < f.segments && s.valid; i += s.group.threads()) {
      const Segment segment(f, i);
      float acc[ROWS][4] = {};
      convolve(s.planes + l * f.size, f, taps, k, segment, acc);
      for (int r = 0; r < ROWS; ++r)
        for (int c = 0; c < 4; ++c)
          if (segment.has(f, r, c)) {
            const int at = f.offset(segment.t + r, segment.m, segment.w + c);
            s.grads[l * f.size + at] = acc[r][c];
            if (l + 1 < chain.L) s.planes[(l + 1) * f.size + at] = gelu<T>(acc[r][c]);
          }
    }
    taps += padded_taps(k);
  }
}

// The gates' gradients, the result again, and what reaches the mean: the gradient that every pixel of the last level
// receives through it.
template <class T>
__device__ __forceinline__ float gates_gradient(const State<T>& s) {
  const ContextBackward& p = s.p;
  const Chain& chain = s.chain;
  const Frame& f = s.f;
  const int L = chain.L;
  const float mean = s.valid ? p.mean[s.image * chain.g.C + s.channel] : 0.0f, global = gelu<T>(mean);
  float to_mean = 0;
  if (p.gate_sums && !s.valid && s.first_of_part) {  // no channel writes this partial sum
    const float nothing[4] = {};
    for (int i = s.group.thread; i < f.segments; i += s.group.threads()) {
      const Segment segment(f, i);
      for (int r = 0; r < ROWS && segment.t + r < f.T; ++r)
        for (int l = 0; l <= L; ++l) add_quad(s.gate_gradient(l, segment, r), segment.columns, true, nothing);
    }
  }
  for (int i = s.group.thread; i < f.segments && s.valid; i += s.group.threads()) {
    const Segment segment(f, i);
    for (int r = 0; r < ROWS && segment.t + r < f.T; ++r) {
      float grad[4], gate[4], products[4], sum[4] = {};
      s.load_grad_out(segment, r, grad);
      for (int l = 0; l <= L; ++l) {
        load_gate<T>(chain, s.image, l, segment, r, gate);
        for (int c = 0; c < 4; ++c) {
          const float value =
              l == L ? global : gelu<T>(s.grads[l * f.size + f.offset(segment.t + r, segment.m, segment.w + c)]);
          products[c] = grad[c] * value;
          sum[c] += gate[c] * value;
          if (l == L) to_mean += gate[c] * grad[c];
        }
        if (p.gate_sums) add_quad(s.gate_gradient(l, segment, r), segment.columns, s.first_of_part, products);
      }
      if (p.ctx_all.data) {
        for (int c = 0; c < 4; ++c) sum[c] *= chain.scale;
        store_quad(element<T>(p.ctx_all, s.image, s.channel, segment.t + r, segment.m, segment.w), p.ctx_all.w,
                   segment.columns, sum);
      }
    }
  }
  return group_sum(to_mean, s.group.sums, s.group.threads()) * gelu_slope<T>(mean) / float(chain.g.pixels());
}

// Back through the levels: grads[l] becomes the gradient of what leaves level l's convolution.
template <class T>
__device__ __forceinline__ void level_gradients(const State<T>& s, float to_mean) {
  const ContextBackward& p = s.p;
  const Chain& chain = s.chain;
  const Frame& f = s.f;
  const int L = chain.L;
  const float* flipped = s.group.flipped;
  for (int l = 0; l < L; ++l) flipped += padded_taps(chain.levels[l].size);
  for (int l = L; l >= 0; --l) {  // the gradient of what leaves level l - 1: of ctx for l = 0
    if (l < L) flipped -= padded_taps(chain.levels[l].size);
    if (l == 0 && !p.grad_ctx.data) break;
    for (int i = s.group.thread; i < f.segments && s.valid; i += s.group.threads()) {
      const Segment segment(f, i);
      float acc[ROWS][4] = {};
      if (l < L) convolve(s.grads + l * f.size, f, flipped, chain.levels[l].size, segment, acc);
      for (int r = 0; r < ROWS && segment.t + r < f.T; ++r) {
        float gate[4], grad[4];
        if (l > 0) {
          s.load_grad_out(segment, r, grad);
          load_gate<T>(chain, s.image, l - 1, segment, r, gate);
        }
        for (int c = 0; c < 4; ++c) {
          float value = acc[r][c] + (l == L ? to_mean : 0.0f);
          if (l > 0) {
            float& z = s.grads[(l - 1) * f.size + f.offset(segment.t + r, segment.m, segment.w + c)];
            value = (value + gate[c] * grad[c]) * gelu_slope<T>(z);
            if (c < segment.columns) z = value;
          } else {
            acc[r][c] = value;
          }
        }
        if (l == 0)
          store_quad(element<T>(p.grad_ctx, s.image, s.channel, segment.t + r, segment.m, segment.w), p.grad_ctx.w,
                     segment.columns, acc[r]);
      }
    }
    __syncthreads();
  }
}

template <class T, bool IN_SHARED>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) context_bwd_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const PlanesSchedule& schedule = arguments.plan.schedule;
  const Chain& chain = p.chain;
  const Frame f(chain);
  const Group group(chain, arguments.plan.block, f, IN_SHARED ? nullptr : p.scratch, true);
  float *const planes = group.planes, *const grads = planes + int64_t(chain.L) * f.size;
  int all_taps = 0;
  for (int l = 0; l < chain.L; ++l) all_taps += int(chain.levels[l].size.taps());

  for (int64_t i = group.thread; i < 2 * int64_t(chain.L) * f.size; i += group.threads()) planes[i] = 0;

  for (int64_t task = blockIdx.x; task < schedule.tasks(); task += gridDim.x) {
    const int64_t channel_task = task % schedule.channel_runs, image_task = task / schedule.channel_runs;
    for (int64_t step = 0; step < schedule.channel_run * schedule.image_run; ++step) {
      const int64_t image = image_task * schedule.image_run + step / schedule.channel_run;
      const int64_t run = step % schedule.channel_run;
      const int64_t channel = (channel_task * schedule.channel_run + run) * arguments.plan.block.channels + group.index;
      if (image >= chain.g.B) break;
      const int64_t gate_part = channel_task * arguments.plan.block.channels + group.index;
      const State<T> s{p, chain, f, group, planes, grads, image, channel, gate_part, run == 0, channel < chain.g.C};
      recompute_levels(s);
      const float to_mean = gates_gradient(s);
      level_gradients(s, to_mean);
      if (p.weight_sums && s.valid)
        weight_gradients(chain, f, planes, grads, step < schedule.channel_run, group.thread / 32, group.threads() / 32,
                         p.weight_sums + (image_task * chain.g.C + channel) * all_taps);
    }
  }
}

}  // namespace

PlanesPlan plan_planes_bwd(const Chain& chain) { return plan_planes(chain, true); }

void run_context_bwd(const ContextBackward& p, const PlanesPlan& plan, void* stream) {
  with_type(p.chain.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(plan.block.planes_in_shared ? context_bwd_kernel<T, true> : context_bwd_kernel<T, false>,
           plan.schedule.blocks, plan.block.group_threads * plan.block.channels, plan.block.shared_bytes, stream,
           Arguments{p, plan});
  });
}

}  // namespace focalnet::cuda

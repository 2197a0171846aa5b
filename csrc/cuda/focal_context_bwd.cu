// focal_context, backward, for every shape, kernel and dtype: the levels are computed again over planes of floats, then
// followed back, on CUDA cores. ops/focal_context/README.md derives the gradients.
#include "cuda/context_plan.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextBackward p;
  ContextPlan plan;
};

// Where this thread adds to a gate's gradient: always the same pixels, so that nobody waits for anybody.
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

// All levels' weight gradients, kernel rows dealt out to the warps of a channel.
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
      switch (kw) {
        case 3:
          row_gradient<3>(grad, plane, f, dt, dm, kw, first, to);
          break;
        case 5:
          row_gradient<5>(grad, plane, f, dt, dm, kw, first, to);
          break;
        case 7:
          row_gradient<7>(grad, plane, f, dt, dm, kw, first, to);
          break;
        case 9:
          row_gradient<9>(grad, plane, f, dt, dm, kw, first, to);
          break;
        default:
          row_gradient<0>(grad, plane, f, dt, dm, kw, first, to);
      }
    }
  }
}

template <class T, bool IN_SHARED>
__global__ void __launch_bounds__(LARGEST_BLOCK, 1) context_bwd_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const ContextPlan& plan = arguments.plan;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const Frame f(chain);
  const int L = chain.L, group = threadIdx.x / plan.group, thread = threadIdx.x % plan.group;
  const Memory memory(chain, plan, f, IN_SHARED ? nullptr : p.scratch, true);
  float* const planes = memory.planes;                // of what enters level l
  float* const grads = planes + int64_t(L) * f.size;  // of what leaves it before GELU; then of the gradient of that
  int all_taps = 0, all_padded = 0;
  for (int l = 0; l < L; ++l) {
    all_taps += int(chain.levels[l].size.taps());
    all_padded += padded_taps(chain.levels[l].size);
  }

  for (int64_t i = thread; i < 2 * int64_t(L) * f.size; i += plan.group) planes[i] = 0;

  for (int64_t task = blockIdx.x; task < plan.tasks(); task += gridDim.x) {
    const int64_t channel_task = task % plan.channel_runs, image_task = task / plan.channel_runs;
    for (int64_t step = 0; step < plan.channel_run * plan.image_run; ++step) {
      const int64_t image = image_task * plan.image_run + step / plan.channel_run;
      const int64_t run = step % plan.channel_run;
      const int64_t channel = (channel_task * plan.channel_run + run) * plan.groups + group;
      if (image >= g.B) break;
      const bool valid = channel < g.C;
      const auto gate_share = [&](int level, const Segment& s, int r) {
        const int64_t slot = channel_task * plan.groups + group;
        return p.gates_parts + ((slot * g.B + image) * (L + 1) + level) * g.pixels() +
               (int64_t(s.t + r) * f.M + s.m) * f.W + s.w;
      };
      const auto grad_out = [&](const Segment& s, int r, float (&to)[4]) {
        load_quad(element<const T>(p.grad_out, image, channel, s.t + r, s.m, s.w), p.grad_out.w, s.columns, to);
        for (int c = 0; c < 4; ++c) to[c] *= chain.scale;
      };

      // the forward again: planes[l] enters level l, grads[l] leaves its convolution
      __syncthreads();
      if (valid) {
        load_taps<T>(chain, channel, memory.taps, false, thread, plan.group);
        load_taps<T>(chain, channel, memory.flipped, true, thread, plan.group);
        if (L) load_ctx<T>(chain, f, image, channel, true, planes, thread, plan.group);
      }
      const float* taps = memory.taps;
      for (int l = 0; l < L; ++l) {
        const Level& k = chain.levels[l].size;
        __syncthreads();
        for (int i = thread; i < f.segments && valid; i += plan.group) {
          const Segment s(f, i);
          float acc[ROWS][4] = {};
          convolve(planes + l * f.size, f, taps, k, s, acc);
          for (int r = 0; r < ROWS; ++r)
            for (int c = 0; c < 4; ++c)
              if (s.has(f, r, c)) {
                const int at = f.offset(s.t + r, s.m, s.w + c);
                grads[l * f.size + at] = acc[r][c];
                if (l + 1 < L) planes[(l + 1) * f.size + at] = gelu<T>(acc[r][c]);
              }
        }
        taps += padded_taps(k);
      }

      // the gates' gradients, and what reaches the mean
      const float mean = valid ? p.mean[image * g.C + channel] : 0.0f, global = gelu<T>(mean);
      float to_mean = 0;
      if (p.gates_parts && !valid && run == 0) {  // there is nobody to write this share
        const float nothing[4] = {};
        for (int i = thread; i < f.segments; i += plan.group) {
          const Segment s(f, i);
          for (int r = 0; r < ROWS && s.t + r < f.T; ++r)
            for (int l = 0; l <= L; ++l) add_quad(gate_share(l, s, r), s.columns, true, nothing);
        }
      }
      for (int i = thread; i < f.segments && valid; i += plan.group) {
        const Segment s(f, i);
        for (int r = 0; r < ROWS && s.t + r < f.T; ++r) {
          float grad[4], gate[4], share[4], sum[4] = {};
          grad_out(s, r, grad);
          for (int l = 0; l <= L; ++l) {
            load_gate<T>(chain, image, l, s, r, gate);
            for (int c = 0; c < 4; ++c) {
              const float value = l == L ? global : gelu<T>(grads[l * f.size + f.offset(s.t + r, s.m, s.w + c)]);
              share[c] = grad[c] * value;
              sum[c] += gate[c] * value;
              if (l == L) to_mean += gate[c] * grad[c];
            }
            if (p.gates_parts) add_quad(gate_share(l, s, r), s.columns, run == 0, share);
          }
          if (p.ctx_all.data) {
            for (int c = 0; c < 4; ++c) sum[c] *= chain.scale;
            store_quad(element<T>(p.ctx_all, image, channel, s.t + r, s.m, s.w), p.ctx_all.w, s.columns, sum);
          }
        }
      }
      to_mean = group_sum(to_mean, memory.sums, plan.group) * gelu_slope<T>(mean) / float(g.pixels());

      // back through the levels: grads[l] becomes the gradient of what leaves level l's convolution
      const float* flipped = memory.flipped + all_padded;
      for (int l = L; l >= 0; --l) {  // the gradient of what leaves level l - 1: of ctx for l = 0
        if (l < L) flipped -= padded_taps(chain.levels[l].size);
        if (l == 0 && !p.grad_ctx.data) break;
        for (int i = thread; i < f.segments && valid; i += plan.group) {
          const Segment s(f, i);
          float acc[ROWS][4] = {};
          if (l < L) convolve(grads + l * f.size, f, flipped, chain.levels[l].size, s, acc);
          for (int r = 0; r < ROWS && s.t + r < f.T; ++r) {
            float gate[4], grad[4];
            if (l > 0) {
              grad_out(s, r, grad);
              load_gate<T>(chain, image, l - 1, s, r, gate);
            }
            for (int c = 0; c < 4; ++c) {
              float value = acc[r][c] + (l == L ? to_mean : 0.0f);
              if (l > 0) {
                float& z = grads[(l - 1) * f.size + f.offset(s.t + r, s.m, s.w + c)];
                value = (value + gate[c] * grad[c]) * gelu_slope<T>(z);
                if (c < s.columns) z = value;
              } else {
                acc[r][c] = value;
              }
            }
            if (l == 0)
              store_quad(element<T>(p.grad_ctx, image, channel, s.t + r, s.m, s.w), p.grad_ctx.w, s.columns, acc[r]);
          }
        }
        __syncthreads();
      }

      if (p.weights_parts && valid)
        weight_gradients(chain, f, planes, grads, step < plan.channel_run, thread / 32, plan.group / 32,
                         p.weights_parts + (image_task * g.C + channel) * all_taps);
    }
  }
}

}  // namespace

ContextPlan plan_context_bwd(const Chain& chain) { return plan_planes(chain, true); }

void run_context_bwd(const ContextBackward& p, const ContextPlan& plan, void* stream) {
  with_type(p.chain.dtype, [&](auto zero) {
    using T = decltype(zero);
    launch(plan.planes_in_shared ? context_bwd_kernel<T, true> : context_bwd_kernel<T, false>, plan.blocks,
           plan.group * plan.groups, plan.shared, stream, Arguments{p, plan});
  });
}

}  // namespace focalnet::cuda

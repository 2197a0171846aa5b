// focal_context, backward, for 16-bit maps and the published kernels: rows stream through tensor cores, down the levels
// and back up again in one pass. See rows.h; ops/focal_context/README.md derives the gradients.
#include <utility>

#include "cuda/rows.h"

namespace focalnet::cuda {

namespace {

constexpr int WINDOW = 16;

struct Arguments {
  ContextBackward p;
  RowsBackwardPlan plan;
};

// The kernel sizes of a chain, known to the compiler: weight gradients stay in registers all the way.
template <int... K>
struct Kernels {
  static constexpr int L = sizeof...(K);
  static constexpr int SIZES[] = {K...};
  static constexpr int ALL = (K + ...), TAPS = ((K * K) + ...);
  static constexpr int before(int l) {  // kernel rows of the levels before l
    int sum = 0;
    for (int i = 0; i < l; ++i) sum += SIZES[i];
    return sum;
  }
  static bool are(const Chain& chain) {
    if (chain.L != L) return false;
    for (int l = 0; l < L; ++l)
      if (chain.levels[l].size.kt != SIZES[l] || chain.levels[l].size.kw != SIZES[l]) return false;
    return true;
  }
};

// f(0), f(1), ... with numbers that the compiler knows
template <class F, int... I>
__device__ void for_all(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}

template <class T, class KERNELS>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_bwd_rows_kernel(Arguments arguments) {
  constexpr int L = KERNELS::L, ALL = KERNELS::ALL;
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const RowsBackwardPlan& all_plan = arguments.plan;
  const RowsPlan& plan = all_plan.rows;
  const Geometry& g = chain.g;
  const int T_ = int(g.T), reach = plan.reach[L], lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const Rows<T> rows(plan, g);
  const auto own = [&](int ring, int n, int t, int i) -> Two<T>& {  // what only this lane reads
    return *reinterpret_cast<Two<T>*>(rows.memory + ring + (ring_slot(t, n) * 64 + i * 32 + lane) * 2);
  };
  const auto inside = [&](int t) { return t >= 0 && t < T_; };
  const auto grad = [&](int t, int i, int j) {  // of the result
    return to_float(own(all_plan.grad_out, all_plan.grad_out_rows, t, i).values[j]) * chain.scale;
  };

  for (int64_t task = blockIdx.x; task < plan.tasks; task += gridDim.x) {
    const int64_t slot = task % all_plan.slots, run = task / all_plan.slots;
    for (int64_t step = 0; step < all_plan.channel_run; ++step) {
      const int64_t own_channel = (slot * all_plan.channel_run + step) * all_plan.channels + warp;
      const bool valid = own_channel < g.C;
      const int64_t channel = valid ? own_channel : g.C - 1;
      const float bias = of_vector<T>(chain.ctx_bias, channel);
      float products[ALL][1][4] = {};  // see Rows::add_products
      __syncwarp();
      for (int l = 0; l < L; ++l) {
        rows.make_bands(chain.levels[l], channel, plan.bands[l], false);
        rows.make_bands(chain.levels[l], channel, all_plan.flipped[l], true);
      }
      const int64_t last = plan.groups < (run + 1) * plan.run ? plan.groups : (run + 1) * plan.run;
      for (int64_t group = run * plan.run; group < last; ++group) {
        Pairs pairs(plan, g, group);
        if (!valid) pairs.columns[0] = pairs.columns[1] = 0;
        const Lines<const T> gates(chain.gates, pairs, 0);

        // what reaches the mean of the last level: the sum of the last gate times the gradient, over each image
        float mean[2], global[2], to_mean[2] = {};
        {
          const float gate_bias = of_vector<T>(chain.gates_bias, L);
          for (int t = 0; t < T_; t += STEP) {
            Two<T> entering[STEP][2], gate[STEP][2];
            fetch(Lines<const T>(p.grad_out, pairs, channel), T_, t, entering);
            fetch(gates, T_, t, gate, L);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i)
#pragma unroll
                for (int j = 0; j < 2; ++j)
                  to_mean[i] += (to_float(gate[r][i].values[j]) + gate_bias) * to_float(entering[r][i].values[j]);
          }
          rows.sum_over_images(pairs, group, to_mean);
          for (int i = 0; i < 2; ++i) {
            mean[i] = pairs.columns[i] > 0 ? p.mean[pairs.image[i] * g.C + channel] : 0.0f;
            global[i] = gelu<T>(mean[i]);
            to_mean[i] *= chain.scale * gelu_slope<T>(mean[i]) / float(g.pixels());
          }
        }

        // The last level's rows begin at `t`. Level l's are that many further down:
        const auto ahead = [&](int l) { return reach - plan.reach[l]; };  // and its gradient's as many further up
        Two<T> next_ctx[STEP][2], next_grad[STEP][2];
        int t = -(reach + 1) / 2 * STEP;
        const auto fetch_both = [&](int t) {
          fetch_ctx(Lines<const T>(chain.ctx, pairs, channel), chain.ctx_bias, bias, T_, t + reach, next_ctx);
          fetch(Lines<const T>(p.grad_out, pairs, channel), T_, t, next_grad);
        };
        constexpr bool EARLY = ALL <= 15;  // a step ahead, while there are registers for it
        if (EARLY) fetch_both(t);
        for (; t < T_ + reach; t += STEP) {
          if (!EARLY) fetch_both(t);
#pragma unroll
          for (int r = 0; r < STEP; ++r) {
            rows.put(plan.rings[0], plan.ring_rows[0], t + reach + r, pairs, next_ctx[r]);
#pragma unroll
            for (int i = 0; i < 2; ++i)
              if (inside(t + r)) own(all_plan.grad_out, all_plan.grad_out_rows, t + r, i) = next_grad[r][i];
          }
          __syncwarp();
          if (EARLY) fetch_both(t + STEP);

          // down: the levels again, and GELU's slopes
          for_all(std::make_integer_sequence<int, L - 1>(), [&](auto level) {
            constexpr int l = level;
            const int first = t + ahead(l + 1);
            if (first + STEP > 0 && first < T_) {
              float acc[STEP][4];
              rows.template convolve_rows<KERNELS::SIZES[l], WINDOW>(acc, plan.rings[l], plan.ring_rows[l],
                                                                     plan.bands[l], first);
#pragma unroll
              for (int r = 0; r < STEP; ++r) {
                Two<T> values[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  const float a = acc[r][2 * i], b = acc[r][2 * i + 1];
                  values[i] =
                      two_of<T>(pairs.columns[i] > 0 ? gelu<T>(a) : 0.0f, pairs.columns[i] > 1 ? gelu<T>(b) : 0.0f);
                  if (inside(first + r))
                    own(all_plan.slopes[l], all_plan.slope_rows[l], first + r, i) =
                        two_of<T>(gelu_slope<T>(a), gelu_slope<T>(b));
                }
                rows.put(plan.rings[l + 1], plan.ring_rows[l + 1], first + r, pairs, values);
              }
            }
            __syncwarp();
          });

          // the last level: its rows, the gates' gradients, the result again
          const bool here = t + STEP > 0 && t < T_;  // the same for the whole block
          float acc[STEP][4] = {};
          if (here)
            rows.template convolve_rows<KERNELS::SIZES[L - 1], WINDOW>(acc, plan.rings[L - 1], plan.ring_rows[L - 1],
                                                                       plan.bands[L - 1], t);
          if (here && (p.gates_parts || p.ctx_all.data)) {
            Two<T>* const shares = reinterpret_cast<Two<T>*>(rows.memory + all_plan.products);
            float total[STEP][4] = {};
            for (int l = 0; l <= L; ++l) {
              const float gate_bias = of_vector<T>(chain.gates_bias, l);
              Two<T> gate[STEP][2];
              if (p.ctx_all.data) fetch(gates, T_, t, gate, l);
#pragma unroll
              for (int r = 0; r < STEP; ++r)
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  float value[2] = {global[i], global[i]};
                  if (l == L - 1) {
                    value[0] = gelu<T>(acc[r][2 * i]), value[1] = gelu<T>(acc[r][2 * i + 1]);
                  } else if (l < L && pairs.at[i] >= 0 && inside(t + r)) {
                    const T* const row = rows.row_of(plan.rings[l + 1], plan.ring_rows[l + 1], t + r);
                    const Two<T> two = *reinterpret_cast<const Two<T>*>(row + pairs.at[i]);
                    value[0] = to_float(two.values[0]), value[1] = to_float(two.values[1]);
                  }
                  shares[((l * STEP + r) * 2 + i) * 32 + lane] =
                      two_of<T>(grad(t + r, i, 0) * value[0], grad(t + r, i, 1) * value[1]);
                  if (p.ctx_all.data)
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                      total[r][2 * i + j] += (to_float(gate[r][i].values[j]) + gate_bias) * value[j];
                }
            }
            if (p.ctx_all.data)
#pragma unroll
              for (int r = 0; r < STEP; ++r)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                  if (inside(t + r) && pairs.columns[i] > 0)
                    Lines<T>(p.ctx_all, pairs, channel)
                        .store(i, t + r, total[r][2 * i] * chain.scale, total[r][2 * i + 1] * chain.scale);
          }

          // up: the gradient of what leaves each level's convolution, and from it that of what enters
          for_all(std::make_integer_sequence<int, L>(), [&](auto level) {
            constexpr int l = L - 1 - level;
            const int first = t - ahead(l + 1);
            if (first + STEP > 0 && first < T_) {
              if constexpr (l < L - 1)
                rows.template convolve_rows<KERNELS::SIZES[l + 1], WINDOW>(
                    acc, all_plan.grads[l + 1], all_plan.grad_rows[l + 1], all_plan.flipped[l + 1], first);
              const float gate_bias = of_vector<T>(chain.gates_bias, l);
              Two<T> gate[STEP][2];
              fetch(gates, T_, first, gate, l);
              uint32_t both[STEP][2];
#pragma unroll
              for (int r = 0; r < STEP; ++r) {
                Two<T> values[2];
#pragma unroll
                for (int i = 0; i < 2; ++i) {
                  float value[2] = {};
                  if (inside(first + r))
#pragma unroll
                    for (int j = 0; j < 2; ++j)
                      if (j < pairs.columns[i]) {
                        const float a = acc[r][2 * i + j];
                        const float out = grad(first + r, i, j);
                        const float slope =
                            l == L - 1
                                ? gelu_slope<T>(a)
                                : to_float(own(all_plan.slopes[l], all_plan.slope_rows[l], first + r, i).values[j]);
                        const float entering = (to_float(gate[r][i].values[j]) + gate_bias) * out;
                        value[j] = (entering + (l == L - 1 ? to_mean[i] : a)) * slope;
                      }
                  values[i] = two_of<T>(value[0], value[1]);
                  both[r][i] = packed(values[i]);
                }
                rows.put(all_plan.grads[l], all_plan.grad_rows[l], first + r, pairs, values);
              }
              if (p.weights_parts)
                rows.template add_products<KERNELS::SIZES[l], KERNELS::before(l)>(products, plan.rings[l],
                                                                                  plan.ring_rows[l], first, both);
            }
            __syncwarp();
          });
          if (p.grad_ctx.data && t - reach + STEP > 0 && t - reach < T_) {
            rows.template convolve_rows<KERNELS::SIZES[0], WINDOW>(acc, all_plan.grads[0], all_plan.grad_rows[0],
                                                                   all_plan.flipped[0], t - reach);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (inside(t - reach + r) && pairs.columns[i] > 0)
                  Lines<T>(p.grad_ctx, pairs, channel).store(i, t - reach + r, acc[r][2 * i], acc[r][2 * i + 1]);
          }

          // the block's share of the gates' gradients: the sum over its channels
          if (p.gates_parts && here) {
            __syncthreads();
            for (int i = threadIdx.x; i < (L + 1) * STEP * 64; i += 32 * all_plan.channels) {
              const int of_lane = i % 32, half = i / 32 % 2, row = t + i / 64 % STEP, level = i / 64 / STEP;
              const int segment = of_lane / 4 + 8 * half, nth = segment / plan.segments;
              const int64_t image = group * plan.images + nth;
              const int column = segment % plan.segments * 8 + of_lane % 4 * 2;
              if (nth >= plan.images || image >= g.B || !inside(row)) continue;
              float sum[2] = {};
              for (int w = 0; w < all_plan.channels; ++w) {
                const Two<T> two =
                    reinterpret_cast<const Two<T>*>(shared_memory<T>() + w * plan.elements + all_plan.products)[i];
                sum[0] += to_float(two.values[0]), sum[1] += to_float(two.values[1]);
              }
              float* const to = p.gates_parts + (((slot * g.B + image) * (L + 1) + level) * g.T + row) * g.W + column;
              for (int j = 0; j < 2; ++j)
                if (column + j < g.W) to[j] = sum[j] + (step ? to[j] : 0.0f);
            }
            __syncthreads();
          }
        }
      }

      // the taps' gradients: diagonals of the products
      if (p.weights_parts) {
        float* to = p.weights_parts + (run * g.C + channel) * KERNELS::TAPS;
        float* const area = reinterpret_cast<float*>(rows.memory + all_plan.products);
        for_all(std::make_integer_sequence<int, L>(), [&](auto level) {
          constexpr int l = level, K = KERNELS::SIZES[l];
#pragma unroll
          for (int dt = 0; dt < K; ++dt) {
            const float tap = Rows<T>::diagonal(products[KERNELS::before(l) + dt], K, area);
            if (lane < K && valid) to[dt * K + lane] = tap;
          }
          to += K * K;
        });
      }
    }
  }
}

// f(Kernels) for the compiled kernels of the chain's sizes; false where there are none
template <class F>
bool with_kernels(const Chain& chain, const F& f) {
  bool found = false;
  const auto attempt = [&](auto kernels) {
    if (found || !decltype(kernels)::are(chain)) return;
    found = true;
    f(kernels);
  };
  attempt(Kernels<3, 5>());
  attempt(Kernels<3, 5, 7>());
  attempt(Kernels<3, 5, 7, 9>());
  attempt(Kernels<5, 7, 9>());
  return found;
}

}  // namespace

RowsBackwardPlan plan_rows_bwd(const Chain& chain) {
  const Geometry& g = chain.g;
  const Device device = current_device();
  RowsBackwardPlan plan{};
  RowsPlan& rows = plan.rows;
  if (!lay_out_rows(chain, rows) || rows.warps > 1 || !with_kernels(chain, [](auto) {})) return plan;
  const auto at_most = [&](int n) { return int(std::min<int64_t>(n, g.T)); };  // a whole map needs no more
  const int L = chain.L;
  const auto ahead = [&](int l) { return rows.reach[L] - rows.reach[l]; };
  for (int l = 0; l < L; ++l) {
    rows.ring_rows[l] = at_most(2 * ahead(l) + STEP);
    rows.rings[l] = take(rows, rows.ring_rows[l] * rows.row);
    plan.grad_rows[l] = at_most(2 * int(chain.levels[l].size.rt()) + STEP);
    plan.grads[l] = take(rows, plan.grad_rows[l] * rows.row);
  }
  rows.zeros = take(rows, rows.row);
  for (int l = 0; l < L; ++l) {
    const int bands = int(chain.levels[l].size.kt) * 32 * 4;
    rows.bands[l] = take(rows, bands);
    plan.flipped[l] = take(rows, bands);
  }
  for (int l = 0; l + 1 < L; ++l) {
    plan.slope_rows[l] = at_most(2 * ahead(l + 1) + STEP);
    plan.slopes[l] = take(rows, plan.slope_rows[l] * 128);
  }
  plan.grad_out_rows = at_most(ahead(1) + STEP);
  plan.grad_out = take(rows, plan.grad_out_rows * 128);
  plan.products = take(rows, (L + 1) * STEP * 128);
  rows.sums = take(rows, 32);

  const int64_t fitting = std::min<int64_t>(MOST_WARPS, device.shared_per_block / (2 * rows.elements));
  if (fitting < std::min<int64_t>(2, g.C)) return plan;
  const int64_t least = (g.C + fitting - 1) / fitting;  // blocks along the channels,
  plan.channels = int((g.C + least - 1) / least);       // as full as each other
  const int64_t blocks = (g.C + plan.channels - 1) / plan.channels;
  const int64_t spare = std::max<int64_t>(1, rows.groups * blocks / (3 * device.processors));
  plan.channel_run = std::min(blocks, spare);
  plan.slots = (blocks + plan.channel_run - 1) / plan.channel_run;
  rows.run = std::max<int64_t>(1, std::min(rows.groups, spare / plan.channel_run));
  rows.runs = (rows.groups + rows.run - 1) / rows.run;
  rows.tasks = plan.slots * rows.runs;
  rows.blocks = std::min<int64_t>(rows.tasks, 1 << 20);
  rows.threads = 32 * plan.channels;
  rows.owners = plan.channels;
  rows.shared = int64_t(rows.elements) * 2 * plan.channels;
  rows.fits = true;
  return plan;
}

void run_rows_bwd(const ContextBackward& p, const RowsBackwardPlan& plan, void* stream) {
  with_kernels(p.chain, [&](auto kernels) {
    using K = decltype(kernels);
    launch(
        p.chain.dtype == DType::bf16 ? context_bwd_rows_kernel<__nv_bfloat16, K> : context_bwd_rows_kernel<__half, K>,
        plan.rows.blocks, int(plan.rows.threads), plan.rows.shared, stream, Arguments{p, plan});
  });
}

}  // namespace focalnet::cuda

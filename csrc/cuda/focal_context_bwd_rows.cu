// focal_context, backward, for 16-bit maps and the published kernels: rows stream through tensor cores, down the levels
// and back up again in one pass. See rows.h; ops/focal_context/README.md derives the gradients.
#include <utility>

#include "cuda/rows.h"
#include "cuda/rows_plan.h"

namespace focalnet::cuda {

namespace {

constexpr int WINDOW = 16;

struct Arguments {
  ContextBackward p;
  RowsBackwardPlan plan;
};

// The kernel sizes of a chain, as compile-time constants: weight gradients stay in registers all the way.
template <int... K>
struct Kernels {
  static constexpr int L = sizeof...(K);
  static constexpr int SIZES[] = {K...};
  static constexpr int ROWS = (K + ...), TAPS = ((K * K) + ...);  // of all levels
  static constexpr int before(int l) {                            // kernel rows of the levels before l
    int sum = 0;
    for (int i = 0; i < l; ++i) sum += SIZES[i];
    return sum;
  }
  // Rows that what enters level l is further down than what leaves the last.
  static constexpr int ahead(int l) {
    int sum = 0;
    for (int i = l; i < L; ++i) sum += SIZES[i] / 2;
    return sum;
  }
  static bool are(const Chain& chain) {
    if (chain.L != L) return false;
    for (int l = 0; l < L; ++l)
      if (chain.levels[l].size.kt != SIZES[l] || chain.levels[l].size.kw != SIZES[l]) return false;
    return true;
  }
};

// f(0), f(1), ... f(N - 1) with compile-time constants
template <class F, int... I>
__device__ __forceinline__ void for_all(std::integer_sequence<int, I...>, const F& f) {
  (f(std::integral_constant<int, I>()), ...);
}
template <int N, class F>
__device__ __forceinline__ void for_all(const F& f) {
  for_all(std::make_integer_sequence<int, N>(), f);
}

// What the taps' gradients are made of, kernel row by kernel row of all levels: see Rows::add_products.
template <class KERNELS>
using TapProducts = float[KERNELS::ROWS][1][4];

// The channel that a warp has now.
struct Channel {
  int64_t index;
  bool valid;  // it exists; where not, the warp only takes part in its block's barriers
  float ctx_bias;
};

// Of the images of both pairs.
struct Means {
  float global[2];   // GELU of the last level's means
  float to_mean[2];  // what every pixel of the last level receives through them
};

// What a warp works on: a channel of a group of images. In a step the last level's rows begin at `t`; what leaves level
// l is ahead(l + 1) further down, the gradients there as many further up. Numbers and references alone: with an array
// in it that loops go through, compilers keep the whole struct, and all it refers to, in local memory.
template <class T, class KERNELS>
struct State {
  const ContextBackward& p;
  const RowsBackwardPlan& plan;
  const Chain& chain;
  const Rows<T>& rows;
  const Channel& channel;
  const int64_t group;
  const Pairs& pairs;  // without columns where the channel is not valid
  const Lines<const T>& gates;
  TapProducts<KERNELS>& tap_products;
  const int lane;

  // Pair i in a row of a ring that only this lane reads.
  __device__ T* own(T* row, int i) const { return row + (i * 32 + lane) * 2; }
  // STEP rows of such a ring from t on, wherever they begin.
  __device__ __forceinline__ void load_own(Ring ring, int t, PairRows& to) const {
    rows.each_row(ring, t, [&](int r, T* row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) to[r][i] = load_word(own(row, i));
    });
  }
  __device__ __forceinline__ void put_own(Ring ring, int first, const PairRows& from) const {
    T* const row = rows.row_of(ring, first);
    for_pairs([&](int r, int i) { store_word(own(row + r * ring.row, i), from[r][i]); });
  }

  // Rows first .. first + STEP - 1 of level l's convolution, and of its transpose, over the gradients of what leaves
  // it.
  template <int l>
  __device__ __forceinline__ void convolve(float (&acc)[STEP][4], int first) const {
    const RowsShared& shared = plan.rows.shared;
    rows.template convolve_rows<KERNELS::SIZES[l], WINDOW>(acc, shared.inputs[l], shared.bands[l], first);
  }
  template <int l>
  __device__ __forceinline__ void convolve_transposed(float (&acc)[STEP][4], int first) const {
    rows.template convolve_rows<KERNELS::SIZES[l], WINDOW>(acc, plan.shared.grads[l], plan.shared.flipped[l], first);
  }
};

// Makes the bands of channel `wanted`.
template <class KERNELS, class T>
__device__ __forceinline__ Channel start_channel(const Arguments& arguments, const Rows<T>& rows, int64_t wanted) {
  const Chain& chain = arguments.p.chain;
  const bool valid = wanted < chain.g.C;
  const int64_t index = valid ? wanted : chain.g.C - 1;
  __syncwarp();
  for (int l = 0; l < KERNELS::L; ++l) {
    rows.make_bands(chain.levels[l], index, arguments.plan.rows.shared.bands[l], false);
    rows.make_bands(chain.levels[l], index, arguments.plan.shared.flipped[l], true);
  }
  return {index, valid, of_vector<T>(chain.ctx_bias, index)};
}

// What reaches the mean of the last level: the sum of the last gate times the gradient, over each image.
template <class T, class KERNELS>
__device__ __forceinline__ Means mean_gradient(const State<T, KERNELS>& s) {
  const Geometry& g = s.chain.g;
  const float gate_bias = of_vector<T>(s.chain.gates_bias, KERNELS::L);
  Means means{};
  const Lines<const T> grad_out(s.p.grad_out, s.pairs, s.channel.index);
  for (int t = 0; t < s.rows.map.end; t += STEP) {
    PairRows grad, gate;
    grad_out.load(grad, t, s.rows.map);
    s.gates.load(gate, t, s.rows.map, KERNELS::L);
    for_pairs([&](int r, int i) {
#pragma unroll
      for (int j = 0; j < 2; ++j) means.to_mean[i] += (unpack<T>(gate[r][i], j) + gate_bias) * unpack<T>(grad[r][i], j);
    });
  }
  for (int i = 0; i < 2; ++i)
    if (s.pairs.columns[i] == 0) means.to_mean[i] = 0;
  s.rows.sum_over_images(s.pairs, s.group, means.to_mean);
  for (int i = 0; i < 2; ++i) {
    const float mean = s.pairs.columns[i] > 0 ? s.p.mean[s.pairs.image[i] * g.C + s.channel.index] : 0.0f;
    means.global[i] = gelu<T>(mean);
    means.to_mean[i] *= s.chain.scale * gelu_slope<T>(mean) / float(g.pixels());
  }
  return means;
}

// Rows that a step begins with, on their way from global memory to the rings.
struct Arriving {
  PairRows ctx, grad_out;
};
template <class T, class KERNELS>
__device__ __forceinline__ void load_rows(const State<T, KERNELS>& s, int t, Arriving& to) {
  const Lines<const T> ctx(s.chain.ctx, s.pairs, s.channel.index), grad_out(s.p.grad_out, s.pairs, s.channel.index);
  load_ctx(ctx, s.chain.ctx_bias, s.channel.ctx_bias, s.rows.map, t + KERNELS::ahead(0), to.ctx);
  grad_out.load(to.grad_out, t, s.rows.map);
}
template <class T, class KERNELS>
__device__ __forceinline__ void put_rows(const State<T, KERNELS>& s, int t, const Arriving& from) {
  s.rows.put(s.plan.rows.shared.inputs[0], t + KERNELS::ahead(0), s.pairs, from.ctx);
  s.put_own(s.plan.shared.grad_out, t, from.grad_out);
}

// Down: a level before the last again, and GELU's slopes.
template <int l, class T, class KERNELS>
__device__ __forceinline__ void recompute_level(const State<T, KERNELS>& s, int t) {
  const int first = t + KERNELS::ahead(l + 1);
  PairRows values = {};
  if (s.rows.map.has_any(first)) {
    float acc[STEP][4];
    s.template convolve<l>(acc, first);
    PairRows slopes;
    for_pairs([&](int r, int i) {
      const Gelu left = gelu_and_slope<T>(acc[r][2 * i]), right = gelu_and_slope<T>(acc[r][2 * i + 1]);
      values[r][i] = pack<T>(left.value, right.value), slopes[r][i] = pack<T>(left.slope, right.slope);
    });
    clear_outside(values, first, s.rows.map);
    s.put_own(s.plan.shared.slopes[l], first, slopes);
  }
  s.rows.put(s.plan.rows.shared.inputs[l + 1], first, s.pairs, values);
  __syncwarp();
}

// What this channel adds to the gates' gradients, and the result again. `z` leaves the last level's convolution.
template <class T, class KERNELS>
__device__ __forceinline__ void accumulate_gates(const State<T, KERNELS>& s, const Means& means, int t,
                                                 const float (&z)[STEP][4]) {
  constexpr int L = KERNELS::L;
  const ContextBackward& p = s.p;
  uint32_t* const products = reinterpret_cast<uint32_t*>(s.rows.memory + s.plan.shared.products);
  PairRows grad;
  s.load_own(s.plan.shared.grad_out, t, grad);
  float total[STEP][4] = {};
  for (int l = 0; l <= L; ++l) {
    const float gate_bias = of_vector<T>(s.chain.gates_bias, l);
    PairRows gate = {};
    if (p.ctx_all.data) s.gates.load(gate, t, s.rows.map, l);
    float value[STEP][4];
    if (l == L - 1) {
      for_pairs([&](int r, int i) {
        value[r][2 * i] = gelu<T>(z[r][2 * i]), value[r][2 * i + 1] = gelu<T>(z[r][2 * i + 1]);
      });
    } else if (l < L) {
      s.rows.each_row(s.plan.rows.shared.inputs[l + 1], t, [&](int r, const T* row) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t level = load_word(row + s.pairs.at[i]);
          value[r][2 * i] = unpack<T>(level, 0), value[r][2 * i + 1] = unpack<T>(level, 1);
        }
      });
    } else {
      for_pairs([&](int r, int i) { value[r][2 * i] = value[r][2 * i + 1] = means.global[i]; });
    }
    for_pairs([&](int r, int i) {
      const float *const both = &value[r][2 * i], scale = s.chain.scale;
      products[((l * STEP + r) * 2 + i) * 32 + s.lane] =
          pack<T>(unpack<T>(grad[r][i], 0) * scale * both[0], unpack<T>(grad[r][i], 1) * scale * both[1]);
#pragma unroll
      for (int j = 0; j < 2; ++j) total[r][2 * i + j] += (unpack<T>(gate[r][i], j) + gate_bias) * both[j];
    });
  }
  if (!p.ctx_all.data) return;
  PairRows all;
  for_pairs(
      [&](int r, int i) { all[r][i] = pack<T>(total[r][2 * i] * s.chain.scale, total[r][2 * i + 1] * s.chain.scale); });
  Lines<T>(p.ctx_all, s.pairs, s.channel.index).store(all, t, s.rows.map);
}

// Up: the gradient of what leaves level l's convolution, and what that adds to its taps' gradients.
template <int l, class T, class KERNELS>
__device__ __forceinline__ void level_gradient(const State<T, KERNELS>& s, const Means& means, int t,
                                               const float (&z)[STEP][4]) {
  constexpr bool LAST = l == KERNELS::L - 1;
  constexpr int START = KERNELS::ahead(l) % 2 * 2;  // 2 * ahead(l) rows are newer
  const int first = t - KERNELS::ahead(l + 1);
  PairRows values = {};
  if (s.rows.map.has_any(first)) {
    float through[STEP][4];  // of what leaves the level, through the levels after it
    if constexpr (!LAST) s.template convolve_transposed<l + 1>(through, first);
    const float gate_bias = of_vector<T>(s.chain.gates_bias, l) * s.chain.scale;
    PairRows gate, grad, slope;
    s.gates.load(gate, first, s.rows.map, l);
    s.load_own(s.plan.shared.grad_out, first, grad);
    if constexpr (!LAST) s.load_own(s.plan.shared.slopes[l], first, slope);
    for_pairs([&](int r, int i) {
      float value[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        const float scaled_gate = unpack<T>(gate[r][i], j) * s.chain.scale + gate_bias;
        const float entering = scaled_gate * unpack<T>(grad[r][i], j);
        if constexpr (LAST)
          value[j] = (entering + means.to_mean[i]) * gelu_slope<T>(z[r][2 * i + j]);
        else
          value[j] = (entering + through[r][2 * i + j]) * unpack<T>(slope[r][i], j);
      }
      values[r][i] = pack<T>(value[0], value[1]);
    });
    clear_outside(values, first, s.rows.map);
    if (s.p.weight_sums)
      s.rows.template add_products<KERNELS::SIZES[l], KERNELS::before(l), START>(
          s.tap_products, s.plan.rows.shared.inputs[l], first, s.pairs, values);
  }
  s.rows.put(s.plan.shared.grads[l], first, s.pairs, values);
  __syncwarp();
}

// The last step up: the gradient of what enters level 0.
template <class T, class KERNELS>
__device__ __forceinline__ void ctx_gradient(const State<T, KERNELS>& s, int t) {
  const int first = t - KERNELS::ahead(0);
  if (!s.p.grad_ctx.data || !s.rows.map.has_any(first)) return;
  float acc[STEP][4];
  s.template convolve_transposed<0>(acc, first);
  PairRows grad;
  for_pairs([&](int r, int i) { grad[r][i] = pack<T>(acc[r][2 * i], acc[r][2 * i + 1]); });
  Lines<T>(s.p.grad_ctx, s.pairs, s.channel.index).store(grad, first, s.rows.map);
}

// Adds the sums over the block's channels, so many, to its partial sums of the gates' gradients. The whole block calls
// this.
template <class T, class KERNELS>
__device__ __forceinline__ void sum_gates(const State<T, KERNELS>& s, int t, int channels, int64_t part,
                                          bool first_of_part) {
  constexpr int L = KERNELS::L;
  const Geometry& g = s.chain.g;
  const RowsPlan& plan = s.plan.rows;
  __syncthreads();
  for (int i = threadIdx.x; i < (L + 1) * STEP * 64; i += 32 * s.plan.channels) {
    const int of_lane = i % 32, half = i / 32 % 2, row = t + i / 64 % STEP, level = i / 64 / STEP;
    const int segment = of_lane / 4 + 8 * half, nth = segment / plan.layout.segments;
    const int64_t image = s.group * plan.layout.images + nth;
    const int column = segment % plan.layout.segments * 8 + of_lane % 4 * 2;
    if (nth >= plan.layout.images || image >= g.B || !s.rows.map.has(row)) continue;
    float sum[2] = {};
    for (int w = 0; w < channels; ++w) {
      const T* const products = shared_memory<T>() + w * plan.shared.elements + s.plan.shared.products;
      const uint32_t two = load_word(products + 2 * i);
      sum[0] += unpack<T>(two, 0), sum[1] += unpack<T>(two, 1);
    }
    float* const to = s.p.gate_sums + (((part * (L + 1) + level) * g.B + image) * g.T + row) * g.W + column;
    for (int j = 0; j < 2; ++j)
      if (column + j < g.W) to[j] = sum[j] + (first_of_part ? 0.0f : to[j]);
  }
  __syncthreads();
}

// The taps' gradients: diagonals of the products.
template <class KERNELS, class T>
__device__ __forceinline__ void store_tap_gradients(const Arguments& arguments, const Rows<T>& rows,
                                                    const Channel& channel, const TapProducts<KERNELS>& tap_products,
                                                    int64_t part) {
  const int lane = threadIdx.x % 32;
  float* to = arguments.p.weight_sums + (part * arguments.p.chain.g.C + channel.index) * KERNELS::TAPS;
  float* const area = reinterpret_cast<float*>(rows.memory + arguments.plan.shared.products);
  for_all<KERNELS::L>([&](auto level) {
    constexpr int l = level, K = KERNELS::SIZES[l];
#pragma unroll
    for (int dt = 0; dt < K; ++dt) {
      const float tap = Rows<T>::diagonal(tap_products[KERNELS::before(l) + dt], K, area);
      if (lane < K && channel.valid) to[dt * K + lane] = tap;
    }
    to += K * K;
  });
}

// Whether rows are fetched from global memory a step before they are needed: where registers allow it. A thread has
// 255; it takes (-Xptxas -v, sm_90, bfloat16), with it, 217 for kernels 3, 5 and 224 for 3, 5, 7; without it 248 for 5,
// 7, 9 and 254 for 3, 5, 7, 9.
template <class KERNELS>
constexpr bool PREFETCH = KERNELS::ROWS <= 15;

template <class T, class KERNELS>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_bwd_rows_kernel(Arguments arguments) {
  constexpr int L = KERNELS::L;
  const ContextBackward& p = arguments.p;
  const RowsBackwardPlan& plan = arguments.plan;
  const RowsSchedule& schedule = plan.rows.schedule;
  const Rows<T> rows(plan.rows, p.chain.g);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, reach = KERNELS::ahead(0);
  for (int64_t task = blockIdx.x; task < schedule.tasks; task += gridDim.x) {
    const int64_t gate_part = task % plan.channel_runs, run = task / plan.channel_runs;
    for (int64_t step = 0; step < plan.channel_run; ++step) {
      const int64_t channel_block = gate_part * plan.channel_run + step;
      const int64_t first_channel = channel_block * plan.channels;
      const int channels = int(std::min<int64_t>(plan.channels, p.chain.g.C - first_channel));
      const Channel channel = start_channel<KERNELS>(arguments, rows, first_channel + warp);
      TapProducts<KERNELS> tap_products = {};
      const int64_t last_group = std::min(plan.rows.layout.image_groups, (run + 1) * schedule.run);
      for (int64_t group = run * schedule.run; group < last_group; ++group) {
        Pairs pairs(plan.rows.layout, p.chain.g, group);
        if (!channel.valid) pairs.leave_out();
        const Lines<const T> gates(p.chain.gates, pairs, 0);
        const State<T, KERNELS> s{p, plan, p.chain, rows, channel, group, pairs, gates, tap_products, lane};
        const Means means = mean_gradient(s);
        Arriving next;
        int t = -(reach + 1) / 2 * STEP;
        if constexpr (PREFETCH<KERNELS>) load_rows(s, t, next);
        for (; t < rows.map.end + reach; t += STEP) {
          if constexpr (!PREFETCH<KERNELS>) load_rows(s, t, next);
          put_rows(s, t, next);
          __syncwarp();
          if constexpr (PREFETCH<KERNELS>) load_rows(s, t + STEP, next);
          for_all<L - 1>([&](auto l) { recompute_level<l>(s, t); });
          const bool last_level = rows.map.has_any(t);  // the same for the whole block
          float z[STEP][4] = {};
          if (last_level) s.template convolve<L - 1>(z, t);
          if (last_level && (p.gate_sums || p.ctx_all.data)) accumulate_gates(s, means, t, z);
          for_all<L>([&](auto i) { level_gradient<L - 1 - i>(s, means, t, z); });
          ctx_gradient(s, t);
          if (last_level && p.gate_sums) sum_gates(s, t, channels, gate_part, step == 0);
        }
      }
      if (p.weight_sums) store_tap_gradients<KERNELS>(arguments, rows, channel, tap_products, run);
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

// The memory of a warp.
void lay_out_warp(const Chain& chain, RowsBackwardPlan& plan) {
  const RowsLayout& layout = plan.rows.layout;
  RowsShared& shared = plan.rows.shared;
  RowsBackwardShared& more = plan.shared;
  const int L = chain.L, PAIRS = 64 * 2;  // elements of a row that only the lane that wrote them reads
  const auto ahead = [&](int l) { return layout.reach[L] - layout.reach[l]; };
  for (int l = 0; l < L; ++l) {
    shared.inputs.set(l, take_ring(shared, 2 * ahead(l) + STEP, layout.row, ahead(l)));
    more.grads.set(l, take_ring(shared, 2 * int(chain.levels[l].size.rt()) + STEP, layout.row, -ahead(l + 1)));
  }
  shared.rings = shared.elements;
  for (int l = 0; l < L; ++l) {
    const int bands = int(chain.levels[l].size.kt) * 32 * 4;
    shared.bands[l] = take(shared, bands);
    more.flipped[l] = take(shared, bands);
  }
  for (int l = 0; l + 1 < L; ++l) more.slopes.set(l, take_ring(shared, 2 * ahead(l + 1) + STEP, PAIRS, ahead(l + 1)));
  more.grad_out = take_ring(shared, ahead(1) + STEP, PAIRS, 0);
  more.products = take(shared, (L + 1) * STEP * PAIRS);
  shared.sums = take(shared, 32);
}

}  // namespace

std::optional<RowsBackwardPlan> plan_rows_bwd(const Chain& chain) {
  const Geometry& g = chain.g;
  const Device device = current_device();
  const std::optional<RowsLayout> layout = lay_out_rows(chain);
  if (!layout || layout->warps > 1 || !with_kernels(chain, [](auto) {})) return std::nullopt;
  RowsBackwardPlan plan{};
  plan.rows.layout = *layout;
  lay_out_warp(chain, plan);

  const int64_t bytes = 2 * int64_t(plan.rows.shared.elements);
  const int64_t fitting = std::min<int64_t>(MOST_WARPS, device.shared_per_block / bytes);
  if (fitting < std::min<int64_t>(2, g.C)) return std::nullopt;
  const int64_t least = (g.C + fitting - 1) / fitting;  // blocks along the channels,
  plan.channels = int((g.C + least - 1) / least);       // as full as each other
  const int64_t blocks = (g.C + plan.channels - 1) / plan.channels, groups = layout->image_groups;
  const int64_t spare = std::max<int64_t>(1, groups * blocks / (3 * device.processors));
  plan.channel_run = std::min(blocks, spare);
  plan.channel_runs = (blocks + plan.channel_run - 1) / plan.channel_run;
  RowsSchedule& schedule = plan.rows.schedule;
  schedule.run = std::max<int64_t>(1, std::min(groups, spare / plan.channel_run));
  schedule.runs = (groups + schedule.run - 1) / schedule.run;
  schedule.tasks = plan.channel_runs * schedule.runs;
  schedule.blocks = std::min<int64_t>(schedule.tasks, 1 << 20);
  schedule.threads = 32 * plan.channels;
  schedule.owners = plan.channels;
  schedule.shared_bytes = bytes * plan.channels;
  return plan;
}

void run_context_bwd(const ContextBackward& p, const RowsBackwardPlan& plan, void* stream) {
  const RowsSchedule& schedule = plan.rows.schedule;
  with_kernels(p.chain, [&](auto kernels) {
    using K = decltype(kernels);
    launch(
        p.chain.dtype == DType::bf16 ? context_bwd_rows_kernel<__nv_bfloat16, K> : context_bwd_rows_kernel<__half, K>,
        schedule.blocks, int(schedule.threads), schedule.shared_bytes, stream, Arguments{p, plan});
  });
}

}  // namespace focalnet::cuda

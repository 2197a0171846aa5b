// focal_context, forward, for 16-bit maps and kernels up to 13: rows stream through tensor cores. See rows.h.
#include "cuda/rows.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextForward p;
  RowsPlan plan;
  float* shares;  // [strips][B][C]: sums of the last level, where there are several strips
};

// gate * value of this lane's pair i of row t, added to two sums
template <class T>
__device__ void add_gated(const Lines<const T>& gates, const Vector& biases, int i, int level, int t, float a, float b,
                          float (&sums)[2]) {
  const float bias = of_vector<T>(biases, level);
  const Two<T> gate = gates.load(i, t, true, level);
  sums[0] += (to_float(gate.values[0]) + bias) * a;
  sums[1] += (to_float(gate.values[1]) + bias) * b;
}

template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_fwd_rows_kernel(Arguments arguments) {
  const ContextForward& p = arguments.p;
  const Chain& chain = p.chain;
  const RowsPlan& plan = arguments.plan;
  const Geometry& g = chain.g;
  const int L = chain.L, all = plan.reach[L], lane = threadIdx.x % 32;
  const int owner = plan.warps > 1 ? 0 : threadIdx.x / 32, owners = plan.warps > 1 ? 1 : BLOCK_WARPS;
  const int mine = plan.warps > 1 ? threadIdx.x : lane, crew = plan.warps > 1 ? 32 * plan.warps : 32;
  const Rows<T> rows(plan, g, shared_memory<T>() + owner * plan.elements);
  float* const sums = reinterpret_cast<float*>(rows.memory + plan.sums);  // of each segment of a row

  for (int i = mine; i < plan.bands[0]; i += crew) rows.memory[i] = from_float<T>(0.0f);
  rows.sync();
  for (int64_t task = blockIdx.x * owners + owner; task < plan.tasks; task += int64_t(gridDim.x) * owners) {
    const int64_t channel = task % g.C, strip = task / g.C % plan.strips, run = task / g.C / plan.strips;
    const int begin = int(strip * plan.strip_rows), end = int(std::min<int64_t>(g.T, begin + plan.strip_rows));
    const float bias = of_vector<T>(chain.ctx_bias, channel);
    for (int l = 0; l < L && mine < 32; ++l) rows.make_bands(chain.levels[l], channel, plan.bands[l], false);
    const int64_t last = std::min(plan.groups, (run + 1) * plan.run);
    for (int64_t group = run * plan.run; group < last; ++group) {
      const Pairs pairs(plan, g, group);
      const Lines<const T> ctx(chain.ctx, pairs, channel), gates(chain.gates, pairs, 0);
      float sum[2] = {};
      Two<T> next[STEP][2];
      // the last level's rows begin at `t`, level l's all - reach[l] further down, what enters the first at t + all
      int t = begin - (all + 1) / 2 * STEP;
      fetch_ctx(ctx, chain.ctx_bias, bias, int(g.T), t + all, next);
      for (; t < end; t += STEP) {
#pragma unroll
        for (int r = 0; r < STEP; ++r) rows.put(plan.rings[0], plan.ring_rows[0], t + all + r, pairs, next[r]);
        rows.sync();
        if (t + STEP < end) fetch_ctx(ctx, chain.ctx_bias, bias, int(g.T), t + STEP + all, next);
        for (int l = 0; l < L; ++l) {
          const int first = t + all - plan.reach[l + 1], kt = int(chain.levels[l].size.kt);
          if (first + STEP > 0 && first < g.T && (l + 1 < L || first + STEP > begin)) {
            float acc[STEP][4];
            rows.template convolve<WINDOW>(acc, kt, plan.rings[l], plan.ring_rows[l], plan.bands[l], first);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int j = 0; j < 4; ++j) acc[r][j] = j % 2 < pairs.columns[j / 2] ? gelu<T>(acc[r][j]) : 0.0f;
            if (l + 1 < L) {
#pragma unroll
              for (int r = 0; r < STEP; ++r)
                rows.put(plan.rings[l + 1], plan.ring_rows[l + 1], first + r, pairs,
                         {two_of<T>(acc[r][0], acc[r][1]), two_of<T>(acc[r][2], acc[r][3])});
            } else {  // gates: of this level, and of those before, which lie in their rings
              const Lines<T> out(p.out, pairs, channel);
#pragma unroll
              for (int r = 0; r < STEP; ++r)
#pragma unroll
                for (int i = 0; i < 2; ++i)
                  if (first + r >= begin && first + r < end && pairs.columns[i] > 0) {
                    sum[i] += acc[r][2 * i] + acc[r][2 * i + 1];
                    float total[2] = {};
                    add_gated<T>(gates, chain.gates_bias, i, l, first + r, acc[r][2 * i], acc[r][2 * i + 1], total);
                    for (int j = 0; j + 1 < L; ++j) {
                      const T* const row = rows.row_of(plan.rings[j + 1], plan.ring_rows[j + 1], first + r);
                      const Two<T> two = *reinterpret_cast<const Two<T>*>(row + pairs.at[i]);
                      add_gated<T>(gates, chain.gates_bias, i, j, first + r, to_float(two.values[0]),
                                   to_float(two.values[1]), total);
                    }
                    out.store(i, first + r, total[0], total[1]);
                  }
            }
          }
          rows.sync();
        }
      }

      // the mean of each image, over its segments
      for (int i = 0; i < 2; ++i) {
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
        sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
        if (lane % 4 == 0) sums[mine / 32 * 16 + lane / 4 + 8 * i] = sum[i];
      }
      rows.sync();
      const Lines<T> out(p.out, pairs, channel);
      for (int i = 0; i < 2; ++i) {
        const bool inside = pairs.columns[i] > 0;
        const int of_image = inside ? int(pairs.image[i] - group * plan.images) * plan.segments : 0;
        float mean = 0;
        for (int j = 0; j < plan.segments; ++j) mean += sums[of_image + j];
        if (inside && pairs.column[i] == 0) {
          const int64_t at = pairs.image[i] * g.C + channel;
          if (plan.strips > 1)
            arguments.shares[strip * g.B * g.C + at] = mean;
          else
            p.mean[at] = mean / float(g.pixels());
        }
        const float global = gelu<T>(mean / float(g.pixels()));
        for (int row = begin; row < end && inside && plan.strips == 1; ++row) {  // what this lane wrote itself
          const Two<T> two = out.load(i, row, true);
          float total[2] = {to_float(two.values[0]), to_float(two.values[1])};
          add_gated<T>(gates, chain.gates_bias, i, L, row, global, global, total);
          out.store(i, row, total[0] * chain.scale, total[1] * chain.scale);
        }
      }
      rows.sync();  // `sums` and the rings are free again
    }
  }
}

// The global context, where strips had to wait for each other's sums: a plane per block.
template <class T>
__global__ void __launch_bounds__(256) context_finish_kernel(Arguments arguments) {
  const ContextForward& p = arguments.p;
  const Geometry& g = p.chain.g;
  const float gate_bias = of_vector<T>(p.chain.gates_bias, p.chain.L);
  for (int64_t plane = blockIdx.x; plane < g.B * g.C; plane += gridDim.x) {
    float mean = 0;
    for (int64_t strip = 0; strip < arguments.plan.strips; ++strip) mean += arguments.shares[strip * g.B * g.C + plane];
    mean /= float(g.pixels());
    if (threadIdx.x == 0) p.mean[plane] = mean;
    const float global = gelu<T>(mean);
    const int64_t quads = (g.W + 3) / 4;
    for (int64_t i = threadIdx.x; i < g.T * quads; i += 256) {
      const int64_t w = i % quads * 4, t = i / quads;
      const int n = int(std::min<int64_t>(4, g.W - w));
      float total[4], gate[4];
      T* const to = element<T>(p.out, plane / g.C, plane % g.C, t, 0, w);
      load_quad<T>(to, p.out.w, n, total);
      load_quad(element<const T>(p.chain.gates, plane / g.C, p.chain.L, t, 0, w), p.chain.gates.w, n, gate);
      for (int j = 0; j < 4; ++j) total[j] = (total[j] + (gate[j] + gate_bias) * global) * p.chain.scale;
      store_quad(to, p.out.w, n, total);
    }
  }
}

}  // namespace

RowsPlan plan_rows_fwd(const Chain& chain) {
  const Geometry& g = chain.g;
  const Device device = current_device();
  RowsPlan plan{};
  if (!lay_out_rows(chain, plan)) return plan;
  for (int l = 0; l < chain.L; ++l) {
    const int to_the_end = plan.reach[chain.L] - plan.reach[l];
    const int to_the_next = 2 * int(chain.levels[l].size.rt());
    const int needed = STEP + std::max(l > 0 ? to_the_end : 0, to_the_next);
    plan.ring_rows[l] = int(std::min<int64_t>(needed, g.T));  // a ring of the whole map needs no more
    plan.rings[l] = take(plan, plan.ring_rows[l] * plan.row);
  }
  plan.zeros = take(plan, plan.row);
  for (int l = 0; l < chain.L; ++l)
    plan.bands[l] = take(plan, int(chain.levels[l].size.kt) * (plan.window / 16) * 32 * 4);
  plan.sums = take(plan, 2 * 16 * plan.warps);
  plan.shared = int64_t(plan.elements) * 2 * (plan.warps > 1 ? 1 : BLOCK_WARPS);
  if (plan.shared > device.shared_per_block) return plan;

  const int64_t enough = 16 * device.processors;  // warps that a device wants
  const int64_t planes = std::max<int64_t>(1, plan.groups * g.C * plan.warps), halo = plan.reach[chain.L];
  // a strip recomputes `halo` rows on both sides: none shorter than that
  plan.strips =
      planes < enough / 2 ? std::max<int64_t>(1, std::min(enough / planes, g.T / std::max<int64_t>(8, 4 * halo))) : 1;
  plan.strip_rows = ((g.T + plan.strips - 1) / plan.strips + STEP - 1) / STEP * STEP;
  plan.strips = (g.T + plan.strip_rows - 1) / plan.strip_rows;
  plan.run = std::max<int64_t>(1, std::min<int64_t>(plan.groups, planes / (4 * enough)));
  plan.runs = (plan.groups + plan.run - 1) / plan.run;
  plan.tasks = g.C * plan.strips * plan.runs;
  const int64_t owners = plan.warps > 1 ? 1 : BLOCK_WARPS;
  plan.blocks = std::min<int64_t>((plan.tasks + owners - 1) / owners, 1 << 20);
  plan.threads = 32 * plan.warps * owners;
  plan.shares = plan.strips > 1 ? plan.strips * g.B * g.C : 0;
  plan.fits = true;
  return plan;
}

void run_rows_fwd(const ContextForward& p, const RowsPlan& plan, float* shares, void* stream) {
  const Arguments arguments{p, plan, shares};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(plan.window == 16 ? context_fwd_rows_kernel<T, 16> : context_fwd_rows_kernel<T, 32>, plan.blocks,
           int(plan.threads), plan.shared, stream, arguments);
    if (plan.strips > 1)
      launch(context_finish_kernel<T>, std::min<int64_t>(p.chain.g.B * p.chain.g.C, 1 << 20), 256, 0, stream,
             arguments);
  };
  if (p.chain.dtype == DType::bf16)
    run(__nv_bfloat16());
  else
    run(__half());
}

}  // namespace focalnet::cuda

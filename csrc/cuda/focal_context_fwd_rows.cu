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
  const int L = chain.L;
  const Rows<T> rows(plan, g);
  rows.for_tasks(g, [&](const Task& task) {
    const int64_t channel = task.channel;
    const float bias = of_vector<T>(chain.ctx_bias, channel);
    for (int l = 0; l < L && rows.mine < 32; ++l) rows.make_bands(chain.levels[l], channel, plan.bands[l], false);
    for (int64_t group = task.first_group; group < task.last_group; ++group) {
      const Pairs pairs(plan, g, group);
      const Lines<const T> ctx(chain.ctx, pairs, channel), gates(chain.gates, pairs, 0);
      float sum[2] = {};
      stream_rows<WINDOW>(
          rows, chain, task, pairs,
          [&](int t, Two<T>(&to)[STEP][2]) { fetch_ctx(ctx, chain.ctx_bias, bias, rows.T_, t, to); },
          [&](int l, int first, float (&acc)[STEP][4]) {
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int j = 0; j < 4; ++j) acc[r][j] = j % 2 < pairs.columns[j / 2] ? gelu<T>(acc[r][j]) : 0.0f;
            if (l + 1 < L) return;
            // gates: of this level, and of those before, which lie in their rings
            const Lines<T> out(p.out, pairs, channel);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (task.has(first + r) && pairs.columns[i] > 0) {
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
          });

      rows.sum_over_images(pairs, group, sum);
      const Lines<T> out(p.out, pairs, channel);
      for (int i = 0; i < 2; ++i) {
        const bool inside = pairs.columns[i] > 0;
        if (inside && pairs.column[i] == 0) {
          const int64_t at = pairs.image[i] * g.C + channel;
          if (plan.strips > 1)
            arguments.shares[task.strip * g.B * g.C + at] = sum[i];
          else
            p.mean[at] = sum[i] / float(g.pixels());
        }
        const float global = gelu<T>(sum[i] / float(g.pixels()));
        if (plan.strips > 1 || !inside) continue;
        for (int row = task.begin; row < task.end; ++row) {  // what this lane wrote itself
          const Two<T> two = out.load(i, row, true);
          float total[2] = {to_float(two.values[0]), to_float(two.values[1])};
          add_gated<T>(gates, chain.gates_bias, i, L, row, global, global, total);
          out.store(i, row, total[0] * chain.scale, total[1] * chain.scale);
        }
      }
    }
  });
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
  RowsPlan plan{};
  if (!lay_out_rows(chain, plan)) return plan;
  lay_out_rings(chain, plan, true);
  cut_into_tasks(chain, plan, plan.groups);
  plan.shares = plan.strips > 1 ? plan.strips * chain.g.B * chain.g.C : 0;
  plan.fits = fill_blocks(plan, chain.g.C * plan.strips * plan.runs);
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

// focal_context, forward, for 16-bit maps and kernels up to 13: rows stream through tensor cores. See rows.h.
#include "cuda/rows.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextForward p;
  RowsPlan plan;
  float* strip_sums;  // [strips][B][C]: sums of the last level, where there are several strips
};

// The last level's rows and the gates: this lane's part of the result, all but the global context.
template <class T>
__device__ __forceinline__ void gate_levels(const Rows<T>& rows, const Chain& chain, const Task& task,
                                            const Pairs& pairs, const Lines<const T>& gates, const Lines<T>& out,
                                            int first, float (&acc)[STEP][4]) {
  const int last = chain.L - 1;
  const auto inside = [&](int r, int i) { return task.has(first + r) && pairs.columns[i] > 0; };
  // f(r, i, the gate's two values)
  const auto each_gate = [&](int l, const auto& f) {
    const float bias = of_vector<T>(chain.gates_bias, l);
    const auto at = gates.rows(first, l);
    for_pairs([&](int r, int i) {
      if (!inside(r, i)) return;
      const Two<T> gate = gates.load_from(at(r, i), i, true);
      f(r, i, to_float(gate.values[0]) + bias, to_float(gate.values[1]) + bias);
    });
  };
  each_gate(last, [&](int r, int i, float a, float b) { acc[r][2 * i] *= a, acc[r][2 * i + 1] *= b; });
  for (int l = 0; l < last; ++l) {  // those before lie in their rings still
    const Ring ring = rows.plan.shared.inputs[l + 1];
    each_gate(l, [&](int r, int i, float a, float b) {
      const Two<T> level = rows.pair_of(ring, first + r, pairs, i);
      acc[r][2 * i] += a * to_float(level.values[0]), acc[r][2 * i + 1] += b * to_float(level.values[1]);
    });
  }
  const auto at = out.rows(first);
  for_pairs([&](int r, int i) {
    if (inside(r, i)) out.store_to(at(r, i), i, acc[r][2 * i], acc[r][2 * i + 1]);
  });
}

// The means from the last level's sums over the images, and the global context. A strip leaves its sums instead, for
// context_finish_kernel.
template <class T>
__device__ __forceinline__ void finish_images(const Arguments& arguments, const Task& task, const Pairs& pairs,
                                              const Lines<const T>& gates, const float (&sum)[2]) {
  const ContextForward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const bool in_strips = arguments.plan.schedule.strips > 1;
  const Lines<T> out(p.out, pairs, task.channel);
  for (int i = 0; i < 2; ++i) {
    const bool inside = pairs.columns[i] > 0;
    if (inside && pairs.column[i] == 0) {
      const int64_t at = pairs.image[i] * g.C + task.channel;
      if (in_strips)
        arguments.strip_sums[task.strip * g.B * g.C + at] = sum[i];
      else
        p.mean[at] = sum[i] / float(g.pixels());
    }
    const float global = gelu<T>(sum[i] / float(g.pixels()));
    if (in_strips || !inside) continue;
    const float bias = of_vector<T>(chain.gates_bias, chain.L);
    T* to = out.rows(task.begin)(0, i);
    const T* from = gates.rows(task.begin, chain.L)(0, i);
    for (int t = task.begin; t < task.end; ++t, to += out.v.t, from += gates.v.t) {  // what this lane wrote itself
      const Two<T> levels = out.load_from(to, i, true), gate = gates.load_from(from, i, true);
      const auto total = [&](int j) {
        return (to_float(levels.values[j]) + (to_float(gate.values[j]) + bias) * global) * chain.scale;
      };
      out.store_to(to, i, total(0), total(1));
    }
  }
}

template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_fwd_rows_kernel(Arguments arguments) {
  const ContextForward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const Rows<T> rows(arguments.plan, g);
  rows.for_tasks(g, [&](const Task& task) {
    const float bias = of_vector<T>(chain.ctx_bias, task.channel);
    rows.make_all_bands(chain, task.channel, false);
    rows.for_groups(g, task, [&](int64_t group, const Pairs& pairs) {
      const Lines<const T> ctx(chain.ctx, pairs, task.channel), gates(chain.gates, pairs, 0);
      float sum[2] = {};
      stream_rows<WINDOW>(
          rows, chain, task, pairs,
          [&](int t, Two<T>(&to)[STEP][2]) { fetch_ctx(ctx, chain.ctx_bias, bias, rows.map_rows, t, to); },
          [&](int l, int first, float (&acc)[STEP][4]) {
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int j = 0; j < 4; ++j) acc[r][j] = j % 2 < pairs.columns[j / 2] ? gelu<T>(acc[r][j]) : 0.0f;
            if (l + 1 < chain.L) return;
            const Lines<T> out(p.out, pairs, task.channel);
            for_pairs([&](int r, int i) {
              if (task.has(first + r)) sum[i] += acc[r][2 * i] + acc[r][2 * i + 1];
            });
            gate_levels(rows, chain, task, pairs, gates, out, first, acc);
          });
      rows.sum_over_images(pairs, group, sum);
      finish_images(arguments, task, pairs, gates, sum);
    });
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
    for (int64_t strip = 0; strip < arguments.plan.schedule.strips; ++strip)
      mean += arguments.strip_sums[strip * g.B * g.C + plane];
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

std::optional<RowsForwardPlan> plan_rows_fwd(const Chain& chain) {
  const std::optional<RowsLayout> layout = lay_out_rows(chain);
  if (!layout) return std::nullopt;
  RowsForwardPlan plan{};
  RowsSchedule& schedule = plan.rows.schedule;
  plan.rows.layout = *layout;
  plan.rows.shared = lay_out_rings(chain, *layout, true);
  cut_into_tasks(chain, *layout, layout->image_groups, schedule);
  if (!fill_blocks(plan.rows, chain.g.C * schedule.strips * schedule.runs)) return std::nullopt;
  plan.strip_sums = schedule.strips > 1 ? schedule.strips * chain.g.B * chain.g.C : 0;
  return plan;
}

void run_context_fwd(const ContextForward& p, const RowsForwardPlan& plan, void* stream) {
  const RowsPlan& rows = plan.rows;
  const Arguments arguments{p, rows, static_cast<float*>(p.scratch)};
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    launch(rows.layout.window == 16 ? context_fwd_rows_kernel<T, 16> : context_fwd_rows_kernel<T, 32>,
           rows.schedule.blocks, int(rows.schedule.threads), rows.schedule.shared_bytes, stream, arguments);
    if (rows.schedule.strips > 1)
      launch(context_finish_kernel<T>, std::min<int64_t>(p.chain.g.B * p.chain.g.C, 1 << 20), 256, 0, stream,
             arguments);
  };
  if (p.chain.dtype == DType::bf16)
    run(__nv_bfloat16());
  else
    run(__half());
}

}  // namespace focalnet::cuda

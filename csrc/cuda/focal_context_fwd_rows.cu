// focal_context, forward, for 16-bit maps and kernels up to 13: rows stream through tensor cores. See rows.h.
#include "cuda/rows.h"
#include "cuda/rows_plan.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextForward p;
  RowsPlan plan;
  float* strip_sums;  // [strips][B][C]: sums of the last level, where there are several strips
};

// Rows first .. first + STEP - 1 of the result, all but the global context, from those of the last level.
template <class T>
__device__ __forceinline__ void gate_levels(const Rows<T>& rows, const Chain& chain, const Task& task,
                                            const Pairs& pairs, const Lines<const T>& gates, const Lines<T>& out,
                                            int first, float (&acc)[STEP][4]) {
  const int last = chain.L - 1;
  PairRows gate;
  const float last_bias = of_vector<T>(chain.gates_bias, last);
  gates.load(gate, first, task.rows, last);
  for_pairs([&](int r, int i) {
#pragma unroll
    for (int j = 0; j < 2; ++j) acc[r][2 * i + j] *= unpack<T>(gate[r][i], j) + last_bias;
  });
  for (int l = 0; l < last; ++l) {  // those before lie in their rings still
    const float bias = of_vector<T>(chain.gates_bias, l);
    gates.load(gate, first, task.rows, l);
    rows.each_row(rows.plan.shared.inputs[l + 1], first, [&](int r, const T* row) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const uint32_t level = load_word(row + pairs.at[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) acc[r][2 * i + j] += (unpack<T>(gate[r][i], j) + bias) * unpack<T>(level, j);
      }
    });
  }
  PairRows total;
  for_pairs([&](int r, int i) { total[r][i] = pack<T>(acc[r][2 * i], acc[r][2 * i + 1]); });
  out.store(total, first, task.rows);
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
  float global[2];
  for (int i = 0; i < 2; ++i) {
    if (pairs.columns[i] > 0 && pairs.column[i] == 0) {
      const int64_t at = pairs.image[i] * g.C + task.channel;
      if (in_strips)
        arguments.strip_sums[task.strip * g.B * g.C + at] = sum[i];
      else
        p.mean[at] = sum[i] / float(g.pixels());
    }
    global[i] = gelu<T>(sum[i] / float(g.pixels()));
  }
  if (in_strips || (pairs.columns[0] == 0 && pairs.columns[1] == 0)) return;
  const float bias = of_vector<T>(chain.gates_bias, chain.L);
  for (int t = task.rows.begin; t < task.rows.end; t += STEP) {  // what this lane wrote itself
    PairRows levels, gate;
    out.load(levels, t, task.rows);
    gates.load(gate, t, task.rows, chain.L);
    for_pairs([&](int r, int i) {
      const auto total = [&](int j) {
        return (unpack<T>(levels[r][i], j) + (unpack<T>(gate[r][i], j) + bias) * global[i]) * chain.scale;
      };
      levels[r][i] = pack<T>(total(0), total(1));
    });
    out.store(levels, t, task.rows);
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
          rows, chain, task, pairs, [&](int t, PairRows& to) { load_ctx(ctx, chain.ctx_bias, bias, rows.map, t, to); },
          [&](int l, int first, float (&acc)[STEP][4], PairRows& level) {
            for_pairs([&](int r, int i) {
              float &a = acc[r][2 * i], &b = acc[r][2 * i + 1];
              a = gelu<T>(a), b = gelu<T>(b);
              level[r][i] = pack<T>(a, b);
            });
            if (l + 1 < chain.L) return;
            for_pairs([&](int r, int i) {
              if (task.rows.has(first + r)) sum[i] += acc[r][2 * i] + (pairs.columns[i] > 1 ? acc[r][2 * i + 1] : 0.0f);
            });
            const Lines<T> out(p.out, pairs, task.channel);
            gate_levels(rows, chain, task, pairs, gates, out, first, acc);
          });
      for (int i = 0; i < 2; ++i)
        if (pairs.columns[i] == 0) sum[i] = 0;
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

bool takes_rows(const Chain& chain) {
  constexpr int64_t WIDEST = 384, MOST_LEVELS = 4;  // of 13 x 13: rings and bands of 86 KB
  return chain.g.T >= STEP && chain.g.W <= WIDEST && chain.L <= MOST_LEVELS && lay_out_rows(chain).has_value();
}

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

// focal_context, backward, for 16-bit maps and kernels up to 13, as many and as wide as the forward takes by rows: one
// pass down the levels, one back up, one for the gates and one for the weights. What a pass hands on lies in global
// memory, so that each holds no more than its own rows; focal_context_bwd_rows.cu does it all at once, where it can.
// See rows.h; ops/focal_context/README.md derives the gradients.
#include "cuda/rows.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextBackward p;  // in the pass up, its chain's levels in reverse
  RowsPlan rows;
  int64_t slots, slot_channels;
  // Handed on: what leaves each level, GELU's slopes there, the gradients of what leaves its convolution. Level l of
  // channel c is plane c * L + l.
  MapView levels, slopes, grads;
  float* shares;  // [strips][B][C]: of the sum over an image of the last gate times the gradient
  int64_t first_image, last_image;
};

template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_down_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int L = chain.L;
  const Rows<T> rows(arguments.rows, g);
  const float gate_bias = of_vector<T>(chain.gates_bias, L);
  rows.for_tasks(g, [&](const Task& task) {
    const float bias = of_vector<T>(chain.ctx_bias, task.channel);
    for (int l = 0; l < L && rows.mine < 32; ++l)
      rows.make_bands(chain.levels[l], task.channel, rows.plan.bands[l], false);
    for (int64_t group = task.first_group; group < task.last_group; ++group) {
      const Pairs pairs(rows.plan, g, group);
      const Lines<const T> ctx(chain.ctx, pairs, task.channel), gates(chain.gates, pairs, L);
      const Lines<const T> grad_out(p.grad_out, pairs, task.channel);
      const Lines<T> levels(arguments.levels, pairs, task.channel * L),
          slopes(arguments.slopes, pairs, task.channel * L);
      float sum[2] = {};
      stream_rows<WINDOW>(
          rows, chain, task, pairs,
          [&](int t, Two<T>(&to)[STEP][2]) { fetch_ctx(ctx, chain.ctx_bias, bias, rows.T_, t, to); },
          [&](int l, int first, float (&acc)[STEP][4]) {
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float &a = acc[r][2 * i], &b = acc[r][2 * i + 1];
                const bool inside = task.has(first + r) && pairs.columns[i] > 0;
                if (inside) slopes.store(i, first + r, gelu_slope<T>(a), gelu_slope<T>(b), l);
                a = pairs.columns[i] > 0 ? gelu<T>(a) : 0.0f, b = pairs.columns[i] > 1 ? gelu<T>(b) : 0.0f;
                if (inside) levels.store(i, first + r, a, b, l);
                if (inside && l + 1 == L) {
                  const Two<T> gate = gates.load(i, first + r, true), grad = grad_out.load(i, first + r, true);
#pragma unroll
                  for (int j = 0; j < 2; ++j)
                    sum[i] += (to_float(gate.values[j]) + gate_bias) * to_float(grad.values[j]);
                }
              }
          });
      rows.sum_over_images(pairs, group, sum);
      for (int i = 0; i < 2; ++i)
        if (pairs.columns[i] > 0 && pairs.column[i] == 0)
          arguments.shares[(task.strip * g.B + pairs.image[i]) * g.C + task.channel] = sum[i];
    }
  });
}

template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_up_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int L = chain.L;
  const Rows<T> rows(arguments.rows, g);
  rows.for_tasks(g, [&](const Task& task) {
    for (int l = 0; l < L && rows.mine < 32; ++l)
      rows.make_bands(chain.levels[l], task.channel, rows.plan.bands[l], true);
    for (int64_t group = task.first_group; group < task.last_group; ++group) {
      const Pairs pairs(rows.plan, g, group);
      const Lines<const T> grad_out(p.grad_out, pairs, task.channel), gates(chain.gates, pairs, 0);
      const Lines<const T> slopes(arguments.slopes, pairs, task.channel * L);
      const Lines<T> grads(arguments.grads, pairs, task.channel * L), grad_ctx(p.grad_ctx, pairs, task.channel);
      float to_mean[2] = {};
      for (int i = 0; i < 2; ++i)
        if (pairs.columns[i] > 0) {
          const int64_t at = pairs.image[i] * g.C + task.channel;
          for (int64_t strip = 0; strip < rows.plan.strips; ++strip)
            to_mean[i] += arguments.shares[strip * g.B * g.C + at];
          to_mean[i] *= chain.scale * gelu_slope<T>(p.mean[at]) / float(g.pixels());
        }

      // from the gradient of what leaves level l through other levels, that of what leaves its convolution
      const auto through_level = [&](int l, float gate_bias, int t, int i, float& a, float& b) {
        if (t < 0 || t >= g.T || pairs.columns[i] <= 0) {
          a = b = 0;
          return;
        }
        const Two<T> gate = gates.load(i, t, true, l), grad = grad_out.load(i, t, true),
                     slope = slopes.load(i, t, true, l);
        const auto entering = [&](int j) { return (to_float(gate.values[j]) + gate_bias) * to_float(grad.values[j]); };
        a = (a + entering(0) * chain.scale) * to_float(slope.values[0]);
        b = pairs.columns[i] > 1 ? (b + entering(1) * chain.scale) * to_float(slope.values[1]) : 0.0f;
        if (task.has(t)) grads.store(i, t, a, b, l);
      };
      stream_rows<WINDOW>(
          rows, chain, task, pairs,
          [&](int t, Two<T>(&to)[STEP][2]) {
            const float gate_bias = of_vector<T>(chain.gates_bias, L - 1);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i) {
                float a = to_mean[i], b = to_mean[i];
                through_level(L - 1, gate_bias, t + r, i, a, b);
                to[r][i] = two_of<T>(a, b);
              }
          },
          [&](int step, int first, float (&acc)[STEP][4]) {
            const int l = L - 2 - step;  // whose results entered that convolution; -1: ctx did
            const float gate_bias = l < 0 ? 0.0f : of_vector<T>(chain.gates_bias, l);
#pragma unroll
            for (int r = 0; r < STEP; ++r)
#pragma unroll
              for (int i = 0; i < 2; ++i)
                if (l >= 0)
                  through_level(l, gate_bias, first + r, i, acc[r][2 * i], acc[r][2 * i + 1]);
                else if (p.grad_ctx.data && task.has(first + r) && pairs.columns[i] > 0)
                  grad_ctx.store(i, first + r, acc[r][2 * i], acc[r][2 * i + 1]);
          });
    }
  });
}

// A task's share of one level's taps: K rows of them.
template <int K, int WINDOW, class T>
__device__ void weight_gradients(const Arguments& arguments, const Rows<T>& rows, const Task& task, int l, float* to) {
  constexpr int HALVES = WINDOW / 16;
  const Chain& chain = arguments.p.chain;
  const RowsPlan& plan = rows.plan;
  const Level& k = chain.levels[l].size;
  const Vector biases = l == 0 ? chain.ctx_bias : Vector{};
  const float bias = of_vector<T>(biases, task.channel);
  float products[K][HALVES][4] = {};
  for (int64_t group = task.first_group; group < task.last_group; ++group) {
    const Pairs pairs(plan, chain.g, group);
    const int64_t planes = task.channel * chain.L + l;
    const Lines<const T> grads(arguments.grads, pairs, planes);
    const Lines<const T> from(l == 0 ? chain.ctx : arguments.levels, pairs, l == 0 ? task.channel : planes - 1);
    Two<T> next[STEP][2], grad[STEP][2];
    int t = task.begin - (K / 2 + 1) / 2 * STEP;  // rows up to t + STEP - 1 + K / 2 are there
    fetch_ctx(from, biases, bias, rows.T_, t + K / 2, next);
    for (; t < task.end; t += STEP) {
#pragma unroll
      for (int r = 0; r < STEP; ++r) rows.put(plan.rings[0], plan.ring_rows[0], t + K / 2 + r, pairs, next[r]);
      rows.sync();
      if (t + STEP < task.end) fetch_ctx(from, biases, bias, rows.T_, t + STEP + K / 2, next);
      if (t >= task.begin) {
        fetch(grads, rows.T_, t, grad);
        uint32_t both[STEP][2];
#pragma unroll
        for (int r = 0; r < STEP; ++r)
#pragma unroll
          for (int i = 0; i < 2; ++i) both[r][i] = packed(grad[r][i]);
        rows.template add_products<K, 0>(products, plan.rings[0], plan.ring_rows[0], t, both);
      }
      rows.sync();
    }
  }
  const int lane = threadIdx.x % 32, warp = rows.mine / 32;
  float* const sums = reinterpret_cast<float*>(rows.memory + plan.sums);  // a tap per lane, then areas for diagonals
#pragma unroll
  for (int dt = 0; dt < K; ++dt) {
    float tap = Rows<T>::diagonal(products[dt], int(k.kw), sums + 32 * plan.warps + warp * WINDOW * 8);
    if (plan.warps > 1) {
      sums[rows.mine] = tap;
      rows.sync();
      tap = 0;
      for (int i = 0; i < plan.warps; ++i) tap += sums[32 * i + lane];
      rows.sync();
    }
    if (rows.mine < k.kw) to[dt * k.kw + lane] = tap;
  }
}

template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_weights_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Rows<T> rows(arguments.rows, chain.g);
  int64_t all_taps = 0;
  for (int l = 0; l < chain.L; ++l) all_taps += chain.levels[l].size.taps();
  rows.for_tasks(chain.g, [&](const Task& task) {
    float* to = p.weights_parts + ((task.run * rows.plan.strips + task.strip) * chain.g.C + task.channel) * all_taps;
    for (int l = 0; l < chain.L; ++l) {
      const int kt = int(chain.levels[l].size.kt);
      if constexpr (WINDOW == 32) {
        if (kt == 13) weight_gradients<13, WINDOW>(arguments, rows, task, l, to);
        if (kt == 11) weight_gradients<11, WINDOW>(arguments, rows, task, l, to);
      }
      if (kt == 9) weight_gradients<9, WINDOW>(arguments, rows, task, l, to);
      if (kt == 7) weight_gradients<7, WINDOW>(arguments, rows, task, l, to);
      if (kt == 5) weight_gradients<5, WINDOW>(arguments, rows, task, l, to);
      if (kt == 3) weight_gradients<3, WINDOW>(arguments, rows, task, l, to);
      if (kt == 1) weight_gradients<1, WINDOW>(arguments, rows, task, l, to);
      to += chain.levels[l].size.taps();
    }
  });
}

constexpr int GATES_BLOCK = 128;

// The gates' gradients, and the result again: four pixels a thread, through all channels of a slot.
template <class T>
__global__ void __launch_bounds__(GATES_BLOCK) context_gates_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int L = chain.L;
  const int64_t across = (g.W + 3) / 4, quads = (arguments.last_image - arguments.first_image) * g.T * across;
  const int64_t blocks = (quads + GATES_BLOCK - 1) / GATES_BLOCK;
  for (int64_t task = blockIdx.x; task < blocks * arguments.slots; task += gridDim.x) {
    const int64_t slot = task / blocks, quad = task % blocks * GATES_BLOCK + threadIdx.x;
    if (quad >= quads) continue;
    const int64_t w = quad % across * 4, t = quad / across % g.T, image = arguments.first_image + quad / across / g.T;
    const int n = int(std::min<int64_t>(4, g.W - w));
    const int64_t first = slot * arguments.slot_channels, last = std::min(g.C, first + arguments.slot_channels);
    const auto load_level = [&](int64_t channel, int l, float (&to)[4]) {
      if (l < L) {
        load_quad(element<const T>(arguments.levels, image, channel * L + l, t, 0, w), 1, n, to);
      } else {
        const float global = gelu<T>(p.mean[image * g.C + channel]);
        for (int j = 0; j < 4; ++j) to[j] = global;
      }
    };
    for (int l = 0; l <= L && p.gates_parts; ++l) {  // the gradient is read once per level: from the cache
      float sum[4] = {}, grad[4], value[4];
      for (int64_t channel = first; channel < last; ++channel) {
        load_quad(element<const T>(p.grad_out, image, channel, t, 0, w), p.grad_out.w, n, grad);
        load_level(channel, l, value);
        for (int j = 0; j < 4; ++j) sum[j] += grad[j] * value[j];
      }
      for (int j = 0; j < 4; ++j) sum[j] *= chain.scale;
      store_quad(p.gates_parts + (((slot * g.B + image) * (L + 1) + l) * g.T + t) * g.W + w, 1, n, sum);
    }
    for (int64_t channel = first; channel < last && p.ctx_all.data; ++channel) {
      float total[4] = {}, gate[4], value[4];
      for (int l = 0; l <= L; ++l) {
        const float gate_bias = of_vector<T>(chain.gates_bias, l);
        load_quad(element<const T>(chain.gates, image, l, t, 0, w), chain.gates.w, n, gate);
        load_level(channel, l, value);
        for (int j = 0; j < 4; ++j) total[j] += (gate[j] + gate_bias) * value[j];
      }
      for (int j = 0; j < 4; ++j) total[j] *= chain.scale;
      store_quad(element<T>(p.ctx_all, image, channel, t, 0, w), p.ctx_all.w, n, total);
    }
  }
}

Chain reversed(Chain chain) {
  std::reverse(chain.levels, chain.levels + chain.L);
  return chain;
}

}  // namespace

PassesPlan plan_passes_bwd(const Chain& chain) {
  const Geometry& g = chain.g;
  const Device device = current_device();
  PassesPlan plan{};
  RowsPlan &down = plan.down, &up = plan.up, &weights = plan.weights;
  if (!lay_out_rows(chain, down) || !lay_out_rows(reversed(chain), up) || !lay_out_rows(chain, weights)) return plan;
  lay_out_rings(chain, down, false);
  lay_out_rings(reversed(chain), up, false);
  for (int l = 0; l < chain.L; ++l)
    weights.ring_rows[0] = std::max(weights.ring_rows[0], STEP + 2 * int(chain.levels[l].size.rt()));
  weights.ring_rows[0] = int(std::min<int64_t>(weights.ring_rows[0], g.T));
  weights.rings[0] = take(weights, weights.ring_rows[0] * weights.row);
  weights.zeros = take(weights, weights.row);
  weights.sums = take(weights, 2 * weights.warps * (32 + weights.window * 8));

  plan.row = (g.W + 3) / 4 * 4;
  plan.plane = g.T * plan.row;
  const int64_t bytes_of_group = down.images * 3 * chain.L * g.C * plan.plane * 2;
  const int64_t at_once = std::min(down.groups, std::max<int64_t>(1, device.scratch / bytes_of_group));
  cut_into_tasks(chain, down, at_once);
  plan.chunk = at_once == down.groups ? std::max<int64_t>(1, down.runs) : std::max<int64_t>(1, at_once / down.run);
  plan.chunk_images = std::min(g.B, plan.chunk * down.run * down.images);
  plan.handed_on = plan.chunk_images * chain.L * g.C * plan.plane;
  plan.scratch = 3 * plan.handed_on / 2 + down.strips * g.B * g.C;
  plan.image_runs = down.runs * down.strips;
  for (RowsPlan* pass : {&up, &weights}) {
    pass->strips = down.strips, pass->strip_rows = down.strip_rows;
    pass->run = down.run, pass->runs = down.runs;
  }
  // the gates: few slots, but enough threads
  const int64_t enough = 1024 * int64_t(device.processors);
  const int64_t wanted = 1 + enough / std::max<int64_t>(1, plan.chunk_images * plan.plane / 4);
  plan.slot_channels = (g.C + wanted - 1) / wanted;
  plan.slots = (g.C + plan.slot_channels - 1) / plan.slot_channels;
  const int64_t tasks = g.C * down.strips * plan.chunk;
  up.fits = weights.fits = down.fits =
      fill_blocks(down, tasks) && fill_blocks(up, tasks) && fill_blocks(weights, tasks);
  return plan;
}

void run_passes_bwd(const ContextBackward& p, const PassesPlan& plan, void* stream) {
  const Geometry& g = p.chain.g;
  const int64_t planes = g.C * p.chain.L * plan.plane;
  const auto run = [&](auto zero) {
    using T = decltype(zero);
    T* const memory = reinterpret_cast<T*>(p.scratch);
    float* const shares = p.scratch + 3 * plan.handed_on / 2;
    const bool narrow = plan.down.window == 16;
    for (int64_t first = 0; first < plan.down.runs; first += plan.chunk) {
      const int64_t runs = std::min(plan.chunk, plan.down.runs - first),
                    image = first * plan.down.run * plan.down.images;
      const auto map = [&](int n) {  // images before this chunk's are not there
        return MapView{memory + n * plan.handed_on - image * planes, planes, plan.plane, plan.row, 0, 1};
      };
      Arguments arguments{p, {}, plan.slots, plan.slot_channels, map(0), map(1), map(2), shares, image};
      arguments.last_image = std::min(g.B, image + runs * plan.down.run * plan.down.images);
      const auto pass = [&](void (*kernel)(Arguments), const RowsPlan& rows) {
        arguments.rows = rows;
        arguments.rows.first_run = first;
        arguments.rows.tasks = g.C * rows.strips * runs;
        launch(kernel, rows.blocks, int(rows.threads), rows.shared, stream, arguments);
      };
      pass(narrow ? context_down_kernel<T, 16> : context_down_kernel<T, 32>, plan.down);
      if (p.gates_parts || p.ctx_all.data) {
        const int64_t quads = (arguments.last_image - image) * g.T * ((g.W + 3) / 4);
        const int64_t blocks = (quads + GATES_BLOCK - 1) / GATES_BLOCK * plan.slots;
        launch(context_gates_kernel<T>, std::min<int64_t>(blocks, 1 << 20), GATES_BLOCK, 0, stream, arguments);
      }
      if (!p.grad_ctx.data && !p.weights_parts) continue;
      arguments.p.chain = reversed(p.chain);
      pass(narrow ? context_up_kernel<T, 16> : context_up_kernel<T, 32>, plan.up);
      arguments.p.chain = p.chain;
      if (p.weights_parts) pass(narrow ? context_weights_kernel<T, 16> : context_weights_kernel<T, 32>, plan.weights);
    }
  };
  if (p.chain.dtype == DType::bf16)
    run(__nv_bfloat16());
  else
    run(__half());
}

}  // namespace focalnet::cuda

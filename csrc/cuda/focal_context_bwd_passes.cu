// focal_context, backward, for 16-bit maps and kernels up to 13, as many and as wide as the forward takes by rows: one
// pass down the levels, one back up, one for the gates and one for the weights. Passes write what later ones read to
// global memory, so that each holds no more than its own rows. See rows.h; ops/focal_context/README.md derives the
// gradients.
#include "cuda/rows.h"
#include "cuda/rows_plan.h"

namespace focalnet::cuda {

namespace {

struct Arguments {
  ContextBackward p;  // in the pass up, its chain's levels in reverse
  RowsPlan rows;
  PassesGates gates;
  // The workspace: what leaves each level, GELU's slopes there, the gradients of what leaves its convolution. Level l
  // of channel c is plane c * L + l.
  MapView levels, slopes, grads;
  float* strip_sums;  // [strips][B][C]: of the last gate times the gradient
  int64_t first_image, last_image;
};

// Down: keeps every level and GELU's slopes, and sums up what reaches the mean.
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
    rows.make_all_bands(chain, task.channel, false);
    rows.for_groups(g, task, [&](int64_t group, const Pairs& pairs) {
      const Lines<const T> ctx(chain.ctx, pairs, task.channel), gates(chain.gates, pairs, L);
      const Lines<const T> grad_out(p.grad_out, pairs, task.channel);
      const Lines<T> levels(arguments.levels, pairs, task.channel * L);
      const Lines<T> slopes(arguments.slopes, pairs, task.channel * L);
      float sum[2] = {};
      stream_rows<WINDOW>(
          rows, chain, task, pairs, [&](int t, PairRows& to) { load_ctx(ctx, chain.ctx_bias, bias, rows.map, t, to); },
          [&](int l, int first, const float (&acc)[STEP][4], PairRows& level) {
            PairRows slope;
            for_pairs([&](int r, int i) {
              const Gelu left = gelu_and_slope<T>(acc[r][2 * i]), right = gelu_and_slope<T>(acc[r][2 * i + 1]);
              level[r][i] = pack<T>(left.value, right.value), slope[r][i] = pack<T>(left.slope, right.slope);
            });
            levels.store(level, first, task.rows, l);
            slopes.store(slope, first, task.rows, l);
            if (l + 1 < L) return;
            PairRows gate, grad;
            gates.load(gate, first, task.rows);
            grad_out.load(grad, first, task.rows);
            for_pairs([&](int r, int i) {
#pragma unroll
              for (int j = 0; j < 2; ++j) sum[i] += (unpack<T>(gate[r][i], j) + gate_bias) * unpack<T>(grad[r][i], j);
            });
          });
      for (int i = 0; i < 2; ++i)
        if (pairs.columns[i] == 0) sum[i] = 0;
      rows.sum_over_images(pairs, group, sum);
      for (int i = 0; i < 2; ++i)
        if (pairs.columns[i] > 0 && pairs.column[i] == 0)
          arguments.strip_sums[(task.strip * g.B + pairs.image[i]) * g.C + task.channel] = sum[i];
    });
  });
}

// What every pixel of the last level receives through the mean, for the images of both pairs.
template <class T>
__device__ __forceinline__ void mean_gradient(const Arguments& arguments, const Task& task, const Pairs& pairs,
                                              float (&to_mean)[2]) {
  const Chain& chain = arguments.p.chain;
  const Geometry& g = chain.g;
  for (int i = 0; i < 2; ++i) {
    to_mean[i] = 0;
    if (pairs.columns[i] <= 0) continue;
    const int64_t at = pairs.image[i] * g.C + task.channel;
    for (int64_t strip = 0; strip < arguments.rows.schedule.strips; ++strip)
      to_mean[i] += arguments.strip_sums[strip * g.B * g.C + at];
    to_mean[i] *= chain.scale * gelu_slope<T>(arguments.p.mean[at]) / float(g.pixels());
  }
}

// Up: keeps the gradients of what leaves each convolution.
template <class T, int WINDOW>
__global__ void __launch_bounds__(32 * MOST_WARPS, 1) context_up_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int L = chain.L;
  const Rows<T> rows(arguments.rows, g);
  rows.for_tasks(g, [&](const Task& task) {
    rows.make_all_bands(chain, task.channel, true);
    rows.for_groups(g, task, [&](int64_t, const Pairs& pairs) {
      const Lines<const T> grad_out(p.grad_out, pairs, task.channel), gates(chain.gates, pairs, 0);
      const Lines<const T> slopes(arguments.slopes, pairs, task.channel * L);
      const Lines<T> grads(arguments.grads, pairs, task.channel * L), grad_ctx(p.grad_ctx, pairs, task.channel);
      float to_mean[2];
      mean_gradient<T>(arguments, task, pairs, to_mean);

      // from the gradient of what leaves level l through other levels, that of what leaves its convolution
      const auto through_level = [&](int l, int first, const float (&through)[STEP][4], PairRows& to) {
        if (!rows.map.has_any(first)) {
          for_pairs([&](int r, int i) { to[r][i] = 0; });
          return;
        }
        const float gate_bias = of_vector<T>(chain.gates_bias, l) * chain.scale;
        PairRows gate, grad, slope;
        gates.load(gate, first, rows.map, l);
        grad_out.load(grad, first, rows.map);
        slopes.load(slope, first, rows.map, l);
        for_pairs([&](int r, int i) {
          const auto total = [&](int j) {
            const float scaled_gate = unpack<T>(gate[r][i], j) * chain.scale + gate_bias;
            const float entering = scaled_gate * unpack<T>(grad[r][i], j);
            return (through[r][2 * i + j] + entering) * unpack<T>(slope[r][i], j);
          };
          to[r][i] = pack<T>(total(0), total(1));
        });
        grads.store(to, first, task.rows, l);
      };
      stream_rows<WINDOW>(
          rows, chain, task, pairs,
          [&](int t, PairRows& to) {
            float acc[STEP][4];
            for_pairs([&](int r, int i) { acc[r][2 * i] = acc[r][2 * i + 1] = to_mean[i]; });
            through_level(L - 1, t, acc, to);
            clear_outside(to, t, rows.map);
          },
          [&](int step, int first, const float (&acc)[STEP][4], PairRows& to) {
            const int l = L - 2 - step;  // whose results entered that convolution; -1: ctx did
            if (l >= 0) return through_level(l, first, acc, to);
            if (!p.grad_ctx.data) return;
            for_pairs([&](int r, int i) { to[r][i] = pack<T>(acc[r][2 * i], acc[r][2 * i + 1]); });
            grad_ctx.store(to, first, task.rows);
          });
    });
  });
}

// The products of a task's input and gradients of one level: see Rows::add_products.
template <int K, int WINDOW, class T>
__device__ __forceinline__ void tap_products(const Arguments& arguments, const Rows<T>& rows, const Task& task, int l,
                                             float (&products)[K][WINDOW / 16][4]) {
  const Chain& chain = arguments.p.chain;
  Ring ring = rows.plan.shared.inputs[0];
  ring.shift -= K / 2;  // rows t + K / 2 and following are put together
  const Vector biases = l == 0 ? chain.ctx_bias : Vector{};
  const float bias = of_vector<T>(biases, task.channel);
  rows.for_groups(chain.g, task, [&](int64_t, const Pairs& pairs) {
    const int64_t planes = task.channel * chain.L + l;
    const Lines<const T> grads(arguments.grads, pairs, planes);
    const Lines<const T> from(l == 0 ? chain.ctx : arguments.levels, pairs, l == 0 ? task.channel : planes - 1);
    PairRows next, grad;
    int t = task.rows.begin - (K / 2 + 1) / 2 * STEP;  // rows up to t + STEP - 1 + K / 2 are there
    load_ctx(from, biases, bias, rows.map, t + K / 2, next);
    for (; t < task.rows.end; t += STEP) {
      rows.put(ring, t + K / 2, pairs, next);
      rows.sync();
      if (t + STEP < task.rows.end) load_ctx(from, biases, bias, rows.map, t + STEP + K / 2, next);
      if (t >= task.rows.begin) {
        grads.load(grad, t, rows.map);
        rows.template add_products<K>(products, ring, t, pairs, grad);
      }
      rows.sync();
    }
  });
}

// A task's partial sums of one level's taps: K rows of them.
template <int K, int WINDOW, class T>
__device__ void weight_gradients(const Arguments& arguments, const Rows<T>& rows, const Task& task, int l, float* to) {
  const int warps = rows.plan.layout.warps, kw = int(arguments.p.chain.levels[l].size.kw);
  float products[K][WINDOW / 16][4] = {};
  tap_products<K, WINDOW>(arguments, rows, task, l, products);
  const int lane = threadIdx.x % 32, warp = rows.thread / 32;
  float* const sums = reinterpret_cast<float*>(rows.memory + rows.plan.shared.sums);  // a tap per lane,
  float* const area = sums + 32 * warps + warp * WINDOW * 8;                          // then areas for diagonals
#pragma unroll
  for (int dt = 0; dt < K; ++dt) {
    float tap = Rows<T>::diagonal(products[dt], kw, area);
    if (warps > 1) {
      sums[rows.thread] = tap;
      rows.sync();
      tap = 0;
      for (int i = 0; i < warps; ++i) tap += sums[32 * i + lane];
      rows.sync();
    }
    if (rows.thread < kw) to[dt * kw + lane] = tap;
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
    const int64_t part = task.run * rows.plan.schedule.strips + task.strip;
    float* to = p.weight_sums + (part * chain.g.C + task.channel) * all_taps;
    for (int l = 0; l < chain.L; ++l) {
      with_height<WINDOW>(int(chain.levels[l].size.kt),
                          [&](auto k) { weight_gradients<k, WINDOW>(arguments, rows, task, l, to); });
      to += chain.levels[l].size.taps();
    }
  });
}

constexpr int GATES_BLOCK = 128;

// Four elements, of which the first n are there, 2 or 4, on four bytes.
template <class T>
__device__ void load_words(const T* p, int n, float (&to)[4]) {
  const uint32_t words[2] = {load_word(p), n > 2 ? load_word(p + 2) : 0};
  for (int i = 0; i < 4; ++i) to[i] = unpack<T>(words[i / 2], i % 2);
}

// The gates' gradients, and the result again: four pixels a thread, through all channels of a partial sum.
template <class T>
__global__ void __launch_bounds__(GATES_BLOCK) context_gates_kernel(Arguments arguments) {
  const ContextBackward& p = arguments.p;
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int L = chain.L;
  const int64_t across = (g.W + 3) / 4, quads = (arguments.last_image - arguments.first_image) * g.T * across;
  const int64_t blocks = (quads + GATES_BLOCK - 1) / GATES_BLOCK;
  const MapView& grad_out = p.grad_out;
  // four elements are two accesses of two at least
  const bool in_pairs = grad_out.w == 1 && (grad_out.b | grad_out.c | grad_out.t | g.W) % 2 == 0 &&
                        reinterpret_cast<uintptr_t>(grad_out.data) % 4 == 0;
  for (int64_t task = blockIdx.x; task < blocks * arguments.gates.parts; task += gridDim.x) {
    const int64_t part = task / blocks, quad = task % blocks * GATES_BLOCK + threadIdx.x;
    if (quad >= quads) continue;
    const int64_t w = quad % across * 4, t = quad / across % g.T, image = arguments.first_image + quad / across / g.T;
    const int n = int(std::min<int64_t>(4, g.W - w));
    const int64_t first = part * arguments.gates.channels, last = std::min(g.C, first + arguments.gates.channels);
    const T* grad_at = element<const T>(grad_out, image, first, t, 0, w);
    const T* level_at = element<const T>(arguments.levels, image, first * L, t, 0, w);
    float sum[MAX_LEVELS + 1][4] = {};
    for (int64_t channel = first; channel < last; ++channel, grad_at += grad_out.c) {
      float grad[4], total[4] = {};
      if (in_pairs)
        load_words(grad_at, n, grad);
      else
        load_quad(grad_at, grad_out.w, n, grad);
      const auto add = [&](int l, const float (&value)[4], float (&sum)[4]) {
#pragma unroll
        for (int j = 0; j < 4; ++j) sum[j] += grad[j] * value[j];
        if (!p.ctx_all.data) return;
        float gate[4];
        const float gate_bias = of_vector<T>(chain.gates_bias, l);
        load_quad(element<const T>(chain.gates, image, l, t, 0, w), chain.gates.w, n, gate);
        for (int j = 0; j < 4; ++j) total[j] += (gate[j] + gate_bias) * value[j];
      };
#pragma unroll
      for (int l = 0; l < MAX_LEVELS; ++l) {  // not to L: sums stay in registers
        if (l == L) break;
        const uint2 both = *reinterpret_cast<const uint2*>(level_at);
        const float value[4] = {unpack<T>(both.x, 0), unpack<T>(both.x, 1), unpack<T>(both.y, 0), unpack<T>(both.y, 1)};
        add(l, value, sum[l]);
        level_at += arguments.levels.c;
      }
      const float global = gelu<T>(p.mean[image * g.C + channel]);
      add(L, {global, global, global, global}, sum[MAX_LEVELS]);
      if (!p.ctx_all.data) continue;
      for (int j = 0; j < 4; ++j) total[j] *= chain.scale;
      store_quad(element<T>(p.ctx_all, image, channel, t, 0, w), p.ctx_all.w, n, total);
    }
    if (!p.gate_sums) continue;
#pragma unroll
    for (int i = 0; i <= MAX_LEVELS; ++i) {
      const int l = i == MAX_LEVELS ? L : i;
      if (i >= L && i < MAX_LEVELS) continue;
      for (int j = 0; j < 4; ++j) sum[i][j] *= chain.scale;
      store_quad(p.gate_sums + (((part * (L + 1) + l) * g.B + image) * g.T + t) * g.W + w, 1, n, sum[i]);
    }
  }
}

Chain reversed(Chain chain) {
  std::reverse(chain.levels, chain.levels + chain.L);
  return chain;
}

}  // namespace

std::optional<PassesPlan> plan_passes_bwd(const Chain& chain) {
  const Geometry& g = chain.g;
  const Device device = current_device();
  const std::optional<RowsLayout> layout = lay_out_rows(chain), layout_up = lay_out_rows(reversed(chain));
  if (!layout || !layout_up) return std::nullopt;
  PassesPlan plan{};
  RowsPlan &down = plan.down, &up = plan.up, &weights = plan.weights;
  down.layout = weights.layout = *layout, up.layout = *layout_up;
  down.shared = lay_out_rings(chain, down.layout, false);
  up.shared = lay_out_rings(reversed(chain), up.layout, false);
  int ring_rows = 0;
  for (int l = 0; l < chain.L; ++l) ring_rows = std::max(ring_rows, STEP + 2 * int(chain.levels[l].size.rt()));
  weights.shared.inputs.set(0, take_ring(weights.shared, ring_rows, layout->row, 0));
  weights.shared.rings = weights.shared.elements;
  weights.shared.sums = take(weights.shared, 2 * layout->warps * (32 + layout->window * 8));

  PassesWorkspace& workspace = plan.workspace;
  workspace.row = (g.W + 3) / 4 * 4;
  workspace.plane = g.T * workspace.row;
  const int64_t bytes_of_group = layout->images * 3 * chain.L * g.C * workspace.plane * 2;
  const int64_t groups = layout->image_groups;
  const int64_t at_once = std::min(groups, std::max<int64_t>(1, device.scratch / bytes_of_group));
  RowsSchedule& schedule = down.schedule;
  cut_into_tasks(chain, *layout, at_once, schedule);
  up.schedule = weights.schedule = schedule;
  workspace.runs =
      at_once == groups ? std::max<int64_t>(1, schedule.runs) : std::max<int64_t>(1, at_once / schedule.run);
  workspace.images = std::min(g.B, workspace.runs * schedule.run * layout->images);
  workspace.elements = workspace.images * chain.L * g.C * workspace.plane;
  plan.strip_sums = schedule.strips * g.B * g.C;

  // the gates: few partial sums, but enough threads
  const int64_t enough = 1024 * int64_t(device.processors);
  const int64_t wanted = 1 + enough / std::max<int64_t>(1, workspace.images * workspace.plane / 4);
  plan.gates.channels = (g.C + wanted - 1) / wanted;
  plan.gates.parts = (g.C + plan.gates.channels - 1) / plan.gates.channels;
  const int64_t tasks = g.C * schedule.strips * workspace.runs;
  if (!fill_blocks(down, tasks) || !fill_blocks(up, tasks) || !fill_blocks(weights, tasks)) return std::nullopt;
  return plan;
}

namespace {

// One chunk of images: runs first_run and following, `runs` of them.
template <class T>
void run_chunk(const ContextBackward& p, const PassesPlan& plan, int64_t first_run, int64_t runs, void* stream) {
  const Geometry& g = p.chain.g;
  const PassesWorkspace& workspace = plan.workspace;
  const int64_t image_elements = g.C * p.chain.L * workspace.plane;
  const int64_t images_per_run = plan.down.schedule.run * plan.down.layout.images;
  const int64_t first_image = first_run * images_per_run;
  T* const memory = static_cast<T*>(p.scratch);
  const auto map = [&](int n) {  // images before this chunk's are not there
    T* const data = memory + n * workspace.elements - first_image * image_elements;
    return MapView{data, image_elements, workspace.plane, workspace.row, 0, 1};
  };
  Arguments arguments{p, {}, plan.gates, map(0), map(1), map(2), nullptr, first_image};
  arguments.strip_sums = reinterpret_cast<float*>(memory + 3 * workspace.elements);
  arguments.last_image = std::min(g.B, first_image + runs * images_per_run);

  const auto pass = [&](void (*kernel)(Arguments), const RowsPlan& rows) {
    arguments.rows = rows;
    arguments.rows.schedule.first_run = first_run;
    arguments.rows.schedule.tasks = g.C * rows.schedule.strips * runs;
    launch(kernel, rows.schedule.blocks, int(rows.schedule.threads), rows.schedule.shared_bytes, stream, arguments);
  };
  const bool narrow = plan.down.layout.window == 16;
  pass(narrow ? context_down_kernel<T, 16> : context_down_kernel<T, 32>, plan.down);
  if (p.gate_sums || p.ctx_all.data) {
    const int64_t quads = (arguments.last_image - first_image) * g.T * ((g.W + 3) / 4);
    const int64_t blocks = (quads + GATES_BLOCK - 1) / GATES_BLOCK * plan.gates.parts;
    launch(context_gates_kernel<T>, std::min<int64_t>(blocks, 1 << 20), GATES_BLOCK, 0, stream, arguments);
  }
  if (!p.grad_ctx.data && !p.weight_sums) return;
  arguments.p.chain = reversed(p.chain);
  pass(narrow ? context_up_kernel<T, 16> : context_up_kernel<T, 32>, plan.up);
  arguments.p.chain = p.chain;
  if (p.weight_sums) pass(narrow ? context_weights_kernel<T, 16> : context_weights_kernel<T, 32>, plan.weights);
}

}  // namespace

void run_context_bwd(const ContextBackward& p, const PassesPlan& plan, void* stream) {
  const int64_t all = plan.down.schedule.runs;
  for (int64_t first = 0; first < all; first += plan.workspace.runs) {
    const int64_t runs = std::min(plan.workspace.runs, all - first);
    if (p.chain.dtype == DType::bf16)
      run_chunk<__nv_bfloat16>(p, plan, first, runs, stream);
    else
      run_chunk<__half>(p, plan, first, runs, stream);
  }
}

}  // namespace focalnet::cuda

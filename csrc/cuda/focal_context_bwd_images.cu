// focal_context, backward, of whole images in shared memory. The forward writes again what enters each level; then a
// launch per level, the last one first, finds z anew and follows its gradient down.
// ops/focal_context/README.md derives the gradients.
#include "cuda/images.h"

namespace focalnet::cuda {

namespace {

constexpr int CHANNELS = 8, AT_ONCE = 2, AREA = 128;
using Block = ImagesBlock<CHANNELS>;

// A level: dz = (gate G + e) GELU'(z), where e comes from the level above, or for the last one from the mean.
struct LevelBackward {
  Chain chain;
  ImagesLayout layout;
  Vectors vectors;
  int level, all_taps, first_tap;  // taps of all levels, and where this one's begin
  int64_t first_run;               // of all chunks' runs
  int64_t B, first_image;          // of the call, and where the chain's images begin in it
  MapView grad_out, from, up;      // from: what enters the level; up: e, of all levels but the last
  Vector bias;                     // of what enters
  MapView down;                    // the gradient of `from`, which it may lie over, or nothing
  const float* mean;               // (B, C)
  float* gate_sums;                // see ContextBackward
  float* weight_sums;

  // the partial sums of a gate's gradient, of an image of the block's
  __device__ float* gate_sum(const Block& block, int image, int gate) const {
    const int64_t whole = int64_t(block.tile) * B + first_image + block.first_image + image;
    return gate_sums + (whole * (chain.L + 1) + gate) * chain.g.pixels();
  }
};

// Where things lie in shared memory.
template <class T>
struct Shared {
  T *from, *grads;   // planes of channels: what enters; what reaches z, then dz
  T *gates, *level;  // of the last level, without zeros around: its gate and the mean's; what leaves it
  T* taps;
  Place *rows, *pixels;
  float* sums;           // [rows of units][CHANNELS], where `level` comes later
  float *global, *mean;  // [images][CHANNELS]: GELU of the mean; what the mean receives, zeros beyond the images
  float* biases;         // of what enters
  float* area;           // [warps][AREA]
  int plane, tight_plane, taps_stride;
  __device__ Shared(const ImagesLayout& layout, int k)
      : plane(layout.plane), tight_plane(layout.tight_plane), taps_stride(k * TAPS_ROW) {
    from = shared_memory<T>();
    grads = from + CHANNELS * plane;
    gates = grads + CHANNELS * plane;
    level = gates + 2 * tight_plane;
    sums = reinterpret_cast<float*>(level);
    taps = level + CHANNELS * tight_plane;
    rows = reinterpret_cast<Place*>(taps + CHANNELS * taps_stride);
    pixels = rows + layout.row_places();
    global = reinterpret_cast<float*>(rows + layout.all_places());
    mean = global + CHANNELS * layout.images;
    biases = mean + CHANNELS * (layout.images + EIGHT);
    area = biases + CHANNELS;
  }
  // What images that are not there would be: nothing, which adds nothing.
  __device__ void clear() const { fill_zeros(from, 2 * CHANNELS * plane + 2 * tight_plane); }
};

int64_t bytes_of(const Chain& chain, const ImagesLayout& layout) {
  const int64_t taps = CHANNELS * (2 * reach_of(chain) + 1) * TAPS_ROW;
  const int64_t halves = 2 * CHANNELS * layout.plane + (CHANNELS + 2) * layout.tight_plane + taps;
  return 2 * halves + layout.all_places() * sizeof(Place) +
         4 * CHANNELS * (2 * layout.images + EIGHT + 1 + layout.warps * AREA);
}

// Partial sums of a gate's gradient, of N pixels.
template <int N, int GROUP>
__device__ void store_sums(const LevelBackward& p, const Block& block, const PixelsAt<N, GROUP>& at, int gate,
                           const float (&from)[N]) {
  const int pixels = int(p.chain.g.pixels());
#pragma unroll
  for (int j = 0; j < N / GROUP; ++j) {
    float* const to = p.gate_sum(block, at.places[j].image(), gate) + at.pixel(j, pixels);
    if constexpr (GROUP == 4)
      *reinterpret_cast<float4*>(to) = float4{from[0], from[1], from[2], from[3]};
    else if constexpr (GROUP == 2)
      *reinterpret_cast<float2*>(to) = float2{from[2 * j], from[2 * j + 1]};
    else
      *to = from[j];
  }
}

// What enters the level and what reaches z through gates and from above, into planes; the gradients of the gate of what
// enters, and in the last level of the mean's.
template <class T, int N, int GROUP, bool LAST>
__device__ void load_images(const LevelBackward& p, const Shared<T>& shared, const Block& block) {
  const Chain& chain = p.chain;
  const int L = chain.L, l = p.level;
  const T *const from = block.in<const T>(p.from, block.channel), *const grads =
                                                                      block.in<const T>(p.grad_out, block.channel);
  const T *const up = LAST ? nullptr : block.in<const T>(p.up, block.channel), *const gates =
                                                                                   block.in<const T>(chain.gates, 0);
  const float gate_bias = of_vector<T>(chain.gates_bias, l), last_bias = of_vector<T>(chain.gates_bias, L);
  each_access(chain.g, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    const T *const from_here = at.in(from, p.from), *const grads_here = at.in(grads, p.grad_out);
    const T *const up_here = LAST ? nullptr : at.in(up, p.up), *const gates_here = at.in(gates, chain.gates);
    Pixels<T, N> gate = load_pixels<T, N>(gates_here + l * chain.gates.c), last_gate;
    if (LAST) last_gate = load_pixels<T, N>(gates_here + L * chain.gates.c);
    if (chain.gates_bias.data) {
      gate.set([&](int j) { return gate[j] + gate_bias; });
      if (LAST) last_gate.set([&](int j) { return last_gate[j] + last_bias; });
    }
    float of_entering[N] = {}, of_mean[N] = {};
#pragma unroll 1  // registers do not suffice for all channels at once
    for (int first = 0; first < CHANNELS; first += AT_ONCE) {
      Pixels<T, N> entering[AT_ONCE], gradient[AT_ONCE], above[AT_ONCE];
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int c = first + i;
        entering[i] = load_pixels<T, N>(from_here + c * p.from.c);
        gradient[i] = load_pixels<T, N>(grads_here + c * p.grad_out.c);
        if (!LAST) above[i] = load_pixels<T, N>(up_here + c * p.up.c);
      }
#pragma unroll
      for (int i = 0; i < AT_ONCE; ++i) {
        const int c = first + i;
        if (p.bias.data) entering[i].set([&](int j) { return entering[i][j] + shared.biases[c]; });
        at.store(shared.from + c * shared.plane, entering[i]);
#pragma unroll
        for (int j = 0; j < N; ++j) {
          of_entering[j] += gradient[i][j] * entering[i][j];
          if (LAST) of_mean[j] += gradient[i][j] * shared.global[at.places[j / GROUP].image() * CHANNELS + c];
        }
        if (!LAST) above[i].set([&](int j) { return gate[j] * chain.scale * gradient[i][j] + above[i][j]; });
        at.store(shared.grads + c * shared.plane, LAST ? gradient[i] : above[i]);
      }
    }
    if (LAST) {
      at.store_tight(shared.gates, gate);
      at.store_tight(shared.gates + shared.tight_plane, last_gate);
    }
    if (!p.gate_sums) return;
#pragma unroll
    for (int j = 0; j < N; ++j) of_entering[j] *= chain.scale, of_mean[j] *= chain.scale;
    if (l > 0) store_sums(p, block, at, l - 1, of_entering);
    if (LAST) store_sums(p, block, at, L, of_mean);
  });
}

// What reaches every pixel of the last level through the mean, [images][CHANNELS].
template <class T, int PITCH, bool WHOLE>
__device__ void mean_gradient(const LevelBackward& p, const Shared<T>& shared, const Block& block) {
  const Geometry& g = p.chain.g;
  const T* const grads = shared.grads + block.channel_here * shared.plane;
  const T* const gates = shared.gates + shared.tight_plane + Step<PITCH, WHOLE>::column();
  block.each_step(p.layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.rows, p.layout, first, int(g.W));
    float values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint32_t grad = load_word(step.pixels(u, grads)), gate = load_word(gates + 2 * step.row(u).pair());
      float products[2] = {unpack<T>(grad, 0) * unpack<T>(gate, 0), unpack<T>(grad, 1) * unpack<T>(gate, 1)};
      step.mask(u, products);
      values[u] = products[0] + products[1];
    }
    sum_rows<CHANNELS>(step, values, shared.sums + first * EIGHT * CHANNELS + block.channel_here);
  });
  __syncthreads();
  each_sum<CHANNELS>(g, p.layout, block.images, shared.sums, [&](int channel, int image, float sum) {
    const float mean = p.mean[(block.first_image + image) * g.C + block.channel + channel];
    shared.mean[image * CHANNELS + channel] = sum * p.chain.scale / float(g.pixels()) * gelu_slope<float>(mean);
  });
  __syncthreads();
}

// dz over what reaches z, and the level's taps' gradients as products over pixels: what enters, transposed, times dz
// gives a matrix (16 columns of the window) x (8 columns) whose diagonals add up to a kernel row's taps.
template <class T, int PITCH, bool WHOLE, int K, bool LAST>
__device__ void level_gradient(const LevelBackward& p, const Shared<T>& shared, const Block& block,
                               float (&products)[K][4]) {
  const int c = block.channel_here;
  const T* const from = shared.from + c * shared.plane;
  T* const grads = shared.grads + c * shared.plane;
  uint2 bands[K];
  load_bands<K, false>(shared.taps + c * shared.taps_stride, bands);
  block.each_step(p.layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.rows, p.layout, first, int(p.chain.g.W));
    float z[2][4] = {};
    convolve_tiles<T>(from, step, bands, z);
    uint32_t dz[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const Place row = step.row(u);
      const Gelu gelu[2] = {gelu_and_slope<T>(z[u / 2][u % 2 * 2]), gelu_and_slope<T>(z[u / 2][u % 2 * 2 + 1])};
      const uint32_t grad = load_word(step.pixels(u, grads));
      float above[2] = {unpack<T>(grad, 0), unpack<T>(grad, 1)};
      if constexpr (LAST) {
        const int tight = 2 * row.pair() + step.column();
        const uint32_t gate = load_word(shared.gates + tight);
        const float mean = shared.mean[row.image() * CHANNELS + c];
#pragma unroll
        for (int i = 0; i < 2; ++i) above[i] = above[i] * unpack<T>(gate, i) * p.chain.scale + mean;
        if (step.is_there(u) && step.inside(u, 0))
          store_word(shared.level + c * shared.tight_plane + tight, pack<T>(gelu[0].value, gelu[1].value));
      }
#pragma unroll
      for (int i = 0; i < 2; ++i) above[i] *= gelu[i].slope;
      step.mask(u, above);
      dz[u] = step.is_there(u) ? pack<T>(above[0], above[1]) : 0;
      T* const here = step.pixels(u, grads);
      if (step.is_there(u)) store_word(here, dz[u]);
    }
    if (!p.weight_sums) return;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint2 b{transpose(dz[2 * t]), transpose(dz[2 * t + 1])};
      const T* const window = step.template window<true>(t, from - K / 2 * PITCH);
      each_row<K>([&](auto row) {
        uint32_t a[4];
        load_transposed<2 * row * PITCH>(a, window);
        multiply_add<T>(products[row], a, b);
      });
    }
  });
}

// Adds to a warp's part of its channel's taps' gradients, or begins it. `area`: AREA floats of its own.
template <int K>
__device__ void store_taps(const float (&products)[K][4], float* area, bool begin, float* to) {
  const int lane = threadIdx.x % 32, at = lane / 4 * EIGHT + lane % 4 * 2;
  const int tap = lane % 16, first = lane / 16 * (EIGHT / 2);  // two lanes share a diagonal
#pragma unroll
  for (int row = 0; row < K; ++row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) area[at + i / 2 * 64 + i % 2] = products[row][i];
    __syncwarp();
    float sum = 0;
    if (tap < K)
#pragma unroll
      for (int j = 0; j < EIGHT / 2; ++j) sum += area[(first + j + tap + BORDER - K / 2) * EIGHT + first + j];
    sum += __shfl_xor_sync(0xffffffffu, sum, 16);
    if (lane < K) to[row * K + lane] = begin ? sum : to[row * K + lane] + sum;
    __syncwarp();
  }
}

// The transposed convolution of dz, into the plane of what enters.
template <class T, int PITCH, bool WHOLE, int K>
__device__ void convolve_back(const LevelBackward& p, const Shared<T>& shared, const Block& block) {
  const int c = block.channel_here;
  uint2 bands[K];
  load_bands<K, true>(shared.taps + c * shared.taps_stride, bands);
  block.each_step(p.layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.rows, p.layout, first, int(p.chain.g.W));
    float acc[2][4] = {};
    convolve_tiles<T>(shared.grads + c * shared.plane, step, bands, acc);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      float pair[2] = {acc[u / 2][u % 2 * 2], acc[u / 2][u % 2 * 2 + 1]};
      step.mask(u, pair);
      step.store(shared.from + c * shared.plane, u, pair[0], pair[1]);
    }
  });
}

// Out of the planes: the gradient of what enters, and that of the last level's gate.
template <class T, int N, int GROUP>
__device__ void store_images(const LevelBackward& p, const Shared<T>& shared, const Block& block, bool of_last) {
  const MapView& to = p.down.data ? p.down : p.from;
  T* const down = block.in<T>(to, block.channel);
  const T* const grads = block.in<const T>(p.grad_out, block.channel);
  each_access(p.chain.g, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    const T* const grads_here = at.in(grads, p.grad_out);
    T* const down_here = at.in(down, to);
    Pixels<T, N> gradient[CHANNELS] = {};  // or compilers keep what it was
    if (of_last)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c) gradient[c] = load_pixels<T, N>(grads_here + c * p.grad_out.c);
    if (p.down.data)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        store_pixels(down_here + c * p.down.c, at.load(shared.from + c * shared.plane));
    if (!of_last) return;
    float sums[N] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const Pixels<T, N> level = at.load_tight(shared.level + c * shared.tight_plane);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += gradient[c][j] * level[j] * p.chain.scale;
    }
    store_sums(p, block, at, p.level, sums);
  });
}

template <class T, int PITCH, bool WHOLE>
__global__ void __launch_bounds__(2 * 32 * CHANNELS, 1) images_level_bwd_kernel(LevelBackward p) {
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const ImagesLayout& layout = p.layout;
  const Level& size = chain.levels[p.level].size;
  const Shared<T> shared(layout, int(size.kw));
  const int runs = int(layout.runs), items = int(layout.image_blocks);
  const bool last = p.level + 1 == chain.L;

  shared.clear();
  fill_zeros(shared.taps, CHANNELS * shared.taps_stride);
  list_places(g, layout, shared.rows, shared.pixels);
  for (int i = threadIdx.x; i < CHANNELS * (layout.images + EIGHT); i += blockDim.x) shared.mean[i] = 0;
  const int channel = Block(layout, 0, g).channel;
  for (int i = threadIdx.x; i < CHANNELS; i += blockDim.x) shared.biases[i] = of_vector<T>(p.bias, channel + i);
  __syncthreads();
  load_taps<CHANNELS>(chain.levels[p.level], channel, shared.taps, shared.taps_stride);
  const int run = int(blockIdx.x) / int(layout.channel_tiles);
  for (int item = run; item < items; item += runs) {
    const Block block(layout, item, g);
    if (block.images != layout.images) {  // the last ones
      __syncthreads();
      shared.clear();
      for (int i = threadIdx.x; i < CHANNELS * layout.images; i += blockDim.x) shared.mean[i] = 0;
    }
    for (int i = threadIdx.x; i < CHANNELS * block.images && last; i += blockDim.x)
      shared.global[i] = gelu<float>(p.mean[(block.first_image + i / CHANNELS) * g.C + block.channel + i % CHANNELS]);
    __syncthreads();
    with_vectors(p.vectors, layout, [&](auto n, auto group) {
      if (last)
        load_images<T, n, group, true>(p, shared, block);
      else
        load_images<T, n, group, false>(p, shared, block);
    });
    __syncthreads();
    if (last) mean_gradient<T, PITCH, WHOLE>(p, shared, block);
    with_size(size, [&](auto K) {
      float products[K][4] = {};
      if (last)
        level_gradient<T, PITCH, WHOLE, K, true>(p, shared, block, products);
      else
        level_gradient<T, PITCH, WHOLE, K, false>(p, shared, block, products);
      if (p.weight_sums) {
        const int64_t part = (p.first_run + run) * layout.warps + block.part;
        store_taps<K>(
            products, shared.area + threadIdx.x / 32 * AREA, item == run,
            p.weight_sums + (part * g.C + block.channel + block.channel_here) * int64_t(p.all_taps) + p.first_tap);
      }
      __syncthreads();  // nothing reads what enters the level any more
      if (p.down.data) convolve_back<T, PITCH, WHOLE, K>(p, shared, block);
    });
    __syncthreads();
    const bool of_last = last && p.gate_sums;
    if (p.down.data || of_last)
      with_vectors(p.vectors, layout,
                   [&](auto n, auto group) { store_images<T, n, group>(p, shared, block, of_last); });
    // the next images come after a barrier
  }
}

void launch_level(const LevelBackward& p, void* stream) {
  const auto run = [&](auto zero) {
    with_layout(p.chain.g, p.layout, [&](auto pitch, auto whole) {
      launch(images_level_bwd_kernel<decltype(zero), pitch, whole>, p.layout.runs * p.layout.channel_tiles,
             p.layout.threads(), bytes_of(p.chain, p.layout), stream, p);
    });
  };
  p.chain.dtype == DType::bf16 ? run(__nv_bfloat16()) : run(__half());
}

MapView images_from(MapView v, int64_t first) {
  if (v.data) v.data = static_cast<char*>(v.data) + first * v.b * 2;
  return v;
}

}  // namespace

std::optional<ImagesBackwardPlan> plan_images_bwd(const ContextBackward& p) {
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const auto forward = images_fwd_layout(chain);
  const auto bytes = [&](const ImagesLayout& l) { return bytes_of(chain, l); };
  ImagesBackwardPlan plan{};
  if (!forward || !lay_out(g, reach_of(chain), CHANNELS, bytes, plan.levels)) return std::nullopt;
  const auto vectors =
      vectors_of(g, {forward->images, plan.levels.images}, {chain.ctx, chain.gates, p.grad_out, p.grad_ctx, p.ctx_all});
  if (!vectors) return std::nullopt;
  plan.forward = *forward, plan.vectors = *vectors;
  plan.B = g.B;
  const int64_t image = g.pixels() * g.C;
  const int64_t at_once = current_device().scratch / 4 / (2 * std::max(1, chain.L - 1) * image);
  plan.images = at_once >= g.B ? g.B : std::max<int64_t>(1, at_once / plan.levels.images) * plan.levels.images;
  plan.channel = vectors->one_run ? (plan.images * g.pixels() + EIGHT - 1) / EIGHT * EIGHT : g.pixels();
  plan.map = vectors->one_run ? g.C * plan.channel : plan.images * image;
  plan.bytes = 2 * (chain.L - 1) * plan.map;
  for (int64_t first = 0; first < g.B; first += plan.images)
    plan.runs += plan.levels.of(std::min(plan.images, g.B - first)).runs;
  return plan;
}

void run_context_bwd(const ContextBackward& whole, const ImagesBackwardPlan& plan, void* stream) {
  int64_t runs = 0;
  for (int64_t first = 0; first < plan.B; first += plan.images) {
    Chain chain = whole.chain;
    Geometry& g = chain.g;
    g.B = std::min(plan.images, plan.B - first);
    chain.ctx = images_from(chain.ctx, first), chain.gates = images_from(chain.gates, first);
    ImagesForward again{chain, plan.forward.of(g.B), plan.vectors, images_from(whole.ctx_all, first)};
    for (int l = 0; l + 1 < chain.L; ++l)
      again.levels[l] = {static_cast<char*>(whole.scratch) + 2 * l * plan.map,
                         plan.vectors.one_run ? g.pixels() : g.C * g.pixels(),
                         plan.channel,
                         g.W,
                         0,
                         1};
    if (chain.L > 1 || again.out.data) run_images_fwd(again, stream);

    LevelBackward p{chain, plan.levels.of(g.B), plan.vectors};
    for (int l = 0; l < chain.L; ++l) p.all_taps += int(chain.levels[l].size.taps());
    p.first_tap = p.all_taps;
    p.B = plan.B, p.first_image = first, p.first_run = runs;
    runs += p.layout.runs;
    p.grad_out = images_from(whole.grad_out, first);
    p.mean = whole.mean + first * g.C, p.gate_sums = whole.gate_sums, p.weight_sums = whole.weight_sums;
    const bool all_the_way = whole.grad_ctx.data || whole.weight_sums;
    for (int l = chain.L - 1; l >= 0; --l) {
      p.level = l, p.first_tap -= int(chain.levels[l].size.taps());
      p.up = p.down;
      p.from = l > 0 ? again.levels[l - 1] : chain.ctx;
      p.bias = l > 0 ? Vector{} : chain.ctx_bias;
      p.down = l > 0 ? p.from : images_from(whole.grad_ctx, first);
      if (all_the_way || (whole.gate_sums && (l > 0 || chain.L == 1))) launch_level(p, stream);
    }
  }
}

}  // namespace focalnet::cuda

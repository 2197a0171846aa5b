// focal_context, backward, of whole images in shared memory. The forward writes again what enters each level; then a
// launch per level, the last one first, finds z anew and follows its gradient down.
// ops/focal_context/README.md derives the gradients.
#include "cuda/images.h"

namespace focalnet::cuda {

namespace {

constexpr int CHANNELS = 8, AREA = 128, STEP_BEYOND = 3;
using Block = ImagesBlock<CHANNELS>;

// A level: dz = (gate G + e) GELU'(z), where e comes from the level above, or for the last one from the mean.
struct LevelBackward {
  Chain chain;
  ImagesLayout layout;
  Vectors vectors;
  Divisor units;                   // of an image
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
  T *from, *grads, *taps;  // planes of channels: what enters; what reaches z, then dz
  T *level, *gates;        // of the last level: what leaves it, its gate and the mean's, without zeros around
  Unit* units;
  // [units][CHANNELS]; [images][CHANNELS]: GELU of the mean; what the mean receives, with room for the units that the
  // last step has beyond the last image, which read it in vain
  float *sums, *global, *mean;
  float* area;  // [warps][AREA]
  int plane, tight_plane, taps_stride;
  __device__ Shared(const ImagesLayout& layout, int k)
      : plane(layout.plane), tight_plane(layout.tight_plane), taps_stride(k * TAPS_ROW) {
    from = shared_memory<T>();
    grads = from + CHANNELS * plane;
    taps = grads + CHANNELS * plane;
    units = reinterpret_cast<Unit*>(taps + CHANNELS * taps_stride);
    sums = reinterpret_cast<float*>(units + layout.units() + 4);
    global = sums + CHANNELS * (layout.units() + 4);
    mean = global + CHANNELS * layout.images;
    area = mean + CHANNELS * (layout.images + STEP_BEYOND);
    level = reinterpret_cast<T*>(area + CHANNELS * layout.warps * AREA);
    gates = level + CHANNELS * tight_plane;
  }
};

int64_t bytes_of(const Chain& chain, const ImagesLayout& layout) {
  const int64_t taps = CHANNELS * (2 * reach_of(chain) + 1) * TAPS_ROW;
  const int64_t halves = 2 * CHANNELS * layout.plane + (CHANNELS + 2) * layout.tight_plane + taps;
  return 2 * halves + (layout.units() + 4) * (sizeof(Unit) + 4 * CHANNELS) +
         4 * CHANNELS * (2 * layout.images + STEP_BEYOND + layout.warps * AREA);
}

template <int N>
__device__ void store_floats(float* to, const float (&from)[N]) {  // as one access
  if constexpr (N == 4)
    *reinterpret_cast<float4*>(to) = float4{from[0], from[1], from[2], from[3]};
  else if constexpr (N == 2)
    *reinterpret_cast<float2*>(to) = float2{from[0], from[1]};
  else
    *to = from[0];
}

// What enters the level and what reaches z through gates and from above, into planes; the gradients of the gate of what
// enters, and in the last level of the mean's.
template <class T, int PITCH, int N, bool LAST>
__device__ void load_images(const LevelBackward& p, const Shared<T>& shared, const Block& block) {
  const Chain& chain = p.chain;
  const int L = chain.L, l = p.level;
  const int64_t pixels = chain.g.pixels();
  const T *const from = block.in<const T>(p.from, block.channel), *const grads =
                                                                      block.in<const T>(p.grad_out, block.channel);
  const T *const up = LAST ? nullptr : block.in<const T>(p.up, block.channel), *const gates =
                                                                                   block.in<const T>(chain.gates, 0);
  const float gate_bias = of_vector<T>(chain.gates_bias, l), last_bias = of_vector<T>(chain.gates_bias, L);
  for (int i = threadIdx.x; i < block.images * int(p.vectors.per_image.divisor); i += blockDim.x) {
    const PixelsAt at = PixelsAt::of<PITCH, N>(i, chain.g, p.layout, p.vectors);
    Pixels<T, N> entering[CHANNELS], gradient[CHANNELS], above[CHANNELS], last_gate;
    Pixels<T, N> gate = load_pixels<T, N>(gates + at.image * chain.gates.b + l * chain.gates.c + at.pixel);
    if (LAST) last_gate = load_pixels<T, N>(gates + at.image * chain.gates.b + L * chain.gates.c + at.pixel);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      entering[c] = load_pixels<T, N>(from + at.image * p.from.b + c * p.from.c + at.pixel);
      gradient[c] = load_pixels<T, N>(grads + at.image * p.grad_out.b + c * p.grad_out.c + at.pixel);
      if (!LAST) above[c] = load_pixels<T, N>(up + at.image * p.up.b + c * p.up.c + at.pixel);
    }
    if (chain.gates_bias.data) {
      gate.set([&](int j) { return gate[j] + gate_bias; });
      if (LAST) last_gate.set([&](int j) { return last_gate[j] + last_bias; });
    }
    float of_entering[N] = {}, of_mean[N] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (p.bias.data) {
        const float bias = of_vector<T>(p.bias, block.channel + c);
        entering[c].set([&](int j) { return entering[c][j] + bias; });
      }
      store_pixels(shared.from + c * shared.plane + at.padded, entering[c]);
      const float global = LAST ? shared.global[at.image * CHANNELS + c] : 0.0f;
#pragma unroll
      for (int j = 0; j < N; ++j) {
        of_entering[j] += gradient[c][j] * entering[c][j];
        if (LAST) of_mean[j] += gradient[c][j] * global;
      }
      if (!LAST) above[c].set([&](int j) { return gate[j] * chain.scale * gradient[c][j] + above[c][j]; });
      store_pixels(shared.grads + c * shared.plane + at.padded, LAST ? gradient[c] : above[c]);
    }
    if (LAST) {
      store_pixels(shared.gates + at.tight, gate);
      store_pixels(shared.gates + shared.tight_plane + at.tight, last_gate);
    }
    if (!p.gate_sums) continue;
#pragma unroll
    for (int j = 0; j < N; ++j) of_entering[j] *= chain.scale, of_mean[j] *= chain.scale;
    float* const sums = p.gate_sum(block, at.image, 0) + at.pixel;
    if (l > 0) store_floats(sums + (l - 1) * pixels, of_entering);
    if (LAST) store_floats(sums + L * pixels, of_mean);
  }
}

// What reaches every pixel of the last level through the mean, [images][CHANNELS].
template <class T, int PITCH, bool WHOLE>
__device__ void mean_gradient(const LevelBackward& p, const Shared<T>& shared, const Block& block) {
  const T *const grads = shared.grads + block.channel_here * shared.plane, *const gates =
                                                                               shared.gates + shared.tight_plane;
  block.each_step(p.layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.units + first);
    float values[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const LanePixels at = step.pixels(u / 2, p.layout.tight_pitch);
      const int h = u % 2;
      const uint32_t grad = load_word(grads + at.padded[h]) & at.keep[h], gate = load_word(gates + at.tight[h]);
      values[u] = at.inside[h] ? unpack<T>(grad, 0) * unpack<T>(gate, 0) : 0.0f;
      values[u] += WHOLE || at.keep[h] >> 16 ? unpack<T>(grad, 1) * unpack<T>(gate, 1) : 0.0f;
    }
    const float sum = sum_units(values);
    if (threadIdx.x % EIGHT == 0)
      shared.sums[(first + int(threadIdx.x) % 32 / EIGHT) * CHANNELS + block.channel_here] = sum;
  });
  __syncthreads();
  const Geometry& g = p.chain.g;
  const int per_image = p.layout.groups * p.layout.segments;
  for (int i = threadIdx.x; i < CHANNELS * block.images; i += blockDim.x) {
    const int channel = i % CHANNELS, image = i / CHANNELS;
    float sum = 0;
    for (int u = 0; u < per_image; ++u) sum += shared.sums[(image * per_image + u) * CHANNELS + channel];
    const float mean = p.mean[(block.first_image + image) * g.C + block.channel + channel];
    shared.mean[i] = sum * p.chain.scale / float(g.pixels()) * gelu_slope<float>(mean);
  }
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
    const Step<PITCH, WHOLE> step(shared.units + first);
    float z[2][4] = {};
    convolve_tiles<T>(from, step, bands, z);
    uint32_t dz[4];
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const LanePixels at = step.pixels(u / 2, p.layout.tight_pitch);
      const int h = u % 2;
      const float* const pair = z[u / 2] + 2 * h;
      const Gelu low = gelu_and_slope<T>(pair[0]), high = gelu_and_slope<T>(pair[1]);
      const uint32_t grad = at.load(grads, h);
      float above[2] = {unpack<T>(grad, 0), unpack<T>(grad, 1)};
      if constexpr (LAST) {
        const uint32_t gate = load_word(shared.gates + at.tight[h]);
        const float mean = shared.mean[p.units.divide(first + u) * CHANNELS + c];
#pragma unroll
        for (int i = 0; i < 2; ++i) above[i] = above[i] * unpack<T>(gate, i) * p.chain.scale + mean;
        if (at.inside[h])
          store_word(shared.level + c * shared.tight_plane + at.tight[h], pack<T>(low.value, high.value));
      }
      dz[u] = pack<T>(above[0] * low.slope, above[1] * high.slope) & at.keep[h];
      at.store(grads, h, dz[u]);
    }
    if (!p.weight_sums) return;
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      const uint2 b{transpose(dz[2 * t]), transpose(dz[2 * t + 1])};
      const T* const window = from + step.template window<true>(t) - K / 2 * PITCH;
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
#pragma unroll
  for (int row = 0; row < K; ++row) {
#pragma unroll
    for (int i = 0; i < 4; ++i) area[at + i / 2 * 64 + i % 2] = products[row][i];
    __syncwarp();
    if (lane < K) {
      float sum = 0;
#pragma unroll
      for (int j = 0; j < EIGHT; ++j) sum += area[(j + lane + BORDER - K / 2) * EIGHT + j];
      to[row * K + lane] = begin ? sum : to[row * K + lane] + sum;
    }
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
    const Step<PITCH, WHOLE> step(shared.units + first);
    float acc[2][4] = {};
    convolve_tiles<T>(shared.grads + c * shared.plane, step, bands, acc);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float* const pair = acc[u / 2] + u % 2 * 2;
      step.pixels(u / 2, 0).store(shared.from + c * shared.plane, u % 2, pack<T>(pair[0], pair[1]));
    }
  });
}

// Out of the planes: the gradient of what enters, and that of the last level's gate.
template <class T, int PITCH, int N>
__device__ void store_images(const LevelBackward& p, const Shared<T>& shared, const Block& block, bool of_last) {
  T* const down = block.in<T>(p.down.data ? p.down : p.from, block.channel);
  const T* const grads = block.in<const T>(p.grad_out, block.channel);
  for (int i = threadIdx.x; i < block.images * int(p.vectors.per_image.divisor); i += blockDim.x) {
    const PixelsAt at = PixelsAt::of<PITCH, N>(i, p.chain.g, p.layout, p.vectors);
    Pixels<T, N> gradient[CHANNELS] = {};  // or compilers keep what it was
    if (of_last)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        gradient[c] = load_pixels<T, N>(grads + at.image * p.grad_out.b + c * p.grad_out.c + at.pixel);
    if (p.down.data)
#pragma unroll
      for (int c = 0; c < CHANNELS; ++c)
        store_pixels(down + at.image * p.down.b + c * p.down.c + at.pixel,
                     load_pixels<T, N>(shared.from + c * shared.plane + at.padded));
    if (!of_last) continue;
    float sums[N] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      const Pixels<T, N> level = load_pixels<T, N>(shared.level + c * shared.tight_plane + at.tight);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += gradient[c][j] * level[j] * p.chain.scale;
    }
    store_floats(p.gate_sum(block, at.image, p.level) + at.pixel, sums);
  }
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

  fill_zeros(shared.from, 2 * CHANNELS * shared.plane);
  fill_zeros(shared.taps, CHANNELS * shared.taps_stride);
  list_units(g, layout, layout.images, shared.units);
  __syncthreads();
  load_taps<CHANNELS>(chain.levels[p.level], Block(layout, 0, g).channel, shared.taps, shared.taps_stride);
  for (int item = int(blockIdx.x) / int(layout.channel_tiles); item < items; item += runs) {
    const Block block(layout, item, g);
    if (block.images != layout.images) list_units(g, layout, block.images, shared.units);  // the last ones
    for (int i = threadIdx.x; i < CHANNELS * block.images && last; i += blockDim.x)
      shared.global[i] = gelu<float>(p.mean[(block.first_image + i / CHANNELS) * g.C + block.channel + i % CHANNELS]);
    __syncthreads();
    with_pixels(p.vectors, [&](auto n) {
      if (last)
        load_images<T, PITCH, n, true>(p, shared, block);
      else
        load_images<T, PITCH, n, false>(p, shared, block);
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
        const int64_t part = (p.first_run + item % runs) * layout.warps + block.part;
        store_taps<K>(
            products, shared.area + threadIdx.x / 32 * AREA, item < runs,
            p.weight_sums + (part * g.C + block.channel + block.channel_here) * int64_t(p.all_taps) + p.first_tap);
      }
      __syncthreads();  // nothing reads what enters the level any more
      if (p.down.data) convolve_back<T, PITCH, WHOLE, K>(p, shared, block);
    });
    __syncthreads();
    with_pixels(p.vectors, [&](auto n) {
      const bool of_last = last && p.gate_sums;
      if (p.down.data || of_last) store_images<T, PITCH, n>(p, shared, block, of_last);
    });  // the next images come after a barrier
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
  const auto vectors = vectors_of(g, {chain.ctx, chain.gates, p.grad_out, p.grad_ctx, p.ctx_all});
  const auto bytes = [&](const ImagesLayout& l) { return bytes_of(chain, l); };
  ImagesBackwardPlan plan{};
  if (!forward || !vectors || !lay_out(g, reach_of(chain), CHANNELS, bytes, plan.levels)) return std::nullopt;
  plan.forward = *forward, plan.vectors = *vectors;
  plan.B = g.B;
  const int64_t image = g.pixels() * g.C;
  const int64_t at_once = current_device().scratch / 4 / (2 * std::max(1, chain.L - 1) * image);
  plan.images = at_once >= g.B ? g.B : std::max<int64_t>(1, at_once / plan.levels.images) * plan.levels.images;
  plan.map = plan.images * image;
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
      again.levels[l] = {static_cast<char*>(whole.scratch) + 2 * l * plan.map, g.C * g.pixels(), g.pixels(), g.W, 0, 1};
    if (chain.L > 1 || again.out.data) run_images_fwd(again, stream);

    LevelBackward p{chain, plan.levels.of(g.B), plan.vectors};
    p.units = Divisor(p.layout.groups * p.layout.segments);
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

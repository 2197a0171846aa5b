// focal_context, forward, of whole images in shared memory: all levels, the mean, and what gates make of them in one
// launch.
#include "cuda/images.h"

namespace focalnet::cuda {

namespace {

constexpr int CHANNELS = 4, MOST = 4;  // of a block; levels
using Block = ImagesBlock<CHANNELS>;

__host__ __device__ int kernel_rows(const Chain& chain) {
  int rows = 0;
  for (int l = 0; l < chain.L; ++l) rows += int(chain.levels[l].size.kt);
  return rows;
}

// Which of a channel's planes has what leaves level l - 1. What entered a level is not needed once it has left the
// next, but every level's result is, to the end.
__host__ __device__ constexpr int plane_of(int l) { return l < 3 ? l % 2 : l - 1; }
constexpr int planes_for(int L) { return L < 4 ? 2 : L - 1; }
// Which has what gates make of the levels: not the one that the last level reads around each pixel.
__host__ __device__ constexpr int sum_plane(int L) { return 1 - plane_of(L - 1) % 2; }

// Where things lie in shared memory.
template <class T>
struct Shared {
  T *planes, *gates, *taps;  // gates: planes without zeros
  Unit* units;
  float *sums, *global;  // [units][CHANNELS] of the last level; [images][CHANNELS]: GELU of its mean
  int plane, tight_plane, taps_stride;
  __device__ Shared(const Chain& chain, const ImagesLayout& layout)
      : plane(layout.plane), tight_plane(layout.tight_plane), taps_stride(kernel_rows(chain) * TAPS_ROW) {
    planes = shared_memory<T>();
    gates = planes + layout.planes * CHANNELS * plane;
    taps = gates + (chain.L + 1) * tight_plane;
    units = reinterpret_cast<Unit*>(taps + CHANNELS * taps_stride);
    sums = reinterpret_cast<float*>(units + layout.units() + 4);
    global = sums + CHANNELS * (layout.units() + 4);
  }
  __device__ T* at(int plane_index, int channel) const { return planes + (plane_index * CHANNELS + channel) * plane; }
};

int64_t bytes_of(const Chain& chain, const ImagesLayout& layout) {
  const int64_t taps = CHANNELS * kernel_rows(chain) * TAPS_ROW;
  const int64_t halves = layout.planes * CHANNELS * layout.plane + (chain.L + 1) * layout.tight_plane + taps;
  return 2 * halves + (layout.units() + 4) * (sizeof(Unit) + 4 * CHANNELS) + 4 * CHANNELS * layout.images;
}

// What enters the first level, and the gates, into planes; their biases are added where the product left them to us.
template <class T, int PITCH, int N>
__device__ void load_images(const ImagesForward& p, const Shared<T>& shared, const Block& block) {
  const Chain& chain = p.chain;
  const T* const ctx = block.in<const T>(chain.ctx, block.channel);
  const T* const gates = block.in<const T>(chain.gates, 0);
  float bias[CHANNELS], gate_bias[MOST + 1];
#pragma unroll
  for (int c = 0; c < CHANNELS; ++c) bias[c] = of_vector<T>(chain.ctx_bias, block.channel + c);
#pragma unroll
  for (int l = 0; l <= MOST; ++l) gate_bias[l] = l <= chain.L ? of_vector<T>(chain.gates_bias, l) : 0.0f;
  for (int i = threadIdx.x; i < block.images * int(p.vectors.per_image.divisor); i += blockDim.x) {
    const PixelsAt at = PixelsAt::of<PITCH, N>(i, chain.g, p.layout, p.vectors);
    Pixels<T, N> channels[CHANNELS], gate[MOST + 1];
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c)
      channels[c] = load_pixels<T, N>(ctx + at.image * chain.ctx.b + c * chain.ctx.c + at.pixel);
#pragma unroll
    for (int l = 0; l <= MOST; ++l)
      if (l <= chain.L) gate[l] = load_pixels<T, N>(gates + at.image * chain.gates.b + l * chain.gates.c + at.pixel);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (chain.ctx_bias.data) channels[c].set([&](int j) { return channels[c][j] + bias[c]; });
      store_pixels(shared.at(0, c) + at.padded, channels[c]);
    }
#pragma unroll
    for (int l = 0; l <= MOST; ++l) {
      if (l > chain.L) break;
      if (chain.gates_bias.data) gate[l].set([&](int j) { return gate[l][j] + gate_bias[l]; });
      store_pixels(shared.gates + l * shared.tight_plane + at.tight, gate[l]);
    }
  }
}

// A level of a warp's channel: GELU(conv), into the next level's plane.
template <class T, int PITCH, bool WHOLE, int K>
__device__ void run_level(const Shared<T>& shared, const ImagesLayout& layout, const Block& block, const T* taps,
                          const T* from, T* to) {
  uint2 bands[K];
  load_bands<K, false>(taps, bands);
  block.each_step(layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.units + first);
    float acc[2][4] = {};
    convolve_tiles<T>(from, step, bands, acc);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float* const pair = acc[u / 2] + u % 2 * 2;
      step.pixels(u / 2, 0).store(to, u % 2, pack<T>(gelu<T>(pair[0]), gelu<T>(pair[1])));
    }
  });
}

// Level L, the last: its sums over units, and what gates make of all levels, into the plane `to`.
template <class T, int PITCH, bool WHOLE, int K, int L>
__device__ void run_last_level(const Shared<T>& shared, float scale, const ImagesLayout& layout, const Block& block,
                               const T* taps, const T* from, T* to) {
  uint2 bands[K];
  load_bands<K, false>(taps, bands);
  block.each_step(layout, [&](int first) {
    const Step<PITCH, WHOLE> step(shared.units + first);
    float acc[2][4] = {}, sums[4];
    convolve_tiles<T>(from, step, bands, acc);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const LanePixels at = step.pixels(u / 2, layout.tight_pitch);
      const int h = u % 2;
      float* const pair = acc[u / 2] + 2 * h;
      const T* const gates = shared.gates + at.tight[h];
#pragma unroll
      for (int i = 0; i < 2; ++i) pair[i] = gelu<T>(pair[i]);
      sums[u] = at.inside[h] ? pair[0] + (WHOLE || at.keep[h] >> 16 ? pair[1] : 0.0f) : 0.0f;
      const uint32_t gate = load_word(gates + (L - 1) * shared.tight_plane);
#pragma unroll
      for (int i = 0; i < 2; ++i) pair[i] *= unpack<T>(gate, i);
#pragma unroll
      for (int l = 0; l < L - 1; ++l) {
        const uint32_t factor = load_word(gates + l * shared.tight_plane);
        const uint32_t level = at.load(shared.at(plane_of(l + 1), block.channel_here), h);
#pragma unroll
        for (int i = 0; i < 2; ++i) pair[i] += unpack<T>(factor, i) * unpack<T>(level, i);
      }
      at.store(to, h, pack<T>(pair[0] * scale, pair[1] * scale));
    }
    const float sum = sum_units(sums);
    if (threadIdx.x % EIGHT == 0)
      shared.sums[(first + int(threadIdx.x) % 32 / EIGHT) * CHANNELS + block.channel_here] = sum;
  });
}

// The planes of what leaves a level, or of the result, to which the mean's part is added.
template <class T, int PITCH, int N, bool RESULT>
__device__ void store_images(const ImagesForward& p, const Shared<T>& shared, const Block& block, const MapView& map,
                             int plane) {
  T* const out = block.in<T>(map, block.channel);
  const T* const gates = shared.gates + p.chain.L * shared.tight_plane;
  for (int i = threadIdx.x; i < block.images * int(p.vectors.per_image.divisor); i += blockDim.x) {
    const PixelsAt at = PixelsAt::of<PITCH, N>(i, p.chain.g, p.layout, p.vectors);
    Pixels<T, N> gate;
    if (RESULT) gate = load_pixels<T, N>(gates + at.tight);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      Pixels<T, N> pixels = load_pixels<T, N>(shared.at(plane, c) + at.padded);
      if constexpr (RESULT) {
        const float global = shared.global[at.image * CHANNELS + c];
        pixels.set([&](int j) { return pixels[j] + gate[j] * global; });
      }
      store_pixels(out + at.image * map.b + c * map.c + at.pixel, pixels);
    }
  }
}

template <class T, int PITCH, bool WHOLE>
__global__ void __launch_bounds__(256, 2) images_fwd_kernel(ImagesForward p) {
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const ImagesLayout& layout = p.layout;
  const Shared<T> shared(chain, layout);
  const int L = chain.L, per_image = layout.groups * layout.segments;

  fill_zeros(shared.planes, layout.planes * CHANNELS * shared.plane);
  fill_zeros(shared.taps, CHANNELS * shared.taps_stride);
  list_units(g, layout, layout.images, shared.units);
  __syncthreads();
  for (int l = 0, rows = 0; l < L; rows += int(chain.levels[l++].size.kt))
    load_taps<CHANNELS>(chain.levels[l], Block(layout, 0, g).channel, shared.taps + rows * TAPS_ROW,
                        shared.taps_stride);
  const int runs = int(layout.runs), items = int(layout.image_blocks);
  for (int item = int(blockIdx.x) / int(layout.channel_tiles); item < items; item += runs) {
    const Block block(layout, item, g);
    const int c = block.channel_here;
    with_pixels(p.vectors, [&](auto n) { load_images<T, PITCH, n>(p, shared, block); });
    __syncthreads();
    for (int l = 0, rows = 0; l < L; rows += int(chain.levels[l++].size.kt)) {
      const T* const taps = shared.taps + c * shared.taps_stride + rows * TAPS_ROW;
      const T* const from = shared.at(plane_of(l), c);
      with_size(chain.levels[l].size, [&](auto K) {
        if (l + 1 < L)
          run_level<T, PITCH, WHOLE, K>(shared, layout, block, taps, from, shared.at(plane_of(l + 1), c));
        else
          with_constant<1, 2, 3, 4>(L, [&](auto levels) {
            run_last_level<T, PITCH, WHOLE, K, levels>(shared, chain.scale, layout, block, taps, from,
                                                       shared.at(sum_plane(L), c));
          });
      });
      __syncthreads();
      if (l + 1 < L && p.levels[l].data)
        with_pixels(p.vectors,
                    [&](auto n) { store_images<T, PITCH, n, false>(p, shared, block, p.levels[l], plane_of(l + 1)); });
    }
    for (int i = threadIdx.x; i < CHANNELS * block.images; i += blockDim.x) {
      const int channel = i % CHANNELS, image = i / CHANNELS;
      float sum = 0;
      for (int u = 0; u < per_image; ++u) sum += shared.sums[(image * per_image + u) * CHANNELS + channel];
      const float mean = sum / float(g.pixels());
      if (p.mean) p.mean[(block.first_image + image) * g.C + block.channel + channel] = mean;
      shared.global[i] = gelu<float>(mean) * chain.scale;
    }
    __syncthreads();
    // no barrier after it: a thread has the same pixels when the next images are loaded
    if (p.out.data)
      with_pixels(p.vectors, [&](auto n) { store_images<T, PITCH, n, true>(p, shared, block, p.out, sum_plane(L)); });
  }
}

}  // namespace

std::optional<Vectors> vectors_of(const Geometry& g, std::initializer_list<MapView> maps) {
  const auto fits = [&](const MapView& v, int n) {
    const bool aligned = reinterpret_cast<uintptr_t>(v.data) % (2 * n) == 0;
    return !v.data || (v.w == 1 && (v.t == g.W || g.T == 1) && v.b % n == 0 && v.c % n == 0 && aligned);
  };
  for (int n : {4, 2, 1})
    if (g.W % n == 0 && std::all_of(maps.begin(), maps.end(), [&](const MapView& v) { return fits(v, n); }))
      return Vectors{n, Divisor(g.W / n), Divisor(g.pixels() / n)};
  return std::nullopt;
}

int reach_of(const Chain& chain) {
  int reach = 0;
  for (int l = 0; l < chain.L; ++l) reach = std::max(reach, int(chain.levels[l].size.rt()));
  return reach;
}

bool takes_images(const Chain& chain) {
  const Geometry& g = chain.g;
  const auto fits = [](const LevelWeights& level) {
    const Level& k = level.size;
    return k.kt == k.kw && k.km == 1 && k.kw >= 3 && k.kw <= 9;
  };
  return chain.dtype != DType::f32 && chain.L >= 1 && chain.L <= MOST && g.C % EIGHT == 0 && g.M == 1 &&
         g.W <= 7 * EIGHT && g.pixels() <= 49 * EIGHT * EIGHT &&
         std::all_of(chain.levels, chain.levels + chain.L, fits);
}

std::optional<ImagesLayout> images_fwd_layout(const Chain& chain) {
  ImagesLayout layout{};
  layout.planes = planes_for(chain.L);
  const auto bytes = [&](const ImagesLayout& l) { return bytes_of(chain, l); };
  if (!takes_images(chain) || !lay_out(chain.g, reach_of(chain), CHANNELS, bytes, layout)) return std::nullopt;
  return layout;
}

std::optional<ImagesPlan> plan_images_fwd(const ContextForward& p) {
  const auto layout = images_fwd_layout(p.chain);
  const auto vectors = vectors_of(p.chain.g, {p.chain.ctx, p.chain.gates, p.out});
  if (!layout || !vectors) return std::nullopt;
  return ImagesPlan{*layout, *vectors};
}

void run_images_fwd(const ImagesForward& p, void* stream) {
  const auto run = [&](auto zero) {
    with_layout(p.chain.g, p.layout, [&](auto pitch, auto whole) {
      launch(images_fwd_kernel<decltype(zero), pitch, whole>, p.layout.runs * p.layout.channel_tiles,
             p.layout.threads(), bytes_of(p.chain, p.layout), stream, p);
    });
  };
  p.chain.dtype == DType::bf16 ? run(__nv_bfloat16()) : run(__half());
}

void run_context_fwd(const ContextForward& p, const ImagesPlan& plan, void* stream) {
  const ImagesForward images{p.chain, plan.layout, plan.vectors, p.out, {}, p.mean};
  run_images_fwd(images, stream);
}

}  // namespace focalnet::cuda

// Maps of tokens: four neighbouring channels are one access, a thread's work is SEGMENT columns of them.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "cuda/device.h"

namespace focalnet::cuda {

constexpr int GROUPS = TILE / 4;  // of four channels, in a block; as many threads share a segment

// Four channels as they lie in memory, in whole words: taken apart only where they are used.
template <class T>
struct Channels {
  static constexpr int WORDS = sizeof(T);
  struct alignas(4 * WORDS) {
    unsigned words[WORDS];
  } raw;
};

template <class T>
__device__ Channels<T> load_channels(const T* p) {
  Channels<T> channels;
  channels.raw = *reinterpret_cast<const decltype(channels.raw)*>(p);
  return channels;
}
template <class T>
__device__ float channel_of(const Channels<T>& channels, int c) {
  if constexpr (sizeof(T) == 2) return unpack<T>(channels.raw.words[c / 2], c % 2);
  float value;
  memcpy(&value, &channels.raw.words[c % Channels<T>::WORDS], sizeof(value));
  return value;
}
template <class T>
__device__ void load_channels(const T* p, float (&to)[4]) {
  const Channels<T> channels = load_channels(p);
#pragma unroll
  for (int c = 0; c < 4; ++c) to[c] = channel_of<T>(channels, c);
}
template <class T>
__device__ void store_channels(T* p, const float (&from)[4]) {
  Quad<T> quad;
#pragma unroll
  for (int c = 0; c < 4; ++c) quad.values[c] = from_float<T>(from[c]);
  *reinterpret_cast<Quad<T>*>(p) = quad;
}

// Which of the N columns from `column` on are in the map, a bit each.
template <int N>
__device__ unsigned columns_inside(int column, int W) {
  const int first = column < 0 ? -column : 0, last = W - column < N ? W - column : N;  // last: the first outside again
  return last <= first ? 0u : (1u << last) - (1u << first);
}

// Four channels of N columns, `step` elements apart; zeros where the column is not inside.
template <int N, class T>
__device__ void load_columns(const T* at, int step, unsigned inside, Channels<T> (&to)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    to[j] = Channels<T>{};
    if (inside >> j & 1) to[j] = load_channels(at + int64_t(j) * step);
  }
}

// Segment i of an image: SEGMENT columns from w on.
struct SegmentAt {
  int t, m, w;
  __device__ SegmentAt(const Geometry& g, int i) {
    const int across = (int(g.W) + SEGMENT - 1) / SEGMENT;
    w = i % across * SEGMENT, i /= across;
    m = g.M == 1 ? 0 : i % int(g.M), t = g.M == 1 ? i : i / int(g.M);
  }
};

// The taps of TILE channels from `first` on, [tap][TILE] floats in shared memory; `flipped`: in reverse order, which
// turns the convolution into its transpose.
template <class T>
__device__ void load_tile_taps(const LevelWeights& level, int64_t first, int64_t C, bool flipped, float* to) {
  const Level& k = level.size;
  const int taps = int(k.taps());
  for (int i = threadIdx.x; i < taps * TILE; i += blockDim.x) {
    const int tap = flipped ? taps - 1 - i / TILE : i / TILE;
    const int64_t channel = first + i % TILE;
    const int w = tap % int(k.kw), m = tap / int(k.kw) % int(k.km), t = tap / int(k.kw * k.km);
    to[i] = channel < C ? to_float(*element<const T>(level.weights, 0, channel, t, m, w)) : 0.0f;
  }
}

// acc += the convolution of `from` at a segment, of the four channels that `from` and `taps` point to.
template <class T, int KW>
__device__ void convolve_tokens(const T* from, const MapView& strides, const Geometry& g, const Level& k,
                                const SegmentAt& s, const float* taps, float (&acc)[SEGMENT][4]) {
  constexpr int N = SEGMENT + KW - 1;
  const int column = s.w - KW / 2;
  const unsigned inside = columns_inside<N>(column, int(g.W));
  from += column * strides.w;
#pragma unroll 1
  for (int dt = 0; dt < int(k.kt); ++dt) {
    const int t = s.t + dt - int(k.kt) / 2;
#pragma unroll 1
    for (int dm = 0; dm < int(k.km); ++dm, taps += KW * TILE) {
      const int m = s.m + dm - int(k.km) / 2;
      if (t < 0 || t >= g.T || m < 0 || m >= g.M) continue;
      Channels<T> x[N];
      load_columns(from + t * strides.t + m * strides.m, int(strides.w), inside, x);
      float tap[KW][4];
#pragma unroll
      for (int a = 0; a < KW; ++a) {
        const float4 quad = *reinterpret_cast<const float4*>(taps + a * TILE);
        tap[a][0] = quad.x, tap[a][1] = quad.y, tap[a][2] = quad.z, tap[a][3] = quad.w;
      }
#pragma unroll
      for (int j = 0; j < N; ++j)
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const float value = channel_of<T>(x[j], c);
#pragma unroll
          for (int a = 0; a < KW; ++a)
            if (j - a >= 0 && j - a < SEGMENT) acc[j - a][c] += value * tap[a][c];
        }
    }
  }
}

// The sum over a block's lanes of each thread's four channels, written by its first TILE threads to `to`, TILE floats.
// `area`: as many floats as four times the block's threads.
__device__ inline void sum_lanes(const float (&values)[4], float* area, int channels, float* to) {
  __syncthreads();  // `area` may still be read
#pragma unroll
  for (int c = 0; c < 4; ++c) area[threadIdx.x * 4 + c] = values[c];
  __syncthreads();
  if (int(threadIdx.x) >= channels) return;
  float sum = 0;
  for (int lane = 0; lane < int(blockDim.x) / GROUPS; ++lane) sum += area[lane * TILE + threadIdx.x];
  to[threadIdx.x] = sum;
}

// Which tile of channels this block has, and which four of them this thread.
struct ChannelTile {
  int64_t first, channel;
  int64_t rest;  // what blockIdx.x counts besides
  __device__ ChannelTile(int64_t tiles)
      : first(blockIdx.x % tiles * TILE), channel(first + threadIdx.x % GROUPS * 4), rest(blockIdx.x / tiles) {}
  __device__ int channels(const Geometry& g) const { return int(std::min<int64_t>(TILE, g.C - first)); }
};

// What block blockIdx.x has of a pass: a tile of channels of `lanes` segments of one image.
struct PassBlock {
  int64_t image, first_channel;
  int block, segment, group;
  int64_t channel;
  bool valid;
  __device__ PassBlock(const Geometry& g, const TokensTiling& tiling) {
    const unsigned tiles = unsigned(tiling.channel_tiles), blocks = unsigned(tiling.image_blocks);
    const unsigned i = blockIdx.x / tiles;
    image = i / blocks, block = int(i % blocks);
    first_channel = int64_t(blockIdx.x % tiles) * TILE;
    group = threadIdx.x % GROUPS;
    segment = block * tiling.lanes + int(threadIdx.x) / GROUPS;
    channel = first_channel + 4 * group;
    valid = segment < tiling.segments && channel < g.C;
  }
  __device__ int channels(const Geometry& g) const { return int(std::min<int64_t>(TILE, g.C - first_channel)); }
};

// f(std::integral_constant<int, KW>()) with a kernel's width: those that the passes are compiled for.
template <class F>
void with_width(int64_t kw, const F& f) {
  with_constant<3, 5, 7, 9, 11, 13>(kw, f);
}

// Whether all of the maps, where there is one, have their channels adjacent and every four of them on a boundary.
inline bool in_quads(std::initializer_list<MapView> maps, DType dtype) {
  const auto whole = [&](const MapView& v) {
    const bool strides = v.b % 4 == 0 && v.t % 4 == 0 && v.m % 4 == 0 && v.w % 4 == 0;
    const bool aligned = reinterpret_cast<uintptr_t>(v.data) % (dtype == DType::f32 ? 16 : 8) == 0;
    return !v.data || (v.c == 1 && strides && aligned && std::abs(v.w) < (1 << 20));
  };
  return std::all_of(maps.begin(), maps.end(), whole);
}

// The parts of scratch, and of a call the images from `first` on.
inline MapView images_from(const MapView& v, int64_t first, DType dtype) {
  MapView moved = v;
  if (v.data) moved.data = static_cast<char*>(v.data) + first * v.b * (dtype == DType::f32 ? 4 : 2);
  return moved;
}
inline MapView scratch_map(void* memory, int64_t index, const TokensScratch& scratch, const Geometry& g, DType dtype) {
  const int64_t pitch = scratch.pitch;
  char* const data = static_cast<char*>(memory) + index * scratch.map * (dtype == DType::f32 ? 4 : 2);
  return {data, g.pixels() * pitch, 1, g.M * g.W * pitch, g.W * pitch, pitch};
}

// A pass's level: z = conv(from), and GELU(z).
struct LevelForward {
  Geometry g;
  TokensTiling tiling;
  LevelWeights level;
  MapView from, z, to;  // z and to are written where data is not null
  float* sums;          // [B][image_blocks][C]: of GELU(z), or null
};
void run_level_fwd(const LevelForward& p, DType dtype, void* stream);

// (B, C) means from the sums of parts, and their GELU; or with the forward's `mean` given, the gradient that the mean
// receives from every pixel.
struct Means {
  int64_t B, C, count;
  const float* parts;  // [B][count][C]
  double divisor;
  const float* mean;
  float *out, *gelu;
};
void run_means(const Means& p, void* stream);

}  // namespace focalnet::cuda

// Whole images in shared memory, a plane of 16-bit elements per channel, convolved by tensor cores.
//
// A kernel row of a depthwise convolution is a product: 16 rows of the map, each a window of 16 columns, times a band
// matrix (16 x 8) that holds the row's taps along its diagonals, give 16 rows of 8 columns. The window begins 4 columns
// before its result, which is on a 16-byte boundary and enough for kernels up to 9. The 16 rows are two units of
// EIGHT x EIGHT pixels, anywhere in the plane.
#pragma once

#include <algorithm>
#include <cstring>
#include <initializer_list>

#include "cuda/device.h"
#include "cuda/mma.h"

namespace focalnet::cuda {

constexpr int BORDER = 4;  // columns of zeros before a plane's rows
// Elements of a kernel row in shared memory: a band's diagonals, tap 0 at DIAGONALS - 13 - radius, and once more from
// the second on, so that any two neighbours are one word.
constexpr int DIAGONALS = 24, TAPS_ROW = 2 * DIAGONALS;

// Where a unit lies in a plane with zeros around it (its window: BORDER columns before its first pixel) and in one
// without; how much of it is inside the map.
struct alignas(16) Unit {
  int window, tight, rows, columns;
};

template <class T>
__device__ uint32_t pack(float low, float high) {
  return packed(two_of<T>(low, high));
}
__device__ inline uint32_t load_word(const void* p) { return *static_cast<const uint32_t*>(p); }
__device__ inline void store_word(void* p, uint32_t word) { *static_cast<uint32_t*>(p) = word; }

// N neighbouring pixels of a row: 1, 2 or 4, in one access.
template <class T, int N>
struct Pixels {
  uint32_t words[(N + 1) / 2];
  __device__ float operator[](int i) const { return unpack<T>(words[i / 2], i % 2); }
  // f(i) of each
  template <class F>
  __device__ void set(const F& f) {
#pragma unroll
    for (int j = 0; j < N; j += 2) words[j / 2] = pack<T>(f(j), j + 1 < N ? f(j + 1) : 0.0f);
  }
};
template <class T, int N>
__device__ Pixels<T, N> load_pixels(const T* p) {
  Pixels<T, N> pixels;
  if constexpr (N == 1) {
    pixels.words[0] = *reinterpret_cast<const uint16_t*>(p);
  } else if constexpr (N == 2) {
    pixels.words[0] = load_word(p);
  } else {
    const uint64_t words = *reinterpret_cast<const uint64_t*>(p);
    pixels.words[0] = uint32_t(words), pixels.words[1] = uint32_t(words >> 32);
  }
  return pixels;
}
template <class T, int N>
__device__ void store_pixels(T* p, const Pixels<T, N>& pixels) {
  if constexpr (N == 1)
    *reinterpret_cast<uint16_t*>(p) = uint16_t(pixels.words[0]);
  else if constexpr (N == 2)
    store_word(p, pixels.words[0]);
  else
    *reinterpret_cast<uint64_t*>(p) = pixels.words[0] | uint64_t(pixels.words[1]) << 32;  // a uint2 would become two
}

// What lane i = 4 g + q of a warp has of a tile: columns 2 q and 2 q + 1 of row g of both units.
struct LanePixels {
  int padded[2], tight[2];  // elements in planes
  bool inside[2];           // the first pixel
  uint32_t keep[2];         // the bits of both that are
  // `WHOLE`: every unit is inside the map, but for those past the end of the list
  template <int PITCH, bool WHOLE>
  __device__ static LanePixels of(const Unit& first, const Unit& second, int tight_pitch) {
    const int lane = threadIdx.x % 32, g = lane / 4, column = lane % 4 * 2;
    LanePixels at;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Unit& unit = h ? second : first;
      at.padded[h] = unit.window + g * PITCH + BORDER + column;
      at.tight[h] = unit.tight + g * tight_pitch + column;
      at.inside[h] = WHOLE ? unit.rows > 0 : g < unit.rows && column < unit.columns;
      at.keep[h] = !at.inside[h] ? 0 : WHOLE || column + 1 < unit.columns ? 0xffffffffu : 0xffffu;
    }
    return at;
  }
  // A word of a plane; what is outside reads a zero of those around the map, and adds one to them.
  template <class T>
  __device__ uint32_t load(const T* plane, int h) const {
    return load_word(plane + (inside[h] ? padded[h] : 0));
  }
  template <class T>
  __device__ void store(T* plane, int h, uint32_t word) const {
    store_word(plane + (inside[h] ? padded[h] : 0), word & keep[h]);
  }
};

// Where this lane's row of a tile's A matrices begins: what load_matrices wants for a convolution, or what
// load_transposed wants for the product over pixels that gives taps' gradients.
template <int PITCH, bool TRANSPOSED>
__device__ int lane_window(const Unit& first, const Unit& second) {
  const int lane = threadIdx.x % 32, low = lane / 8 % 2, high = lane / 16;
  const bool in_second = TRANSPOSED ? high : low;
  return (in_second ? second.window : first.window) + lane % 8 * PITCH + (TRANSPOSED ? low : high) * EIGHT;
}

// The four units of a step of two tiles.
template <int PITCH, bool WHOLE>
struct Step {
  Unit units[4];
  __device__ explicit Step(const Unit* first) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const uint4 words = reinterpret_cast<const uint4*>(first)[u];
      units[u] = {int(words.x), int(words.y), int(words.z), int(words.w)};
    }
  }
  template <bool TRANSPOSED>
  __device__ int window(int tile) const {
    return lane_window<PITCH, TRANSPOSED>(units[2 * tile], units[2 * tile + 1]);
  }
  __device__ LanePixels pixels(int tile, int tight_pitch) const {
    return LanePixels::of<PITCH, WHOLE>(units[2 * tile], units[2 * tile + 1], tight_pitch);
  }
};

// A level's band matrices as multiply_add's b, from TAPS_ROW elements for each of K rows; `FLIPPED`: of the transposed
// convolution.
template <int K, bool FLIPPED, class T>
__device__ void load_bands(const T* taps, uint2 (&bands)[K]) {
  const int lane = threadIdx.x % 32, diagonal = lane % 4 * 2 - lane / 4 + 7;
  const int first = FLIPPED ? 21 - diagonal : diagonal;
  taps += first % 2 ? DIAGONALS + first - 1 : first;
#pragma unroll
  for (int row = 0; row < K; ++row) {
    const T* const at = taps + (FLIPPED ? K - 1 - row : row) * TAPS_ROW;
    const uint32_t low = load_word(at), high = load_word(FLIPPED ? at - 8 : at + 8);
    bands[row] = FLIPPED ? uint2{low >> 16 | low << 16, high >> 16 | high << 16} : uint2{low, high};
  }
}

// f(std::integral_constant<int, i>()) for each row i < K of a kernel.
template <int K, class F, int I = 0>
__device__ void each_row(const F& f) {
  if constexpr (I < K) {
    f(std::integral_constant<int, I>());
    each_row<K, F, I + 1>(f);
  }
}

// acc += a level's convolution of two tiles; one's products run while the other's wait.
template <class T, int PITCH, bool WHOLE, int K>
__device__ void convolve_tiles(const T* plane, const Step<PITCH, WHOLE>& step, const uint2 (&bands)[K],
                               float (&acc)[2][4]) {
  const T* const windows[2] = {plane + step.template window<false>(0) - K / 2 * PITCH,
                               plane + step.template window<false>(1) - K / 2 * PITCH};
  each_row<K>([&](auto row) {
#pragma unroll
    for (int t = 0; t < 2; ++t) {
      uint32_t a[4];
      load_matrices<2 * row * PITCH>(a, windows[t]);
      multiply_add<T>(acc[t], a, bands[row]);
    }
  });
}

// f(std::integral_constant<int, K>()) with a level's kernel size.
template <class F>
__device__ void with_size(const Level& k, const F& f) {
  with_constant<3, 5, 7, 9>(k.kw, f);
}

// What a block has: CHANNELS channels, a run of a call's images, `layout.images` of them at a time. And a warp of it:
// one of the channels, or a part of one.
template <int CHANNELS>
struct ImagesBlock {
  int tile, channel;               // tile: of channels, from `channel` on
  int first_image, images, tiles;  // tiles: pairs of units of each channel
  int channel_here, part;
  __device__ ImagesBlock(const ImagesLayout& layout, int item, const Geometry& g)
      : tile(int(blockIdx.x % unsigned(layout.channel_tiles))),
        channel(tile * CHANNELS),
        first_image(item * layout.images),
        images(int(g.B) - first_image < layout.images ? int(g.B) - first_image : layout.images),
        tiles((images * layout.groups * layout.segments + 1) / 2),
        channel_here(int(threadIdx.x) / 32 % CHANNELS),
        part(int(threadIdx.x) / 32 / CHANNELS) {}
  // f(index of the first unit) of this warp's steps of two tiles
  template <class F>
  __device__ void each_step(const ImagesLayout& layout, const F& f) const {
    for (int tile = 2 * part; tile < tiles; tile += 2 * layout.warps) f(2 * tile);
  }
  // the first pixel of one of the block's channels
  template <class T>
  __device__ T* in(const MapView& map, int64_t channel) const {
    return element<T>(map, first_image, channel, 0, 0, 0);
  }
};

// The taps of CHANNELS channels from `channel` on, [channel][kernel row][TAPS_ROW], into zeros.
template <int CHANNELS, class T>
__device__ void load_taps(const LevelWeights& level, int64_t channel, T* to, int channel_stride) {
  with_size(level.size, [&](auto size) {
    constexpr int K = size;
    for (int i = threadIdx.x; i < CHANNELS * K * K; i += blockDim.x) {
      const int c = i / (K * K), row = i / K % K, column = i % K;
      const T tap = *element<const T>(level.weights, 0, channel + c, row, 0, column);
      T* const at = to + c * channel_stride + row * TAPS_ROW + column + DIAGONALS - 13 - K / 2;
      at[0] = at[DIAGONALS - 1] = tap;
    }
  });
}

// The units of that many images; empty ones past the end of them.
inline __device__ void list_units(const Geometry& g, const ImagesLayout& layout, int images, Unit* to) {
  const int per_image = layout.groups * layout.segments, n = images * per_image, H = int(g.T), W = int(g.W);
  for (int i = threadIdx.x; i < n + 3; i += blockDim.x) {
    const int u = i < n ? i : 0, image = u / per_image, row = u % per_image / layout.segments * EIGHT;
    const int column = u % layout.segments * EIGHT;
    Unit unit;
    unit.window = (layout.reach + image * (H + layout.reach) + row) * layout.pitch + column;
    unit.tight = (image * H + row) * layout.tight_pitch + column;
    unit.rows = i >= n ? 0 : H - row < EIGHT ? H - row : EIGHT;
    unit.columns = W - column < EIGHT ? W - column : EIGHT;
    to[i] = unit;
  }
}

// Group i of N neighbouring pixels of a block's images: which image it is of, where in it, and its elements in planes.
struct PixelsAt {
  int image, pixel, padded, tight;
  template <int PITCH, int N>
  __device__ static PixelsAt of(int i, const Geometry& g, const ImagesLayout& layout, const Vectors& vectors) {
    const int H = int(g.T), image = vectors.per_image.divide(i), in_image = i - image * int(vectors.per_image.divisor);
    const int row = vectors.per_row.divide(in_image), column = (in_image - row * int(vectors.per_row.divisor)) * N;
    return {image, in_image * N, (layout.reach + image * (H + layout.reach) + row) * PITCH + column + BORDER,
            (image * H + row) * layout.tight_pitch + column};
  }
};

// f(std::integral_constant<int, N>()) with the pixels of an access.
template <class F>
__device__ void with_pixels(const Vectors& vectors, const F& f) {
  with_constant<1, 2, 4>(vectors.pixels, f);
}

template <class T>
__device__ void fill_zeros(T* to, int64_t elements) {  // whole words of 16 bytes
  uint4* const words = reinterpret_cast<uint4*>(to);
  for (int64_t i = threadIdx.x; i < elements / EIGHT; i += blockDim.x) words[i] = uint4{0, 0, 0, 0};
}

// The sums over a warp's lanes of four units' values: lanes from 8 u on have that of unit u.
__device__ inline float sum_units(const float (&values)[4]) {
  const int lane = threadIdx.x % 32;
  const bool upper = lane >= 16, odd = lane % 16 >= 8;
  const auto halves = [](bool second, float a, float b, int offset) {
    return (second ? b : a) + __shfl_xor_sync(0xffffffffu, second ? a : b, offset);
  };
  float sum = halves(odd, halves(upper, values[0], values[2], 16), halves(upper, values[1], values[3], 16), 8);
#pragma unroll
  for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// A call's layout, where it fits: `bytes(layout)` of shared memory, `reach` rows of zeros between images, `warps` that
// share a channel of one image if two such blocks do not fit a multiprocessor.
template <class BYTES>
bool lay_out(const Geometry& g, int reach, int channels, const BYTES& bytes, ImagesLayout& layout) {
  const Device device = current_device();
  layout.groups = int((g.T + EIGHT - 1) / EIGHT), layout.segments = int((g.W + EIGHT - 1) / EIGHT);
  layout.reach = reach;
  layout.pitch = (layout.segments + 1 | 1) * EIGHT;  // odd: ldmatrix then finds eight rows in different banks
  layout.tight_pitch = int(g.W + 3) / 4 * 4;
  layout.channels = channels, layout.channel_tiles = g.C / channels;
  const int slack = layout.groups * EIGHT - int(g.T), least = EIGHT / channels;  // warps: eight or more in a block
  const auto with = [&](int images, int warps) {
    ImagesLayout next = layout;
    next.images = images, next.warps = warps;
    next.plane = (reach + images * (int(g.T) + reach) + slack) * layout.pitch;
    next.tight_plane = (images * int(g.T) + slack) * layout.tight_pitch + EIGHT;
    next.tight_plane = (next.tight_plane + EIGHT - 1) / EIGHT * EIGHT;
    next.image_blocks = (g.B + images - 1) / images;
    return next;
  };
  const int64_t most = device.shared_per_block;
  layout = with(1, 2);
  if (bytes(layout) > most) return false;
  // as many as let two blocks share a multiprocessor, each warp with eight tiles at most
  bool two = false;
  for (int images = 1; images <= std::min<int64_t>(g.B, 64); ++images) {
    const ImagesLayout next = with(images, least);
    if (bytes(next) > most / 2 - 1024 || (images > 1 && next.units() > 16 * least)) break;
    layout = next, two = true;
  }
  const int64_t at_once = (two ? 2 : 1) * device.processors;
  const int64_t all = std::max<int64_t>(1, layout.image_blocks);
  layout.runs = std::min(all, std::max<int64_t>(1, at_once / layout.channel_tiles));
  const int64_t longest = (all + layout.runs - 1) / layout.runs;
  layout.runs = (all + longest - 1) / longest;
  return true;
}

// f(pitch, whole) with a layout's, as constants.
template <class F>
void with_layout(const Geometry& g, const ImagesLayout& layout, const F& f) {
  with_constant<24, 40, 56, 72>(layout.pitch, [&](auto pitch) {
    with_constant<0, 1>(g.T % EIGHT == 0 && g.W % EIGHT == 0, [&](auto whole) { f(pitch, whole); });
  });
}

int reach_of(const Chain& chain);  // rows, of the largest kernel
std::optional<ImagesLayout> images_fwd_layout(const Chain& chain);
// How pixels of all of the maps, where there is one, are read; nothing where their rows do not lie in a row.
std::optional<Vectors> vectors_of(const Geometry& g, std::initializer_list<MapView> maps);

// The forward's kernel, which the backward asks for what enters the levels.
struct ImagesForward {
  Chain chain;
  ImagesLayout layout;
  Vectors vectors;
  MapView out, levels[MAX_LEVELS];  // written where data is not null; of the levels all but the last
  float* mean;                      // (B, C), or null: of the last level
};
void run_images_fwd(const ImagesForward& p, void* stream);

}  // namespace focalnet::cuda

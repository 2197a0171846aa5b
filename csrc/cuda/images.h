// Whole images in shared memory, a plane of 16-bit elements per channel, convolved by tensor cores.
//
// A kernel row of a depthwise convolution is a product: 16 rows of the map, each a window of 16 columns, times a band
// matrix (16 x 8) that holds the row's taps along its diagonals, give 16 rows of 8 columns. The window begins 4 columns
// before its result, which is on a 16-byte boundary and enough for kernels up to 9. The 16 rows are one each of 16
// stretches, anywhere in the plane; from kernel row to kernel row all move down by one. So the windows of a stretch's
// next row are those of this one but the first and one more, and each is loaded once, for all rows that it belongs to.
// Rows of at most EIGHT columns need no zeros beside them: there a window is two rows, one below the other, and takes
// the bands of two kernel rows at once.
#pragma once

#include <algorithm>
#include <cstring>

#include "cuda/device.h"
#include "cuda/images_pixels.h"
#include "cuda/mma.h"

namespace focalnet::cuda {

constexpr int LEVELS = 4, MOST_IMAGES = 32;  // at most, of a block at a time
// Elements of a kernel row in shared memory: a band's diagonals, tap 0 at DIAGONALS - 13 - radius, and once more from
// the second on, so that any two neighbours are one word.
constexpr int DIAGONALS = 24, TAPS_ROW = 2 * DIAGONALS;

// Of a plane whose rows are `pitch` elements apart: columns of zeros before a row; how many rows a window has; and how
// many windows a kernel of K rows has.
__host__ __device__ constexpr int border(int pitch) { return pitch > EIGHT ? 4 : 0; }
__host__ __device__ constexpr int window_rows(int pitch) { return pitch > EIGHT ? 1 : 2; }
template <int PITCH, int K>
constexpr int WINDOWS = (K + window_rows(PITCH) - 1) / window_rows(PITCH);

// Stretches of SPACING rows follow one another; of HALF, there are two in as many, 4 rows and 3. As pitches are odd
// numbers of 16 bytes, and SPACING is odd, EIGHT neighbours' rows lie in different banks.
constexpr int SPACING = 7, HALF = (SPACING + 1) / 2, WIDEST = 72;
__host__ __device__ constexpr int first_row(int stretch_rows, int stretch) {
  return stretch_rows == SPACING ? stretch * SPACING : stretch / 2 * SPACING + stretch % 2 * HALF;
}

// How a kernel goes over planes: their pitch; a stretch's rows; and whether all of them have all columns.
template <int PITCH_, int ROWS_, bool WHOLE_>
struct Form {
  static constexpr int PITCH = PITCH_, ROWS = ROWS_;
  static constexpr bool WHOLE = WHOLE_;
};
// What rows of windows a stretch has for a kernel of K rows; and which of its windows is that one of row `e`, or none.
template <class FORM, int K>
constexpr int WINDOW_ROWS = FORM::ROWS + (WINDOWS<FORM::PITCH, K> - 1) * window_rows(FORM::PITCH);
template <int PITCH, int K>
__device__ constexpr int window_of(int window_row, int e) {
  const int below = window_row - e, rows = window_rows(PITCH);
  return below >= 0 && below % rows == 0 && below / rows < WINDOWS<PITCH, K> ? below / rows : -1;
}

// A stretch: where it begins in a plane with zeros around the images, and in one without; what it has of the map.
class alignas(8) Stretch {
  uint16_t padded_bytes, tight_bytes, its_rows, its_columns;

 public:
  Stretch() = default;
  __device__ Stretch(int padded, int tight, int rows, int columns)
      : padded_bytes(uint16_t(2 * padded)),
        tight_bytes(uint16_t(2 * tight)),
        its_rows(uint16_t(rows)),
        its_columns(uint16_t(columns)) {}
  __device__ int rows() const { return its_rows; }
  __device__ int columns() const { return its_columns; }
  template <class T>
  __device__ T* in(T* plane) const {
    return further(plane, padded_bytes);
  }
  template <class T>
  __device__ T* in_tight(T* plane) const {
    return further(plane, tight_bytes);
  }
  __device__ int pair() const { return tight_bytes / 4; }  // the first; rows begin at whole pairs
};

// f(std::integral_constant<int, i>()) for each i < N.
template <int N, class F, int I = 0>
__device__ void each_constant(const F& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    each_constant<N, F, I + 1>(f);
  }
}

// This lane's row of an A matrix in `plane`, of two units of stretches: what load_matrices wants for a convolution, or
// what load_transposed wants for the product over pixels that gives taps' gradients.
template <bool TRANSPOSED, class T>
__device__ SharedRow window_in(const T* plane, const Stretch* units) {
  const uint32_t lane = lane_again(), right = TRANSPOSED ? lane / EIGHT % 2 : lane / 16;
  const Stretch& stretch = units[TRANSPOSED ? lane / 16 * EIGHT + lane % EIGHT : lane % 16];
  return shared_row(stretch.in(plane + right * EIGHT));
}

// A lane's part of a unit: lane 4 g + q has columns 2 q and 2 q + 1 of stretch g. (A step of a warp is two units.)
template <class FORM>
class Part {
  static constexpr int PITCH = FORM::PITCH;
  int column;
  Stretch stretch;
  __device__ bool has(int i) const { return FORM::WHOLE || column + i < stretch.columns(); }

 public:
  __device__ explicit Part(const Stretch* unit) {
    const uint32_t lane = lane_again();
    column = int(lane % 4 * 2), stretch = unit[lane / 4];
  }
  // Its pixels of the stretch's first row, in a plane with zeros and in one without; the first pair in the latter.
  template <class T>
  __device__ T* in(T* plane) const {
    return stretch.in(plane + border(PITCH) + column);
  }
  template <class T>
  __device__ T* in_tight(T* plane) const {
    return stretch.in_tight(plane + column);
  }
  __device__ int pair() const { return stretch.pair() + column / 2; }
  // How many rows there are. (Beyond them, another warp may have the row.)
  __device__ int rows() const { return stretch.rows(); }
  // zeros in place of pixels that are not inside the map's columns
  __device__ void mask(float (&pair)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) pair[i] = has(i) ? pair[i] : 0.0f;
  }
  template <class T>
  __device__ uint32_t masked(const float (&pair)[2]) const {
    return pack<T>(pair[0], pair[1]) & ((has(0) ? 0xffffu : 0) | (has(1) ? 0xffff0000u : 0));
  }
};

// Where a lane's words of band matrices lie among a kernel row's diagonals, from where lane 0's do; those of the
// transposed convolution lie as far in the other direction. With lane 4 g + q that is 2 q - g, of which the odd ones
// are neighbours' words where the diagonals stand once more.
__device__ inline int of_diagonals() {
  const uint32_t lane = lane_again(), g = lane / 4;
  return int(lane % 4 * 2) - int(g) - int(g % 2) * (DIAGONALS - 1);
}

// A level's band matrices as multiply_add's b, from TAPS_ROW elements for each of K rows; FLIPPED: of the transposed
// convolution.
template <int PITCH, int K, bool FLIPPED, class T>
__device__ void load_bands(const T* taps, int diagonals, uint2 (&bands)[WINDOWS<PITCH, K>]) {
  constexpr bool TWO_ROWS = window_rows(PITCH) == 2;
  constexpr int FIRST = DIAGONALS - 13 - border(PITCH), LAST = 2 * (DIAGONALS - 13) - 1 - FIRST;  // lane 0's: odd, even
  taps += FLIPPED ? (K - 1) * TAPS_ROW + LAST - diagonals : DIAGONALS - 1 + FIRST + diagonals;
  constexpr int row_step = FLIPPED ? -TAPS_ROW : TAPS_ROW, column_step = FLIPPED ? -EIGHT : EIGHT;
  // Of two taps' bytes. (Left out where it changes nothing, ptxas 13.0 spills in the forward.)
  constexpr uint32_t order = FLIPPED ? 0x1032 : 0x3210;
#pragma unroll
  for (int i = 0; i < WINDOWS<PITCH, K>; ++i) {
    const auto half = [&](int j) -> uint32_t {
      const int row = TWO_ROWS ? 2 * i + j : i, column = TWO_ROWS ? 0 : j;
      return row < K ? __byte_perm(load_word(taps + row * row_step + column * column_step), 0, order) : 0;
    };
    bands[i] = uint2{half(0), half(1)};
  }
}

// acc[e] += a level's convolution of row e of a step's stretches.
template <int K, class FORM, class T>
__device__ void convolve_stretches(SharedRow windows, const uint2 (&bands)[WINDOWS<FORM::PITCH, K>],
                                   float (&acc)[FORM::ROWS][4]) {
  constexpr int PITCH = FORM::PITCH;
  each_constant<WINDOW_ROWS<FORM, K>>([&](auto row) {
    uint32_t a[4];
    load_matrices<2 * PITCH*(row - K / 2)>(a, windows);
#pragma unroll
    for (int e = 0; e < FORM::ROWS; ++e) {
      const int i = window_of<PITCH, K>(row, e);
      if (i >= 0) multiply_add<T>(acc[e], a, bands[i]);
    }
  });
}

// A number below 256 of each level, looked up by one instruction.
class OfLevels {
  uint32_t bytes = 0;

 public:
  void set(int l, int number) { bytes |= uint32_t(number) << EIGHT * l; }
  __device__ int operator[](int l) const { return int(__byte_perm(bytes, 0, 0x4440 | l)); }
};

// f(std::integral_constant<int, K>()) with a level's kernel size.
template <class F>
__device__ void with_size(int size, const F& f) {
  with_constant<3, 5, 7, 9>(size, f);
}

// acc[e] = a level's convolution of row e of a step's stretches. The size is looked up in every step: compiled around
// what comes before and after, each would have its own of that too, and be more than twice as much code.
template <class FORM, class T>
__device__ void convolve(int size, const T* taps, int diagonals, bool flipped, const T* plane, const Stretch* units,
                         float (&acc)[FORM::ROWS][4]) {
  const SharedRow windows = window_in<false>(plane, units);
#pragma unroll
  for (int e = 0; e < FORM::ROWS; ++e)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[e][i] = 0;
  with_size(size, [&](auto K) {
    uint2 bands[WINDOWS<FORM::PITCH, K>];
    if (flipped)
      load_bands<FORM::PITCH, K, true>(taps, diagonals, bands);
    else
      load_bands<FORM::PITCH, K, false>(taps, diagonals, bands);
    convolve_stretches<K, FORM, T>(windows, bands, acc);
  });
}

// GELU of all.
template <class T, int ROWS>
__device__ void apply_gelu(float (&acc)[ROWS][4]) {
#pragma unroll
  for (int e = 0; e < ROWS; ++e)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[e][i] = gelu<T>(acc[e][i]);
}

// A step's values, into its pixels of a plane.
template <class FORM, class T>
__device__ void store_step(const Stretch* units, const float (&acc)[FORM::ROWS][4], T* plane) {
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const Part<FORM> part(units + u * EIGHT);
    const SharedRow here = shared_row(part.in(plane));
    each_constant<FORM::ROWS>([&](auto e) {
      const float pair[2] = {acc[e][2 * u], acc[e][2 * u + 1]};
      store_shared_row<2 * FORM::PITCH * e, e>(here, part.rows(), part.template masked<T>(pair));
    });
  }
}

// What a block has: TILE channels, CHANNELS of them at a time, and a run of a call's images, `layout.images` of them at
// a time. And a warp of it: one of the channels, or a part of one.
template <int CHANNELS, int TILE = CHANNELS>
struct ImagesBlock {
  int tile, channel;  // tile: of channels, from `channel` on
  int first_image, images;
  int channel_here, part;
  __device__ ImagesBlock(const ImagesLayout& layout, int item, const Geometry& g)
      : tile(int(blockIdx.x) - run_of(layout) * int(layout.channel_tiles)),
        channel(tile * TILE),
        first_image(item * layout.images),
        images(int(g.B) - first_image < layout.images ? int(g.B) - first_image : layout.images),
        channel_here(int(threadIdx.x) / 32 % CHANNELS),
        part(int(threadIdx.x) / 32 / CHANNELS) {}
  // which of the runs that share the images
  static __device__ int run_of(const ImagesLayout& layout) { return layout.tiles.divide(int(blockIdx.x)); }
  // f(index of the first stretch) of this warp's steps
  template <class F>
  __device__ void each_step(const ImagesLayout& layout, const F& f) const {
    for (int unit = 2 * part; unit < layout.units; unit += 2 * layout.warps) f(unit * EIGHT);
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
  with_size(int(level.size.kw), [&](auto size) {
    constexpr int K = size;
    for (int i = threadIdx.x; i < CHANNELS * K * K; i += blockDim.x) {
      const int c = i / (K * K), row = i / K % K, column = i % K;
      const T tap = *element<const T>(level.weights, 0, channel + c, row, 0, column);
      T* const at = to + c * channel_stride + row * TAPS_ROW + column + DIAGONALS - 13 - K / 2;
      at[0] = at[DIAGONALS - 1] = tap;
    }
  });
}

// The stretches of all images, and the places of each few neighbours of a period's pixels.
inline __device__ void list_places(const Geometry& g, const ImagesLayout& layout, Stretch* stretches, Place* pixels) {
  const int H = int(g.T), W = int(g.W), listed = layout.listed(), pitch = layout.pitch, rows_of = layout.stretch_rows;
  const auto least = [](int a, int b) { return a < b ? a : b; };
  const auto padded = [&](int row, int column) {
    const int image = layout.rows.divide(row);
    return layout.reach * pitch + image * layout.image_pitch + (row - image * H) * pitch + column;
  };
  const int last = listed * layout.segments - 1;
  for (int i = threadIdx.x; i < layout.all_listed(); i += blockDim.x) {
    const int of_all = least(i, last), segment = of_all / listed, of_segment = of_all - segment * listed;
    const int image = of_segment / layout.stretches, here = of_segment - image * layout.stretches;
    const int first = first_row(rows_of, here), row = image * H + first, column = segment * EIGHT;
    // beyond them: the last, which the same warp has, without its rows
    const int rows = i > last ? 0 : least(first_row(rows_of, here + 1), H) - first;
    stretches[i] = Stretch(padded(row, column), row * layout.tight_pitch + column, rows, least(EIGHT, W - column));
  }
  for (int i = threadIdx.x; i < layout.places; i += blockDim.x) {
    const int row = layout.row_parts.divide(i), column = i * layout.neighbours - row * int(g.W);
    pixels[i] =
        Place(padded(row, border(layout.pitch) + column), row * layout.tight_pitch + column, layout.rows.divide(row));
  }
}

// N neighbouring sums, or what is to be added to those.
template <int N>
__device__ void add_floats(float* to, const float* from, bool add) {
  struct alignas(4 * N) Floats {
    float values[N];
  };
  Floats floats{};
  if (add) floats = *reinterpret_cast<const Floats*>(to);
#pragma unroll
  for (int i = 0; i < N; ++i) floats.values[i] += from[i];
  *reinterpret_cast<Floats*>(to) = floats;
}

template <class T>
__device__ void fill_zeros(T* to, int64_t elements) {  // whole words of 16 bytes
  uint4* const words = reinterpret_cast<uint4*>(to);
#pragma unroll 4
  for (int64_t i = threadIdx.x; i < elements / EIGHT; i += blockDim.x) words[i] = uint4{0, 0, 0, 0};
}

// The sums over a step's stretches, of which lanes have a value each, of either unit: into [stretch][CHANNELS].
template <int CHANNELS>
__device__ void sum_stretches(const float (&values)[2], float* of_step) {
  const int lane = threadIdx.x % 32, unit = lane % 2;
  float sum = (unit ? values[1] : values[0]) + __shfl_xor_sync(0xffffffffu, unit ? values[0] : values[1], 1);
  sum += __shfl_xor_sync(0xffffffffu, sum, 2);
  if (lane % 4 < 2) of_step[(unit * EIGHT + lane / 4) * CHANNELS] = sum;
}

// f(channel, image, sum over its stretches) for each of the block's images, all of a block's threads together. LANES
// share an image's stretches.
template <int CHANNELS, int LANES, class F>
__device__ void each_sum(const ImagesLayout& layout, int images, const float* stretches, const F& f) {
  for (int i = threadIdx.x; i < LANES * CHANNELS * images; i += blockDim.x) {
    const int lane = i % LANES, channel = i / LANES % CHANNELS, image = i / LANES / CHANNELS;
    const float* of_image = stretches + image * layout.stretches * CHANNELS + channel;
    float sum = 0;
    for (int segment = 0; segment < layout.segments; ++segment, of_image += layout.listed() * CHANNELS)
      for (int i = lane; i < layout.stretches; i += LANES) sum += of_image[i * CHANNELS];
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0) f(channel, image, sum);
  }
}
template <int CHANNELS, class F>
__device__ void each_sum(const ImagesLayout& layout, int images, const float* stretches, const F& f) {
  if (images > 2)  // or few threads would add many stretches
    each_sum<CHANNELS, 1>(layout, images, stretches, f);
  else
    each_sum<CHANNELS, EIGHT>(layout, images, stretches, f);
}

}  // namespace focalnet::cuda

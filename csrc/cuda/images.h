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

// So many bytes further on.
template <class T>
__device__ T* further(T* plane, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(plane) + bytes);
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

// Where some neighbours of a row lie, likewise, and of which of the block's images they are.
class alignas(8) Place {
  uint16_t padded_bytes, tight_pixel, of_image;

 public:
  static constexpr int MOST_PADDED = 1 << 15, MOST_TIGHT = 1 << 15;  // elements; rows count them in bytes
  Place() = default;
  __device__ Place(int padded, int tight, int image)
      : padded_bytes(uint16_t(2 * padded)), tight_pixel(uint16_t(tight)), of_image(uint16_t(image)) {}
  __device__ int image() const { return of_image; }
  __device__ int tight() const { return tight_pixel; }
  template <class T>
  __device__ T* in(T* plane) const {
    return further(plane, padded_bytes);
  }
  __device__ void operator+=(const Place& on) {
    padded_bytes += on.padded_bytes, tight_pixel += on.tight_pixel, of_image += on.of_image;
  }
};

// Half i of two words, in one.
__device__ inline uint32_t halves(uint32_t a, uint32_t b, int i) { return __byte_perm(a, b, i ? 0x7632 : 0x5410); }

// N neighbouring pixels: 1, 2 or 4, in one access.
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
  // Part i of M of them.
  template <int M>
  __device__ Pixels<T, M> part(int i) const {
    Pixels<T, M> few;
#pragma unroll
    for (int j = 0; j < (M + 1) / 2; ++j) few.words[j] = M == 1 ? words[i / 2] >> 16 * (i % 2) : words[i * M / 2 + j];
    return few;
  }
  template <int M>
  __device__ void set_part(int i, const Pixels<T, M>& few) {
#pragma unroll
    for (int j = 0; j < (M + 1) / 2; ++j) {
      uint32_t& word = words[i * M / 2 + j];
      word = M == 1 && i % 2 ? word | few.words[0] << 16 : few.words[j];
    }
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

// Where this lane's row of an A matrix begins in `plane`, of two units of stretches: what load_matrices wants for a
// convolution, or what load_transposed wants for the product over pixels that gives taps' gradients.
template <bool TRANSPOSED, class T>
__device__ const T* window_in(const T* plane, const Stretch* units) {
  const int lane = lane_again(), low = lane / 8 % 2, high = lane / 16;
  return units[(TRANSPOSED ? high : low) * EIGHT + lane % 8].in(plane + (TRANSPOSED ? low : high) * EIGHT);
}

// A lane's part of a unit: lane 4 g + q has columns 2 q and 2 q + 1 of stretch g. (A step of a warp is two units.)
template <class FORM>
class Part {
  static constexpr int PITCH = FORM::PITCH;
  int column;
  Stretch stretch;
  bool has[2];  // columns

 public:
  __device__ explicit Part(const Stretch* unit) {
    const int lane = lane_again();
    column = lane % 4 * 2, stretch = unit[lane / 4];
#pragma unroll
    for (int i = 0; i < 2; ++i) has[i] = column + i < stretch.columns();
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
  // Whether there is a row e. (Where there is none, another warp may have the row.)
  __device__ bool has_row(int e) const { return e < stretch.rows(); }
  // zeros in place of pixels that are not inside the map's columns
  __device__ void mask(float (&pair)[2]) const {
#pragma unroll
    for (int i = 0; i < 2; ++i) pair[i] = FORM::WHOLE || has[i] ? pair[i] : 0.0f;
  }
  template <class T>
  __device__ uint32_t masked(float (&pair)[2]) const {
    if constexpr (PITCH > EIGHT) mask(pair);
    const uint32_t word = pack<T>(pair[0], pair[1]);
    if constexpr (PITCH > EIGHT) return word;
    return word & ((has[0] ? 0xffffu : 0) | (has[1] ? 0xffff0000u : 0));  // the same in all stretches
  }
};

// A level's band matrices as multiply_add's b, from TAPS_ROW elements for each of K rows; `flipped`: of the transposed
// convolution.
template <int PITCH, int K, class T>
__device__ void load_bands(const T* taps, bool flipped, uint2 (&bands)[WINDOWS<PITCH, K>]) {
  constexpr bool TWO_ROWS = window_rows(PITCH) == 2;
  const int lane = threadIdx.x % 32, diagonal = lane % 4 * 2 - lane / 4 + DIAGONALS - 13 - border(PITCH);
  const int first = flipped ? 21 - diagonal : diagonal;
  taps += (flipped ? (K - 1) * TAPS_ROW : 0) + (first % 2 ? DIAGONALS + first - 1 : first);
  const int row_step = flipped ? -TAPS_ROW : TAPS_ROW, column_step = flipped ? -EIGHT : EIGHT;
  const uint32_t order = flipped ? 0x1032 : 0x3210;  // of two taps' bytes
#pragma unroll
  for (int i = 0; i < WINDOWS<PITCH, K>; ++i) {
    const auto half = [&](int j) -> uint32_t {
      const int row = TWO_ROWS ? 2 * i + j : i, column = TWO_ROWS ? 0 : j;
      return row < K ? __byte_perm(load_word(taps + row * row_step + column * column_step), 0, order) : 0;
    };
    bands[i] = uint2{half(0), half(1)};
  }
}

// f(std::integral_constant<int, i>()) for each i < N.
template <int N, class F, int I = 0>
__device__ void each_constant(const F& f) {
  if constexpr (I < N) {
    f(std::integral_constant<int, I>());
    each_constant<N, F, I + 1>(f);
  }
}

// acc[e] += a level's convolution of row e of a step's stretches.
template <int K, class FORM, class T>
__device__ void convolve_stretches(const T* plane, const Stretch* units, const uint2 (&bands)[WINDOWS<FORM::PITCH, K>],
                                   float (&acc)[FORM::ROWS][4]) {
  constexpr int PITCH = FORM::PITCH;
  const SharedRow windows = shared_row(window_in<false>(plane - K / 2 * PITCH, units));
  each_constant<WINDOW_ROWS<FORM, K>>([&](auto row) {
    uint32_t a[4];
    load_matrices<2 * PITCH * row>(a, windows);
#pragma unroll
    for (int e = 0; e < FORM::ROWS; ++e) {
      const int i = window_of<PITCH, K>(row, e);
      if (i >= 0) multiply_add<T>(acc[e], a, bands[i]);
    }
  });
}

// f(std::integral_constant<int, K>()) with a level's kernel size.
template <class F>
__device__ void with_size(const Level& k, const F& f) {
  with_constant<3, 5, 7, 9>(k.kw, f);
}

// acc[e] = a level's convolution of row e of a step's stretches. The size is looked up in every step: compiled around
// what comes before and after, each would have its own of that too, and be more than twice as much code.
template <class FORM, class T>
__device__ void convolve(const Level& k, const T* taps, bool flipped, const T* plane, const Stretch* units,
                         float (&acc)[FORM::ROWS][4]) {
#pragma unroll
  for (int e = 0; e < FORM::ROWS; ++e)
#pragma unroll
    for (int i = 0; i < 4; ++i) acc[e][i] = 0;
  with_size(k, [&](auto K) {
    uint2 bands[WINDOWS<FORM::PITCH, K>];
    if (flipped)  // each compiled for itself: strides are constants so
      load_bands<FORM::PITCH, K>(taps, true, bands);
    else
      load_bands<FORM::PITCH, K>(taps, false, bands);
    convolve_stretches<K, FORM>(plane, units, bands, acc);
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
    T* const here = part.in(plane);
#pragma unroll
    for (int e = 0; e < FORM::ROWS; ++e) {
      float pair[2] = {acc[e][2 * u], acc[e][2 * u + 1]};
      const uint32_t word = part.template masked<T>(pair);
      if (part.has_row(e)) store_word(here + e * FORM::PITCH, word);
    }
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

// Access i to N pixels of a block's images: where they lie in planes, GROUP neighbours each, and in memory.
template <int N, int GROUP>
struct PixelsAt {
  // of a plane without zeros; rows of an odd number of pixels do not follow one another
  static constexpr int TIGHT_GROUP = GROUP > 1 ? N : 1;
  Place places[N / GROUP];
  int first, run, run_pixels;  // the first pixel, of all images; which run it is of, and how many one has
  __device__ PixelsAt(const Place* all, int i, const ImagesLayout& layout, const Vectors& vectors)
      : first(i * N), run(vectors.run.divide(i)), run_pixels(int(vectors.run.divisor) * N) {
    const bool listed = layout.period == layout.images;
    int periods = 0;
    if (!listed) periods = vectors.period.divide(i), i -= periods * int(vectors.period.divisor);
    if constexpr (N > GROUP) {
#pragma unroll
      for (int j = 0; j < N / GROUP; ++j) places[j] = all[i * (N / GROUP) + j];
    } else if (layout.neighbours == N) {
      places[0] = all[i];
    } else {
      const int column = i % layout.neighbours;
      places[0] = all[i / layout.neighbours];
      places[0] += Place(column, column, 0);
    }
    if (listed) return;
    const int images = periods * layout.period;
    const Place begin(images * layout.image_pitch, images * layout.tight_image, images);
#pragma unroll
    for (int j = 0; j < N / GROUP; ++j) places[j] += begin;
  }
  template <class T>
  __device__ T* in(T* map, const MapView& v) const {
    return map + run * (v.b - run_pixels) + first;
  }
  template <class T>
  __device__ Pixels<T, N> load(const T* plane) const {
    Pixels<T, N> pixels;
#pragma unroll
    for (int j = 0; j < N / GROUP; ++j) pixels.set_part(j, load_pixels<T, GROUP>(places[j].in(plane)));
    return pixels;
  }
  template <class T>
  __device__ void store(T* plane, const Pixels<T, N>& pixels) const {
#pragma unroll
    for (int j = 0; j < N / GROUP; ++j) store_pixels(places[j].in(plane), pixels.template part<GROUP>(j));
  }
  template <class T>
  __device__ Pixels<T, N> load_tight(const T* plane) const {
    Pixels<T, N> pixels;
#pragma unroll
    for (int j = 0; j < N / TIGHT_GROUP; ++j)
      pixels.set_part(j, load_pixels<T, TIGHT_GROUP>(plane + places[j].tight()));
    return pixels;
  }
  template <class T>
  __device__ void store_tight(T* plane, const Pixels<T, N>& pixels) const {
#pragma unroll
    for (int j = 0; j < N / TIGHT_GROUP; ++j)
      store_pixels(plane + places[j].tight(), pixels.template part<TIGHT_GROUP>(j));
  }
  // Of one whose pixels are `step` elements apart.
  template <class T>
  __device__ Pixels<T, N> load_tight(const T* plane, int step) const {
    Pixels<T, N> pixels;
#pragma unroll
    for (int j = 0; j < N; ++j) pixels.set_part(j, load_pixels<T, 1>(plane + tight(j) * step));
    return pixels;
  }
  __device__ int tight(int j) const { return GROUP > 1 ? places[0].tight() + j : places[j].tight(); }
};

// f(index) for each access to a block's pixels that is this thread's; f(N, GROUP) as constants.
template <class F>
__device__ void each_access(const ImagesLayout& layout, int images, int pixels, const F& f) {
  for (int i = threadIdx.x; i < images * layout.pixels / pixels; i += blockDim.x) f(i);
}
template <bool WHOLE, class F>
__device__ void with_vectors(const Vectors& vectors, const ImagesLayout& layout, const F& f) {
  constexpr std::integral_constant<int, 1> ONE;
  constexpr std::integral_constant<int, 4> FOUR;
  if (vectors.pixels == 1)
    f(ONE, ONE);
  else if constexpr (WHOLE)
    f(FOUR, FOUR);
  else
    with_constant<1, 2, 4>(layout.neighbours, [&](auto group) { f(FOUR, group); });
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

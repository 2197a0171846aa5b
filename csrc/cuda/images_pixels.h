// How the pixels of a block's images are read and written: in memory, where they follow one another, and in planes of
// shared memory, where some neighbours of a row at a time do.
#pragma once

#include <cstdint>
#include <type_traits>

#include "cuda/device.h"
#include "cuda/kernels.h"

namespace focalnet::cuda {

// So many bytes further on.
template <class T>
__device__ T* further(T* plane, int bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return reinterpret_cast<T*>(reinterpret_cast<Byte*>(plane) + bytes);
}

// Where some neighbours of a row lie in a plane with zeros around the images, and in one without; and of which of the
// block's images they are.
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

}  // namespace focalnet::cuda

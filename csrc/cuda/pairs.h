// What a lane holds of a map's rows in a 16 x 8 product of the tensor cores, and how it reads and writes that.
#pragma once

#include <algorithm>

#include "cuda/device.h"

namespace focalnet::cuda {

constexpr int STEP = 4;  // rows that a level advances at once

// Rows begin .. end - 1.
struct RowRange {
  int begin, end;
  __device__ bool has(int t) const { return t >= begin && t < end; }
  // Of rows t .. t + STEP - 1:
  __device__ bool has_all(int t) const { return t >= begin && t + STEP <= end; }
  __device__ bool has_any(int t) const { return t + STEP > begin && t < end; }
};

// The two pairs of columns of a row that a lane holds: of segments `lane / 4` and 8 further.
struct Pairs {
  int64_t image[2];
  int column[2], columns[2];  // the first of two, and how many are inside the map
  uint32_t inside[2];         // the bits of those that are
  int at[2];                  // in a ring's row; where that has it not, a place that may be read
  bool in_row[2];             // whether it has
  bool whole;                 // there is no pair that only half is inside

  __device__ Pairs(const RowsLayout& layout, const Geometry& g, int64_t group) {
    const int lane = threadIdx.x % 32, warp = layout.warps > 1 ? threadIdx.x / 32 : 0;
    for (int i = 0; i < 2; ++i) {
      const int segment = warp * 16 + lane / 4 + 8 * i, nth = segment / layout.segments;
      image[i] = group * layout.images + nth;
      column[i] = segment % layout.segments * 8 + lane % 4 * 2;
      in_row[i] = nth < layout.images;
      at[i] = in_row[i] ? nth * layout.image_row + layout.window / 4 + column[i] : 0;
      const bool present = in_row[i] && image[i] < g.B;
      columns[i] = present ? int(std::min<int64_t>(2, std::max<int64_t>(0, g.W - column[i]))) : 0;
      inside[i] = columns[i] == 2 ? 0xffffffffu : columns[i] == 1 ? 0x0000ffffu : 0;
    }
    // what is outside may be read all the same: as the other pair, or as the first pixels
    for (int i = 0; i < 2; ++i) {
      if (columns[i] > 0) continue;
      const bool other = columns[1 - i] > 0;
      image[i] = other ? image[1 - i] : group * layout.images, column[i] = other ? column[1 - i] : 0;
    }
    whole = g.W % 2 == 0;
  }
};

// STEP rows of a lane's pairs of 16-bit elements, a word each.
using PairRows = uint32_t[STEP][2];

// f(r, i) for pair i of each of the STEP rows that a lane holds.
template <class F>
__device__ __forceinline__ void for_pairs(const F& f) {
#pragma unroll
  for (int r = 0; r < STEP; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) f(r, i);
}

// Zeros for what is outside of `range`, where that begins with row `first`.
__device__ __forceinline__ void clear_outside(PairRows& rows, int first, const RowRange& range) {
  if (range.has_all(first)) return;
  for_pairs([&](int r, int i) {
    if (!range.has(first + r)) rows[r][i] = 0;
  });
}

// This lane's pairs in a map, a plane at a time: addresses are expensive to compute, so what does not change is kept.
template <class T>
struct Lines {
  using Element = std::remove_const_t<T>;
  const MapView& v;
  const Pairs& pairs;
  char* first[2];  // of the plane, row 0
  bool adjacent;   // a pair is one aligned access, wherever it lies

  __device__ Lines(const MapView& v, const Pairs& pairs, int64_t channel) : v(v), pairs(pairs) {
    for (int i = 0; i < 2; ++i)
      first[i] = reinterpret_cast<char*>(element<Element>(v, pairs.image[i], channel, 0, 0, pairs.column[i]));
    adjacent = v.w == 1 && (v.b | v.c | v.t) % 2 == 0 && reinterpret_cast<uintptr_t>(v.data) % 4 == 0;
  }
  // Where pair i of rows t + r lies, of `planes` further.
  struct At {
    char* first[2];
    int64_t row_bytes;
    __device__ T* operator()(int r, int i) const { return reinterpret_cast<T*>(first[i] + r * row_bytes); }
  };
  __device__ At rows(int64_t t, int64_t planes) const {
    const int64_t row_bytes = v.t * 2, further = t * row_bytes + planes * (v.c * 2);
    return {{first[0] + further, first[1] + further}, row_bytes};
  }

  // Rows t .. t + STEP - 1, those of `range`; others are zeros. Outside of the map's columns they are anything.
  __device__ __forceinline__ void load(PairRows& to, int t, const RowRange& range, int64_t planes = 0) const {
    const At at = rows(t, planes);
    if (adjacent && pairs.whole && range.has_all(t)) {
      for_pairs([&](int r, int i) { to[r][i] = load_word(at(r, i)); });
      return;
    }
    for_pairs([&](int r, int i) { to[r][i] = 0; });
    if (!range.has_any(t)) return;
    for_pairs([&](int r, int i) {
      if (!range.has(t + r)) return;
      const auto of = [&](int n) { return pairs.columns[i] > n ? to_float(at(r, i)[n * v.w]) : 0.0f; };
      to[r][i] = adjacent && pairs.columns[i] == 2 ? load_word(at(r, i)) : pack<Element>(of(0), of(1));
    });
  }
  __device__ __forceinline__ void store(const PairRows& from, int t, const RowRange& range, int64_t planes = 0) const {
    const At at = rows(t, planes);
    const bool at_once = adjacent && pairs.whole && range.has_all(t);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (pairs.columns[i] == 0) continue;
      if (at_once) {
#pragma unroll
        for (int r = 0; r < STEP; ++r) store_word(at(r, i), from[r][i]);
        continue;
      }
#pragma unroll
      for (int r = 0; r < STEP; ++r) {
        if (!range.has(t + r)) continue;
        if (adjacent && pairs.columns[i] == 2) {
          store_word(at(r, i), from[r][i]);
          continue;
        }
#pragma unroll
        for (int n = 0; n < 2; ++n)
          if (n < pairs.columns[i]) at(r, i)[n * v.w] = from_float<T>(unpack<T>(from[r][i], n));
      }
    }
  }
};

}  // namespace focalnet::cuda

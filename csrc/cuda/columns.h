// Matrices of tokens and channels, read 16 bytes at a time. Where a token's channels are adjacent, a thread has some
// columns of channels and goes down the tokens, so that what it adds up stays with it. Where a channel's tokens are, a
// block has a part of one line of them.
#pragma once

#include <algorithm>

#include "cuda/device.h"

namespace focalnet::cuda {

// How a block's threads share columns: `groups` of 16 bytes of them, and `lanes` tokens side by side.
struct ColumnsTiling {
  int groups, lanes;
  int64_t tiles;  // of so many groups

  static constexpr int THREADS = 256, MOST = 32;
  template <class T>
  static constexpr int WIDTH = 16 / sizeof(T);  // columns of a group

  __host__ __device__ ColumnsTiling(int64_t columns, int64_t bytes) {
    const int64_t all = (columns * bytes + 15) / 16;
    tiles = (all + MOST - 1) / MOST;
    groups = int((all + tiles - 1) / tiles);
    lanes = THREADS / groups;
  }
  // blocks that share a tile's tokens: enough for the device, each with some for every lane
  int64_t parts(int64_t tokens) const {
    return std::max<int64_t>(1, std::min(tokens / (8 * lanes), 8 * current_device().processors / tiles));
  }
};

// What a thread has: its first column, and which tokens.
struct ColumnsAt {
  int64_t part, tile;
  int group, lane;
  __device__ explicit ColumnsAt(const ColumnsTiling& tiling)
      : part(blockIdx.x / tiling.tiles),
        tile(blockIdx.x % tiling.tiles),
        group(int(threadIdx.x) % tiling.groups),
        lane(int(threadIdx.x) / tiling.groups) {}
  template <class T>
  __device__ int64_t column(const ColumnsTiling& tiling) const {
    return (tile * tiling.groups + group) * ColumnsTiling::WIDTH<T>;
  }
};

// Columns of a thread.
template <class T>
struct alignas(16) Columns {
  static constexpr int N = ColumnsTiling::WIDTH<T>;
  T values[N];
  __device__ float operator[](int i) const { return to_float(values[i]); }
  __device__ void set(int i, float value) { values[i] = from_float<T>(value); }
};
template <class T>
__device__ Columns<T> load_columns(const T* p) {
  return *reinterpret_cast<const Columns<T>*>(p);
}
template <class T>
__device__ void store_columns(T* p, const Columns<T>& columns) {
  *reinterpret_cast<Columns<T>*>(p) = columns;
}

// The sums over a block's lanes, written by the first of them to `to`, as many as are below `n`. `area`: a float for
// every value of every thread.
template <int N>
__device__ void sum_columns(const float (&values)[N], const ColumnsTiling& tiling, const ColumnsAt& at, float* area,
                            int64_t first, int64_t n, float* to) {
  __syncthreads();  // `area` may still be read
  if (at.lane < tiling.lanes)
#pragma unroll
    for (int i = 0; i < N; ++i) area[(at.lane * N + i) * tiling.groups + at.group] = values[i];
  __syncthreads();
  if (at.lane > 0) return;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float sum = 0;
    for (int lane = 0; lane < tiling.lanes; ++lane) sum += area[(lane * N + i) * tiling.groups + at.group];
    if (first + i < n) to[first + i] = sum;
  }
}

// Lines of tokens: which one a block has, and f(first token) of each thread's accesses.
struct LinesAt {
  int64_t line, part, parts;
  __device__ explicit LinesAt(int64_t lines)
      : line(blockIdx.x % lines), part(blockIdx.x / lines), parts(gridDim.x / lines) {}
  template <class T, class F>
  __device__ void each(int64_t tokens, const F& f) const {
    constexpr int N = Columns<T>::N;
#pragma unroll 4
    for (int64_t i = (part * ColumnsTiling::THREADS + threadIdx.x) * N; i < tokens;
         i += parts * ColumnsTiling::THREADS * N)
      f(i);
  }
};
inline int64_t line_parts(int64_t lines, int64_t tokens) {
  const int64_t enough = 8 * current_device().processors;
  return std::max<int64_t>(1, std::min(tokens / (16 * ColumnsTiling::THREADS), (enough + lines - 1) / lines));
}

// Whether a map is lines of whole accesses.
inline bool in_lines(const Geometry& g, const MapView& v, DType dtype) {
  const int64_t width = dtype == DType::f32 ? 4 : 8;
  return g.B == 1 && g.T == 1 && g.M == 1 && v.w == 1 && g.W % width == 0 && v.c % width == 0 &&
         reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

// Whether a map's tokens lie one after the other, its channels adjacent and in whole groups.
inline bool in_columns(const Geometry& g, const MapView& v, DType dtype) {
  const int64_t width = dtype == DType::f32 ? 4 : 8;
  const bool in_a_row = (g.W == 1 || v.w > 0) && (g.M == 1 || v.m == g.W * v.w) &&
                        (g.T == 1 || v.t == g.M * g.W * v.w) && (g.B == 1 || v.b == g.pixels() * v.w);
  return v.c == 1 && in_a_row && v.w % width == 0 && reinterpret_cast<uintptr_t>(v.data) % 16 == 0;
}

}  // namespace focalnet::cuda

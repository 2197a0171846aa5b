// Planes of floats with zeros around them, and the depthwise convolution over them: any kernel size, any map.
#pragma once

#include <algorithm>

#include "cuda/device.h"

namespace focalnet::cuda {

constexpr int ROWS = 2;  // rows of outputs (along T) that a thread computes at once, so that they share their inputs

// A level's taps in shared memory: kernel rows of `kw` floats, each padded to whole quads.
__host__ __device__ inline int padded_taps(const Level& k) { return int(k.kt * k.km) * (int(k.kw + 3) / 4 * 4); }

// Pixel (t, m, w) lies at ((t + top) * MP + m + side) * WP + left + w. Every row starts on a boundary of four floats.
struct Frame {
  int T, M, W;
  int top, side, left;
  int MP, WP;
  int size;
  int across, segments;  // segments of ROWS x 4 pixels: along W, and in all

  __host__ __device__ Frame(const Chain& chain) {
    T = int(chain.g.T), M = int(chain.g.M), W = int(chain.g.W);
    top = side = left = 0;
    for (int l = 0; l < chain.L; ++l) {
      const Level& k = chain.levels[l].size;
      top = std::max(top, int(k.rt())), side = std::max(side, int(k.rm())), left = std::max(left, int(k.rw()));
    }
    left = (left + 3) / 4 * 4;
    across = (W + 3) / 4;
    MP = M + 2 * side, WP = 4 * across + 2 * left;
    size = (T + 2 * top + ROWS - 1) * MP * WP;
    segments = (T + ROWS - 1) / ROWS * M * across;
  }
  __device__ int offset(int t, int m, int w) const { return ((t + top) * MP + m + side) * WP + left + w; }
};

// ROWS x 4 pixels: rows t, t + 1, columns w .. w + 3.
struct Segment {
  int t, m, w, columns;  // columns: how many are inside the map
  __device__ Segment(const Frame& f, int i) {
    w = i % f.across * 4;
    m = i / f.across % f.M;
    t = i / f.across / f.M * ROWS;
    columns = f.W - w < 4 ? f.W - w : 4;
  }
  __device__ bool has(const Frame& f, int row, int column) const { return t + row < f.T && column < columns; }
};

// N floats, whole quads from a boundary of four.
template <int N>
__device__ void load_quads(const float* from, float (&to)[N]) {
#pragma unroll
  for (int i = 0; i < N; i += 4) {
    const float4 quad = *reinterpret_cast<const float4*>(from + i);
    to[i] = quad.x, to[i + 1] = quad.y, to[i + 2] = quad.z, to[i + 3] = quad.w;
  }
}

// acc += the convolution of `plane` at a segment; kernel rows of KW taps, 0 for any number.
template <int KW>
__device__ void convolve_rows(const float* plane, const Frame& f, const float* taps, const Level& k, const Segment& s,
                              float (&acc)[ROWS][4]) {
  const int kt = int(k.kt), km = int(k.km), kw = KW ? KW : int(k.kw), padded = (kw + 3) / 4 * 4;
  for (int i = 0; i < kt + ROWS - 1; ++i)
    for (int j = 0; j < km; ++j) {
      const float* row = plane + f.offset(s.t - kt / 2 + i, s.m - km / 2 + j, s.w);
      if constexpr (KW > 0) {
        constexpr int REACH = KW / 2, LEFT = (REACH + 3) / 4 * 4;
        float x[2 * LEFT + 4];
        load_quads(row - LEFT, x);
#pragma unroll
        for (int r = 0; r < ROWS; ++r) {
          if (i < r || i - r >= kt) continue;
          const float* row_taps = taps + ((i - r) * km + j) * padded;
#pragma unroll
          for (int q = 0; q < (KW + 3) / 4; ++q) {
            float tap[4];
            load_quads(row_taps + 4 * q, tap);
#pragma unroll
            for (int a = 0; a < 4; ++a)
              if (4 * q + a < KW) {
#pragma unroll
                for (int c = 0; c < 4; ++c) acc[r][c] += x[LEFT - REACH + 4 * q + a + c] * tap[a];
              }
          }
        }
      } else {
        for (int r = 0; r < ROWS; ++r) {
          if (i < r || i - r >= kt) continue;
          const float* row_taps = taps + ((i - r) * km + j) * padded;
          for (int a = 0; a < kw; ++a)
            for (int c = 0; c < 4; ++c) acc[r][c] += row[a - kw / 2 + c] * row_taps[a];
        }
      }
    }
}

__device__ inline void convolve(const float* plane, const Frame& f, const float* taps, const Level& k, const Segment& s,
                                float (&acc)[ROWS][4]) {
  const auto run = [&](auto kw) { convolve_rows<kw>(plane, f, taps, k, s, acc); };
  if (!with_constant<3, 5, 7, 9>(k.kw, run)) run(std::integral_constant<int, 0>());
}

// Copies a channel's taps of all levels to shared memory, padded; `flipped`: in reverse order, which turns the
// convolution into its transpose.
template <class T>
__device__ void load_taps(const Chain& p, int64_t channel, float* to, bool flipped, int thread, int threads) {
  for (int l = 0; l < p.L; ++l) {
    const Level& k = p.levels[l].size;
    const int padded = int(k.kw + 3) / 4 * 4, n = padded_taps(k);
    for (int i = thread; i < n; i += threads) {
      int w = i % padded, m = i / padded % int(k.km), t = i / padded / int(k.km);
      float tap = 0;
      if (w < k.kw) {
        if (flipped) w = int(k.kw) - 1 - w, m = int(k.km) - 1 - m, t = int(k.kt) - 1 - t;
        tap = to_float(*element<const T>(p.levels[l].weights, 0, channel, t, m, w));
      }
      to[i] = tap;
    }
    to += n;
  }
}

// Fills a plane's pixels with ctx.
template <class T>
__device__ float load_ctx(const Chain& p, const Frame& f, int64_t image, int64_t channel, bool valid, float* plane,
                          int thread, int threads) {
  const float bias = valid ? of_vector<T>(p.ctx_bias, channel) : 0.0f;
  float sum = 0;
  for (int i = thread; i < f.T * f.M * f.W; i += threads) {
    const int w = i % f.W, m = i / f.W % f.M, t = i / f.W / f.M;
    const float value = valid ? to_float(*element<const T>(p.ctx, image, channel, t, m, w)) + bias : 0.0f;
    if (plane) plane[f.offset(t, m, w)] = value;
    sum += value;
  }
  return sum;
}

// Gate `level` of row `row` of a segment.
template <class T>
__device__ void load_gate(const Chain& p, int64_t image, int level, const Segment& s, int row, float (&to)[4]) {
  load_quad(element<const T>(p.gates, image, level, s.t + row, s.m, s.w), p.gates.w, s.columns, to);
  const float bias = of_vector<T>(p.gates_bias, level);
  for (int c = 0; c < 4; ++c) to[c] += bias;
}

}  // namespace focalnet::cuda

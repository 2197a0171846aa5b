// A tile of tokens by all channels, where LayerNorm needs a token's every channel: a lane per token, warps share the
// channels.
#pragma once

#include <algorithm>

#include "cuda/device.h"

namespace focalnet::cuda {

constexpr int TOKENS = 32, WARPS = 8;

// Pixel i of all images.
struct Pixel {
  int64_t b = 0, t = 0, m = 0, w;
  __device__ Pixel(const Geometry& g, int64_t i) : w(i) {
    if (i < g.W) return;  // divisions are expensive
    w = i % g.W, i /= g.W;
    m = i % g.M, i /= g.M;
    t = i % g.T, b = i / g.T;
  }
  template <class T>
  __device__ T* in(const MapView& v, int64_t c) const {
    return element<T>(v, b, c, t, m, w);
  }
};

template <class T>
__device__ float query(const ModulateForward& p, const Pixel& at, int64_t c) {
  return to_float(*at.in<const T>(p.q, c)) + of_vector<T>(p.q_bias, c);
}
template <class T>
__device__ float modulator(const ModulateForward& p, const Pixel& at, int64_t c) {
  return to_float(*at.in<const T>(p.modulator, c)) + of_vector<T>(p.bias, c);
}
template <class T>
__device__ float product(const ModulateForward& p, const Pixel& at, int64_t c) {
  return query<T>(p, at, c) * modulator<T>(p, at, c);
}

// The sum over the warps' values of this lane's token. `area`: a float per thread.
__device__ inline float token_sum(float value, float* area) {
  __syncthreads();  // `area` may still be read
  area[threadIdx.x] = value;
  __syncthreads();
  float sum = 0;
  for (int i = 0; i < WARPS; ++i) sum += area[i * TOKENS + threadIdx.x % TOKENS];
  return sum;
}

struct Normalizer {
  float mean, rstd;
};
// LayerNorm's, of this lane's token: two passes, as the sum of squares alone cancels.
template <class T>
__device__ Normalizer normalizer(const ModulateForward& p, const Pixel& at, float* area) {
  float sum = 0;
  for (int64_t c = threadIdx.x / TOKENS; c < p.g.C; c += WARPS) sum += product<T>(p, at, c);
  const float mean = token_sum(sum, area) / float(p.g.C);
  sum = 0;
  for (int64_t c = threadIdx.x / TOKENS; c < p.g.C; c += WARPS) {
    const float off = product<T>(p, at, c) - mean;
    sum += off * off;
  }
  return {mean, rsqrtf(token_sum(sum, area) / float(p.g.C) + p.ln_eps)};
}

}  // namespace focalnet::cuda

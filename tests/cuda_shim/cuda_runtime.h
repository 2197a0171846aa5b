// A stub header that emulates CUDA's language on a CPU, for tests: as much of it as csrc/cuda uses. A kernel's threads
// are fibres of one CPU thread (fibres.h), which run in a random order from one synchronization to the next.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>

#include "fibres.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__
#define __launch_bounds__(...)

struct uint4 {
  unsigned x, y, z, w;
};
struct uint2 {
  unsigned x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) float2 {
  float x, y;
};

#define threadIdx (focalnet_shim::running().thread)
#define blockIdx (focalnet_shim::running().block)
#define gridDim (focalnet_shim::running().grid)
#define blockDim (focalnet_shim::running().size)

inline void __syncthreads(focalnet_shim::Place place = focalnet_shim::Place::current()) {
  focalnet_shim::wait_for_block(place);
}
inline void __syncwarp(unsigned = 0xffffffffu, focalnet_shim::Place place = focalnet_shim::Place::current()) {
  focalnet_shim::wait_for_warp(place);
}

template <class T>
T __shfl_xor_sync(unsigned, T value, int mask) {
  return focalnet_shim::exchange(value, focalnet_shim::lane() ^ mask);
}
template <class T>
T __shfl_sync(unsigned, T value, int source) {
  return focalnet_shim::exchange(value, source);
}

inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t bytes = a | uint64_t(b) << 32;
  unsigned picked = 0;
  for (int i = 0; i < 4; ++i) picked |= unsigned(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return picked;
}
inline float __expf(float x) { return std::exp(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
using std::erff;
using std::exp2f;
using std::fmaxf;
using std::fminf;

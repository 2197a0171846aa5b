// What every kernel needs: elements as floats, GELU, sums over threads.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstring>
#include <type_traits>

#include "cuda/kernels.h"
#include "cuda/launch.h"

namespace focalnet::cuda {

__device__ inline float to_float(float v) { return v; }
__device__ inline float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(__half v) { return __half2float(v); }

template <class T>
__device__ T from_float(float v);
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}
template <>
__device__ inline __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline __half from_float<__half>(float v) {
  return __float2half_rn(v);
}

// Runs f(T()) with the storage type of `dtype`.
template <class F>
void with_type(DType dtype, const F& f) {
  switch (dtype) {
    case DType::f32:
      return f(float());
    case DType::bf16:
      return f(__nv_bfloat16());
    case DType::f16:
      return f(__half());
  }
}

// f(std::integral_constant<int, N>()) with that N of NUMBERS which `n` is; false where it is none of them.
template <int... NUMBERS, class N, class F>
__host__ __device__ bool with_constant(N n, const F& f) {
  return ((n == NUMBERS && (f(std::integral_constant<int, NUMBERS>()), true)) || ...);
}

template <class T>
__device__ T* element(const MapView& v, int64_t b, int64_t c, int64_t t, int64_t m, int64_t w) {
  return static_cast<T*>(v.data) + b * v.b + c * v.c + t * v.t + m * v.m + w * v.w;
}

template <class T>
__device__ float of_vector(const Vector& v, int64_t i) {
  return v.data ? to_float(static_cast<const T*>(v.data)[i * v.stride]) : 0.0f;
}

// Four elements `stride` apart, of which the first n are there; as one access where they lie so.
template <class T>
struct alignas(4 * sizeof(T)) Quad {
  T values[4];
};
template <class T>
__device__ bool one_access(const T* p, int64_t stride, int n) {
  return stride == 1 && n >= 4 && reinterpret_cast<uintptr_t>(p) % sizeof(Quad<T>) == 0;
}
template <class T>
__device__ void load_quad(const T* p, int64_t stride, int n, float (&to)[4]) {
  if (one_access(p, stride, n)) {
    const Quad<T> quad = *reinterpret_cast<const Quad<T>*>(p);
    for (int i = 0; i < 4; ++i) to[i] = to_float(quad.values[i]);
  } else {
    for (int i = 0; i < 4; ++i) to[i] = i < n ? to_float(p[i * stride]) : 0.0f;
  }
}
template <class T>
__device__ void store_quad(T* p, int64_t stride, int n, const float (&from)[4]) {
  if (one_access(p, stride, n)) {
    Quad<T> quad;
    for (int i = 0; i < 4; ++i) quad.values[i] = from_float<T>(from[i]);
    *reinterpret_cast<Quad<T>*>(p) = quad;
  } else {
    for (int i = 0; i < 4; ++i)
      if (i < n) p[i * stride] = from_float<T>(from[i]);
  }
}

// Two 16-bit elements in a word.
template <class T>
__device__ uint32_t pack(float a, float b) {
  uint32_t word;
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const __nv_bfloat162 both = __floats2bfloat162_rn(a, b);  // one instruction
    memcpy(&word, &both, 4);
  } else {
    const __half2 both = __floats2half2_rn(a, b);
    memcpy(&word, &both, 4);
  }
  return word;
}
template <class T>
__device__ float unpack(uint32_t word, int i) {
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {  // a float's upper half
    const uint32_t bits = i ? word & 0xffff0000u : word << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
  } else {
    T two[2];
    memcpy(two, &word, 4);
    return to_float(two[i]);
  }
}
// A word wherever elements lie on four bytes.
__device__ inline uint32_t load_word(const void* p) { return *static_cast<const uint32_t*>(p); }
__device__ inline void store_word(void* p, uint32_t word) { *static_cast<uint32_t*>(p) = word; }

// 2^x and 1 / x as the special function unit has them: the standard functions spend as many instructions again on
// denormal numbers.
__device__ inline float exp2_approx(float x) {
#ifdef __CUDA_ARCH__
  asm("ex2.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return exp2f(x);
#endif
}
__device__ inline float reciprocal_approx(float x) {
#ifdef __CUDA_ARCH__
  asm("rcp.approx.ftz.f32 %0, %0;" : "+f"(x));
  return x;
#else
  return 1.0f / x;
#endif
}

// x * Phi(x). bfloat16 takes Phi as the logistic function of an odd quintic, 3e-5 off at most: its rounding of values
// near 1 is 100 times that, and erf costs three times the instructions.
__device__ inline float logistic_phi(float x) {
  constexpr float TO_BITS = -1.4426950408889634f;  // e^-y = 2^(TO_BITS y)
  const float s = fminf(x * x, 42.25f);            // beyond |x| = 6.5 the polynomial would turn back
  const float y = x * (TO_BITS * 1.59501577f + s * (TO_BITS * 0.07401129f - s * (TO_BITS * 0.00070303f)));
  return reciprocal_approx(1.0f + exp2_approx(y));
}
template <class T>
__device__ float gelu(float x) {
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, __half>) return x * logistic_phi(x);
  return 0.5f * x * (1.0f + erff(x * 0.7071067811865476f));
}
// And its derivative, Phi(x) + x phi(x).
struct Gelu {
  float value, slope;
};
template <class T>
__device__ Gelu gelu_and_slope(float x) {
  if constexpr (sizeof(T) == 2 && !std::is_same_v<T, __half>) {
    const float phi = logistic_phi(x), s = fminf(x * x, 42.25f), value = x * phi;
    return {value, phi + value * (1.0f - phi) * (1.59501577f + s * (0.22203387f - s * 0.00351515f))};
  }
  const float phi = 0.5f * (1.0f + erff(x * 0.7071067811865476f));
  const float bell = exp2f(x * x * -0.7213475204444817f) * 0.3989422804014327f;
  return {x * phi, phi + x * bell};
}
template <class T>
__device__ float gelu_slope(float x) {
  return gelu_and_slope<T>(x).slope;
}

// The sum over each `lanes` neighbours of a warp, a power of two, for every one of them.
__device__ inline float warp_sum(float value, int lanes = 32) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The sum over each `group` of the block's threads, in a fixed order, for every one of them. `area`: a float per warp.
__device__ inline float group_sum(float value, float* area, int group) {
  value = warp_sum(value);
  __syncthreads();  // `area` may still be read
  if (threadIdx.x % 32 == 0) area[threadIdx.x / 32] = value;
  __syncthreads();
  const int warps = group / 32, first = threadIdx.x / group * warps;
  float sum = 0;
  for (int i = 0; i < warps; ++i) sum += area[first + i];
  return sum;
}

}  // namespace focalnet::cuda

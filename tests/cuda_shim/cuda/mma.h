// Replaces csrc/cuda/mma.h: emulates the tensor cores' instructions over the warp's mailboxes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <stdexcept>

namespace focalnet::cuda {

using SharedRow = const char*;
inline SharedRow shared_row(const void* row) { return static_cast<SharedRow>(row); }

inline uint32_t lane_again() { return focalnet_shim::lane(); }

template <int OFFSET, int ROW>
uint32_t load_shared_row(SharedRow at, int rows) {
  uint32_t word = 0;
  if (rows > ROW) std::memcpy(&word, at + OFFSET, 4);
  return word;
}
template <int OFFSET, int ROW>
void store_shared_row(SharedRow at, int rows, uint32_t word) {
  if (rows > ROW) std::memcpy(const_cast<char*>(at) + OFFSET, &word, 4);
}

struct MatrixRow {
  uint16_t elements[8];
};

template <int OFFSET = 0>
void load_matrices(uint32_t (&a)[4], SharedRow first) {
  const SharedRow row = first + OFFSET;
  MatrixRow mine;
  std::memcpy(&mine, row, 16);
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not 16-byte aligned");
  focalnet_shim::show(mine);
  const int lane = focalnet_shim::lane();
  for (int m = 0; m < 4; ++m) {
    const MatrixRow from = focalnet_shim::shown_by<MatrixRow>(8 * m + lane / 4);
    std::memcpy(&a[m], &from.elements[lane % 4 * 2], 4);
  }
}
template <int OFFSET = 0>
void load_transposed(uint32_t (&a)[4], SharedRow first) {
  const SharedRow row = first + OFFSET;
  MatrixRow mine;
  std::memcpy(&mine, row, 16);
  if (reinterpret_cast<uintptr_t>(row) % 16) throw std::runtime_error("ldmatrix: a row is not 16-byte aligned");
  focalnet_shim::show(mine);
  const int lane = focalnet_shim::lane();
  for (int m = 0; m < 4; ++m) {
    const uint16_t low = focalnet_shim::shown_by<MatrixRow>(8 * m + lane % 4 * 2).elements[lane / 4];
    const uint16_t high = focalnet_shim::shown_by<MatrixRow>(8 * m + lane % 4 * 2 + 1).elements[lane / 4];
    a[m] = low | uint32_t(high) << 16;
  }
}

inline uint32_t transpose(uint32_t a) {
  focalnet_shim::show(a);
  const int lane = focalnet_shim::lane(), g = lane / 4, q = lane % 4;
  uint32_t result = 0;
  for (int i = 0; i < 2; ++i) {
    const uint32_t two = focalnet_shim::shown_by<uint32_t>(4 * (2 * q + i) + g / 2);
    result |= (two >> 16 * (g % 2) & 0xffff) << 16 * i;
  }
  return result;
}

inline float half_of(uint32_t two, int i, __nv_bfloat16) { return __bfloat162float({uint16_t(two >> 16 * i)}); }
inline float half_of(uint32_t two, int i, __half) {
  const uint16_t bits = uint16_t(two >> 16 * i);
  __half value;
  std::memcpy(&value, &bits, 2);
  return __half2float(value);
}

template <class T>
void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint2& b) {
  struct Operands {
    uint32_t a[4];
    uint2 b;
  } mine;
  std::memcpy(mine.a, a, 16);
  mine.b = b;
  focalnet_shim::show(mine);
  const int lane = focalnet_shim::lane(), g = lane / 4, q = lane % 4;
  for (int k = 0; k < 16; ++k) {
    const int holder = k % 8 / 2, half = k % 2, upper = k / 8;
    const Operands left = focalnet_shim::shown_by<Operands>(4 * g + holder);
    for (int column = 0; column < 2; ++column) {
      const Operands right = focalnet_shim::shown_by<Operands>(4 * (2 * q + column) + holder);
      const float r = half_of(upper ? right.b.y : right.b.x, half, T());
      d[column] += half_of(left.a[2 * upper], half, T()) * r;
      d[2 + column] += half_of(left.a[2 * upper + 1], half, T()) * r;
    }
  }
}

}  // namespace focalnet::cuda

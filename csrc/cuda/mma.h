// The tensor cores' instructions. (A test build has a header of this name that does the same with the warp's
// mailboxes.)
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace focalnet::cuda {

// Where a row of 16 bytes lies in shared memory; bytes may be added.
using SharedRow = uint32_t;
__device__ inline SharedRow shared_row(const void* row) { return SharedRow(__cvta_generic_to_shared(row)); }

// This lane, read anew: kept from use to use it would take a register all the while. (Unsigned, to be divided by
// shifts.)
__device__ inline uint32_t lane_again() {
  uint32_t lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// A word of shared memory, OFFSET bytes behind `at`, of row ROW, where there are more rows than that, or zeros; and
// into it. (An `if` would be a branch for each.)
template <int OFFSET, int ROW>
__device__ uint32_t load_shared_row(SharedRow at, int rows) {
  uint32_t word = 0;
  asm volatile("{.reg .pred %%has; setp.gt.s32 %%has, %2, %3; @%%has ld.shared.b32 %0, [%1+%4];}"
               : "+r"(word)
               : "r"(at), "r"(rows), "n"(ROW), "n"(OFFSET)
               : "memory");
  return word;
}
template <int OFFSET, int ROW>
__device__ void store_shared_row(SharedRow at, int rows, uint32_t word) {
  asm volatile("{.reg .pred %%has; setp.gt.s32 %%has, %1, %2; @%%has st.shared.b32 [%0+%3], %4;}" ::"r"(at), "r"(rows),
               "n"(ROW), "n"(OFFSET), "r"(word)
               : "memory");
}

// Four 8 x 8 matrices of 16-bit elements from shared memory: lane i points to the 16 bytes of row i % 8 of matrix i
// / 8, OFFSET bytes before it. Lane i gets elements (i / 4, 2 * (i % 4)) and the next of each.
template <int OFFSET = 0>
__device__ void load_matrices(uint32_t (&a)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row), "n"(OFFSET)
               : "memory");
}
// The same, each transposed.
template <int OFFSET = 0>
__device__ void load_transposed(uint32_t (&a)[4], SharedRow row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4+%5];"
               : "=r"(a[0]), "=r"(a[1]), "=r"(a[2]), "=r"(a[3])
               : "r"(row), "n"(OFFSET)
               : "memory");
}

// An 8 x 8 matrix held as above, transposed.
__device__ inline uint32_t transpose(uint32_t a) {
  uint32_t transposed;
  asm volatile("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(transposed) : "r"(a));
  return transposed;
}

// d (16 x 8) += a (16 x 16) b (16 x 8). Lane i = 4 g + q holds, two elements to a register,
// a: rows g, g + 8, g, g + 8, columns 2 q (+ 8 in the last two); b: column g, rows 2 q and 2 q + 8;
// d: row g, columns 2 q, 2 q + 1, then row g + 8.
template <class T>
__device__ void multiply_add(float (&d)[4], const uint32_t (&a)[4], const uint2& b);
template <>
__device__ inline void multiply_add<__nv_bfloat16>(float (&d)[4], const uint32_t (&a)[4], const uint2& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}
template <>
__device__ inline void multiply_add<__half>(float (&d)[4], const uint32_t (&a)[4], const uint2& b) {
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b.x), "r"(b.y));
}

}  // namespace focalnet::cuda

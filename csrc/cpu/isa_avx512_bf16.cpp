// The kernels for AVX512_BF16.
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif
#define FK_ISA avx512_bf16
#define FK_LANES 16
#define FK_X86
#define FK_F16C
#define FK_AVX512_BF16
#include "cpu/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

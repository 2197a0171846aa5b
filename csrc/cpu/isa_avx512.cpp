// The kernels for AVX512.
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
                             apply_to = function)
#else
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif
#define FK_ISA avx512
#define FK_LANES 16
#define FK_X86
#define FK_F16C
#include "cpu/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

// The kernels for AVX2.
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define FK_ISA avx2
#define FK_LANES 8
#define FK_X86
#define FK_F16C
#include "cpu/isa.h"
#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

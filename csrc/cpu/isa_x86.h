// isa.h compiled for FK_TARGET; nothing where the machine is not an x86-64. Included by isa_*.cpp, once each.
//
// Other headers come before the target is set: what they define belongs to every instruction set.
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>

#define FK_PRAGMA_(text) _Pragma(#text)
#define FK_PRAGMA(text) FK_PRAGMA_(text)

#if defined(__clang__)
FK_PRAGMA(clang attribute push(__attribute__((target(FK_TARGET))), apply_to = function))
#else
FK_PRAGMA(GCC target(FK_TARGET))
#endif

#define FK_X86  // at least AVX2, FMA and F16C
#include "cpu/isa.h"

#if defined(__clang__)
#pragma clang attribute pop
#endif
#endif

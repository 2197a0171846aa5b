// The kernels for any machine: whatever 128-bit vectors the compiler's baseline has (SSE2, NEON).
#include <cstdint>
#include <utility>

#include "cpu/kernels.h"

#define FK_ISA portable
#define FK_LANES 4
#include "cpu/isa.h"

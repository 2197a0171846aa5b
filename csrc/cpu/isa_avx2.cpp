// The kernels for AVX2.
#define FK_ISA avx2
#define FK_LANES 8
#define FK_TARGET "avx2,fma,f16c"
#include "cpu/isa_x86.h"

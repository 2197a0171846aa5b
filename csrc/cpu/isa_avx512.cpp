// The kernels for AVX512.
#define FK_ISA avx512
#define FK_LANES 16
#define FK_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"
#include "cpu/isa_x86.h"

// The kernels for AVX512_BF16.
#define FK_ISA avx512_bf16
#define FK_LANES 16
#define FK_TARGET "avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"
#define FK_AVX512_BF16
#include "cpu/isa_x86.h"

// Which instruction set runs: the best one here, or the one that FOCALNET_KERNELS_CPU_ISA names, in whatever case.
#include <cctype>
#include <cstdlib>
#include <stdexcept>
#include <string>

#include "cpu/kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

namespace focalnet::cpu {

namespace {

struct Candidate {
  const Kernels* kernels;
  bool here;
};

#if defined(__x86_64__)
// What not every compiler's __builtin_cpu_supports knows. Whether the system keeps the registers, AVX2 and AVX-512 say.
bool has_f16c() {
  unsigned a, b, c, d;
  return __get_cpuid(1, &a, &b, &c, &d) && c >> 29 & 1;
}
bool has_avx512_bf16() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && a >> 5 & 1;
}
#endif

// the best one first
const Candidate* candidates(size_t* n) {
#if defined(__x86_64__)
  __builtin_cpu_init();
  static const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  static const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                             __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  static const Candidate all[] = {
      {&avx512_bf16_kernels, avx512 && has_avx512_bf16()},
      {&avx512_kernels, avx512},
      {&avx2_kernels, avx2},
      {&portable_kernels, true},
  };
#else
  static const Candidate all[] = {{&portable_kernels, true}};
#endif
  *n = sizeof(all) / sizeof(all[0]);
  return all;
}

}  // namespace

const Kernels& kernels() {
  size_t n;
  const Candidate* all = candidates(&n);
  const char* variable = std::getenv("FOCALNET_KERNELS_CPU_ISA");
  const std::string given = variable == nullptr ? "" : variable;
  std::string wanted = given;
  for (char& letter : wanted) letter = char(std::tolower(static_cast<unsigned char>(letter)));
  for (size_t i = 0; i < n; ++i)
    if (all[i].here && (wanted.empty() || wanted == all[i].kernels->name)) return *all[i].kernels;
  std::string here;
  for (size_t i = 0; i < n; ++i)
    if (all[i].here) here += std::string(here.empty() ? "" : ", ") + all[i].kernels->name;
  throw std::runtime_error("environment variable FOCALNET_KERNELS_CPU_ISA: expected one of this machine's " + here +
                           ", got '" + given + "'");
}

}  // namespace focalnet::cpu

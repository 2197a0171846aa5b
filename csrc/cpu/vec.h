// Vectors of FK_LANES floats, loads and stores in every storage dtype, GELU.
//
// Included once per instruction set, inside that set's namespace (see isa.h): the same source becomes
// portable, AVX2 and AVX-512 code through the compiler's vector extension (GCC, clang). Everything is forced
// inline so that no function compiled for one instruction set can be linked into another's.

#define FK_INLINE inline __attribute__((always_inline))

constexpr int VL = FK_LANES;

typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
// the same, at any address and aliasing anything
typedef float vf_any __attribute__((vector_size(VL * 4), aligned(2), may_alias));  // 2: also pairs of bfloat16
typedef uint16_t vh_any __attribute__((vector_size(VL * 2), aligned(2), may_alias));

// Storage dtypes. 16-bit values are computed in float.
struct bf16 {
  uint16_t bits;
};
struct f16 {
  uint16_t bits;
};

FK_INLINE int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }
// How many lanes of a vector there are values for, of `left` ones.
FK_INLINE int lanes_of(int64_t left) { return int(at_most(left, VL)); }

FK_INLINE vf splat(float x) { return x - vf{}; }
FK_INLINE vf absolute(vf x) { return reinterpret_cast<vf>(reinterpret_cast<vi>(x) & 0x7fffffff); }

// x86 has these as one instruction each; compilers do not find them behind the general form.
// min and max give b where a is NaN. rough_reciprocal: relative error 4e-4 at most.
#if defined(FK_X86) && FK_LANES == 16
FK_INLINE vf min(vf a, vf b) { return reinterpret_cast<vf>(_mm512_min_ps((__m512)a, (__m512)b)); }
FK_INLINE vf max(vf a, vf b) { return reinterpret_cast<vf>(_mm512_max_ps((__m512)a, (__m512)b)); }
FK_INLINE vf rough_reciprocal(vf x) { return reinterpret_cast<vf>(_mm512_rcp14_ps((__m512)x)); }
FK_INLINE vu widen(vh x) { return reinterpret_cast<vu>(_mm512_cvtepu16_epi32((__m256i)x)); }
#elif defined(FK_X86)
FK_INLINE vf min(vf a, vf b) { return reinterpret_cast<vf>(_mm256_min_ps((__m256)a, (__m256)b)); }
FK_INLINE vf max(vf a, vf b) { return reinterpret_cast<vf>(_mm256_max_ps((__m256)a, (__m256)b)); }
FK_INLINE vf rough_reciprocal(vf x) { return reinterpret_cast<vf>(_mm256_rcp_ps((__m256)x)); }
FK_INLINE vu widen(vh x) { return reinterpret_cast<vu>(_mm256_cvtepu16_epi32((__m128i)x)); }
#else
FK_INLINE vf min(vf a, vf b) { return a < b ? a : b; }
FK_INLINE vf max(vf a, vf b) { return a > b ? a : b; }
FK_INLINE vf rough_reciprocal(vf x) { return 1.0f / x; }
FK_INLINE vu widen(vh x) { return __builtin_convertvector(x, vu); }
#endif
// relative error about 1e-7: one Newton step from the rough one
FK_INLINE vf reciprocal(vf x) {
  vf r = rough_reciprocal(x);
  return r + r * (1.0f - x * r);
}

FK_INLINE vf load(const float* p) { return *reinterpret_cast<const vf_any*>(p); }
FK_INLINE void store(float* p, vf x) { *reinterpret_cast<vf_any*>(p) = x; }

FK_INLINE vf load(const bf16* p) {
  vh h = *reinterpret_cast<const vh_any*>(p);
  return reinterpret_cast<vf>(widen(h) << 16);
}
FK_INLINE vh to_bf16(vf x) {
#ifdef FK_AVX512_BF16
  return reinterpret_cast<vh>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x)));
#else
  vu u = reinterpret_cast<vu>(x);
  vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;  // to nearest, ties to even
  vu is_nan = reinterpret_cast<vu>(x != x);
  return __builtin_convertvector((is_nan & 0x7fc0) | (~is_nan & rounded), vh);
#endif
}
FK_INLINE void store(bf16* p, vf x) { *reinterpret_cast<vh_any*>(p) = to_bf16(x); }

#ifdef FK_X86
FK_INLINE vf load(const f16* p) {
#if FK_LANES == 16
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))));
#else
  return reinterpret_cast<vf>(_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#endif
}
FK_INLINE void store(f16* p, vf x) {
#if FK_LANES == 16
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(reinterpret_cast<__m512>(x), 0));
#else
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(reinterpret_cast<__m256>(x), 0));
#endif
}
#else
FK_INLINE float half_to_float(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, rest = uint32_t(h & 0x7fff) << 13;
  float magic, value;
  uint32_t scale = 0x77800000;  // 2^112 rebases the exponent, subnormals included
  __builtin_memcpy(&magic, &scale, 4);
  __builtin_memcpy(&value, &rest, 4);
  value *= magic;
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  if ((h & 0x7c00) == 0x7c00) bits = 0x7f800000 | rest;  // infinity, NaN
  bits |= sign;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
FK_INLINE uint16_t float_to_half(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  uint32_t sign = (bits >> 16) & 0x8000, a = bits & 0x7fffffff;
  if (a > 0x7f800000) return uint16_t(sign | 0x7e00);
  if (a >= 0x477ff000) return uint16_t(sign | 0x7c00);
  if (a < 0x38800000) {  // subnormal half: let the adder of 2^-1 round at the right bit
    float value, half = 0.5f;
    __builtin_memcpy(&value, &a, 4);
    value += half;
    __builtin_memcpy(&a, &value, 4);
    return uint16_t(sign | (a - 0x3f000000));
  }
  a += 0xfff + ((a >> 13) & 1);
  return uint16_t(sign | ((a - 0x38000000) >> 13));
}
FK_INLINE vf load(const f16* p) {
  vf x;
  for (int i = 0; i < VL; ++i) x[i] = half_to_float(p[i].bits);
  return x;
}
FK_INLINE void store(f16* p, vf x) {
  for (int i = 0; i < VL; ++i) p[i].bits = float_to_half(x[i]);
}
#endif

template <class T>
FK_INLINE float load_scalar(const T* p) {
  if constexpr (sizeof(T) == 4) {
    return *p;
  } else {
    T lane[VL] = {*p};
    return load(lane)[0];
  }
}
FK_INLINE float load_scalar(const bf16* p) {
  uint32_t bits = uint32_t(p->bits) << 16;
  float x;
  __builtin_memcpy(&x, &bits, 4);
  return x;
}

// The first n lanes, which may lie `stride` elements apart; lanes beyond n are 0.
#if defined(FK_X86) && FK_LANES == 16
FK_INLINE __mmask16 first_lanes(int n) { return __mmask16((1u << n) - 1); }
FK_INLINE vf load_first(const float* p, int n) {
  return reinterpret_cast<vf>(_mm512_maskz_loadu_ps(first_lanes(n), p));
}
FK_INLINE vf load_first(const bf16* p, int n) {
  return reinterpret_cast<vf>(widen((vh)_mm256_maskz_loadu_epi16(first_lanes(n), p)) << 16);
}
FK_INLINE vf load_first(const f16* p, int n) {
  return reinterpret_cast<vf>(_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p)));
}
FK_INLINE void store_first(float* p, int n, vf x) { _mm512_mask_storeu_ps(p, first_lanes(n), (__m512)x); }
FK_INLINE void store_first(bf16* p, int n, vf x) { _mm256_mask_storeu_epi16(p, first_lanes(n), (__m256i)to_bf16(x)); }
FK_INLINE void store_first(f16* p, int n, vf x) {
  _mm256_mask_storeu_epi16(p, first_lanes(n), _mm512_cvtps_ph((__m512)x, 0));
}
constexpr bool MASKED = true;
#else
template <class T>
FK_INLINE vf load_first(const T*, int) {
  return vf{};
}
template <class T>
FK_INLINE void store_first(T*, int, vf) {}
constexpr bool MASKED = false;
#endif
// One by one: functions of their own, for there are hundreds of calls, few of which are ever made.
template <class T>
static __attribute__((noinline)) void gather_lanes(const T* p, int n, int64_t stride, float* to) {
  T lanes[VL] = {};
  for (int i = 0; i < n; ++i) lanes[i] = p[i * stride];
  store(to, load(lanes));
}
template <class T>
static __attribute__((noinline)) void scatter_lanes(T* p, int n, int64_t stride, const float* from) {
  T lanes[VL];
  store(lanes, load(from));
  for (int i = 0; i < n; ++i) p[i * stride] = lanes[i];
}
template <class T>
FK_INLINE vf load_lanes(const T* p, int n, int64_t stride) {
  if (stride == 1 && n == VL) return load(p);
  if (MASKED && stride == 1) return load_first(p, n);
  alignas(64) float lanes[VL];
  gather_lanes(p, n, stride, lanes);
  return load(lanes);
}
template <class T>
FK_INLINE void store_lanes(T* p, int n, int64_t stride, vf x) {
  if (stride == 1 && n == VL) return store(p, x);
  if (MASKED && stride == 1) return store_first(p, n, x);
  alignas(64) float lanes[VL];
  store(lanes, x);
  scatter_lanes(p, n, stride, lanes);
}

// 2 * VL values side by side
template <class T>
FK_INLINE void store_two(T* p, vf a, vf b) {
  store(p, a);
  store(p + VL, b);
}
#ifdef FK_AVX512_BF16
FK_INLINE void store_two(bf16* p, vf a, vf b) {
  _mm512_storeu_si512(p, (__m512i)_mm512_cvtne2ps_pbh((__m512)b, (__m512)a));
}
#endif

#ifdef FK_AVX512_BF16
// sum + the products of both bfloat16 in each 32-bit lane of x and y.
FK_INLINE vf add_pair_products(vf sum, __m512i x, __m512i y) {
#if defined(__clang__) && (__clang_major__ == 16 || __clang_major__ == 17)
  // they crash where the intrinsic's operands were integers
  asm("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(x), "v"(y));
  return sum;
#else
  return reinterpret_cast<vf>(
      _mm512_dpbf16_ps((__m512)sum, reinterpret_cast<__m512bh>(x), reinterpret_cast<__m512bh>(y)));
#endif
}
#endif

// *p in every lane
template <class T>
FK_INLINE vf broadcast(const T* p) {
  return splat(load_scalar(p));
}
#if defined(FK_X86) && FK_LANES == 16
FK_INLINE vf broadcast(const bf16* p) { return reinterpret_cast<vf>((vu)_mm512_set1_epi16(short(p->bits)) << 16); }
#endif

// Lanes I of a and b side by side.
template <int... I>
FK_INLINE vf shuffled(vf a, vf b) {
#if defined(__clang__) || __GNUC__ >= 12
  return __builtin_shufflevector(a, b, I...);
#else
  return __builtin_shuffle(a, b, vi{I...});
#endif
}

// A perfect shuffle of two vectors.
template <int... I>
FK_INLINE void interleave(vf a, vf b, vf* low, vf* high, std::integer_sequence<int, I...>) {
  *low = shuffled<(I / 2 + I % 2 * VL)...>(a, b);
  *high = shuffled<(VL / 2 + I / 2 + I % 2 * VL)...>(a, b);
}

// How two vectors are mixed by one instruction each: in quarters of four lanes, singles or doubles side by side, of the
// lower or the upper half of each quarter; or whole quarters, the even or the odd ones of both.
enum class Mix { SINGLES, DOUBLES, QUARTERS };
constexpr int mixed(Mix how, bool upper, int i) {
  const int quarter = i / 4 * 4, j = i % 4, half = VL / 2, from = upper ? 2 : 0;
  if (how == Mix::SINGLES) return quarter + from + j / 2 + j % 2 * VL;
  if (how == Mix::DOUBLES) return quarter + from + j % 2 + j / 2 * VL;
  const int lane = i / 4 % (VL / 8 ? VL / 8 : 1) * 8 + (upper ? 4 : 0) + j + (i < half ? 0 : VL);
  return lane % (2 * VL);  // of a single quarter, which nobody mixes, some lane: newer clangs look at it nevertheless
}
template <Mix HOW, bool UPPER, int... I>
FK_INLINE vf mix(vf a, vf b, std::integer_sequence<int, I...>) {
  return shuffled<mixed(HOW, UPPER, I)...>(a, b);
}
template <Mix HOW, bool UPPER>
FK_INLINE vf mix(vf a, vf b) {
  return mix<HOW, UPPER>(a, b, std::make_integer_sequence<int, VL>{});
}
// Transposes VL vectors of VL 32-bit lanes: four rows at a time within the quarters, then the quarters.
FK_INLINE void transpose(vf* x) {
  vf y[VL];  // [column of a quarter][four rows]
  constexpr int GROUPS = VL / 4;
#pragma GCC unroll 4
  for (int g = 0; g < GROUPS; ++g) {
    const vf *r = x + 4 * g, low = mix<Mix::SINGLES, false>(r[0], r[1]), low2 = mix<Mix::SINGLES, false>(r[2], r[3]);
    const vf high = mix<Mix::SINGLES, true>(r[0], r[1]), high2 = mix<Mix::SINGLES, true>(r[2], r[3]);
    y[g] = mix<Mix::DOUBLES, false>(low, low2);
    y[GROUPS + g] = mix<Mix::DOUBLES, true>(low, low2);
    y[2 * GROUPS + g] = mix<Mix::DOUBLES, false>(high, high2);
    y[3 * GROUPS + g] = mix<Mix::DOUBLES, true>(high, high2);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const vf* u = y + c * GROUPS;
    if constexpr (VL == 4) {
      x[c] = u[0];
    } else if constexpr (VL == 8) {
      x[c] = mix<Mix::QUARTERS, false>(u[0], u[1]);
      x[4 + c] = mix<Mix::QUARTERS, true>(u[0], u[1]);
    } else {
      const vf even = mix<Mix::QUARTERS, false>(u[0], u[1]), even2 = mix<Mix::QUARTERS, false>(u[2], u[3]);
      const vf odd = mix<Mix::QUARTERS, true>(u[0], u[1]), odd2 = mix<Mix::QUARTERS, true>(u[2], u[3]);
      x[c] = mix<Mix::QUARTERS, false>(even, even2);
      x[4 + c] = mix<Mix::QUARTERS, false>(odd, odd2);
      x[8 + c] = mix<Mix::QUARTERS, true>(even, even2);
      x[12 + c] = mix<Mix::QUARTERS, true>(odd, odd2);
    }
  }
}

// In a tree, so that no addition waits for more than a few others.
template <int WIDTH, int... I>
FK_INLINE vf rotate(vf x, std::integer_sequence<int, I...>) {
  return shuffled<((I + WIDTH) % VL)...>(x, x);
}
template <int WIDTH = VL / 2>
FK_INLINE float sum_lanes(vf x) {
  x += rotate<WIDTH>(x, std::make_integer_sequence<int, VL>{});
  if constexpr (WIDTH > 1)
    return sum_lanes<WIDTH / 2>(x);
  else
    return x[0];
}

// 2^f for |f| <= 1/2. Relative error 8e-8; roughly, 8e-5.
template <bool ROUGH>
FK_INLINE vf exp2_fraction(vf f) {
  vf p;
  if (ROUGH) {
    p = f * 5.517074734e-02f + 2.426100958e-01f;
    p = p * f + 6.932610280e-01f;
    return p * f + 9.999281415e-01f;
  }
  p = f * 1.327640681e-03f + 9.675540431e-03f;
  p = p * f + 5.550713438e-02f;
  p = p * f + 2.402211975e-01f;
  p = p * f + 6.931469670e-01f;
  return p * f + 1.000000072e+00f;
}
// 2^x for -126 < x <= 0 and below, where it may be anything smaller.
template <bool ROUGH>
FK_INLINE vf exp2_negative(vf x) {
#if defined(FK_X86) && FK_LANES == 16
  const __m512 n = _mm512_roundscale_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return reinterpret_cast<vf>(_mm512_scalef_ps((__m512)exp2_fraction<ROUGH>(x - (vf)n), n));
#else
  x = max(x, splat(-126.0f));
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const vf shifted = x + magic;
  const vf p = exp2_fraction<ROUGH>(x - (shifted - magic));
  return reinterpret_cast<vf>(reinterpret_cast<vi>(p) + (reinterpret_cast<vi>(shifted) << 23));
#endif
}

// exp(-x^2/2) and the upper tail of the normal distribution at a = |x|, capped at 13 (beyond, both are 0 in float;
// NaN becomes 13, callers let it show elsewhere): tail = exp(-a^2/2) * R(a) with R(a) = erfcx(a / sqrt 2) / 2 as a
// polynomial in 1 / (1 + c a). Relative error 1e-7; roughly, 3e-4: a tenth of what bfloat16 rounds.
struct NormalTail {
  vf bell, tail, a;
};
template <bool ROUGH>
FK_INLINE NormalTail normal_tail(vf x) {
  vf a = min(absolute(x), splat(13.0f)), p;
  if (ROUGH) {
    vf t = rough_reciprocal(a * 0.48f + 1.0f);
    p = t * -1.263254925e-01f + 2.766998058e-01f;
    p = p * t + 1.532996729e-01f;
    p = p * t + 1.964960182e-01f;
    p = p * t + -2.347227646e-04f;
  } else {
    vf t = reciprocal(a * 0.228f + 1.0f);
    p = t * -8.498602937e-02f + 3.288751121e-01f;
    p = p * t + -3.463775807e-01f;
    p = p * t + 3.685245688e-01f;
    p = p * t + -7.329934572e-02f;
    p = p * t + 1.337297439e-01f;
    p = p * t + 8.157217854e-02f;
    p = p * t + 9.201261415e-02f;
    p = p * t + -5.127717681e-05f;
  }
  vf bell = exp2_negative<ROUGH>(a * a * -0.72134752044448170f);
  return {bell, bell * p, a};
}

template <class T>
constexpr bool ROUGH = false;
template <>
constexpr bool ROUGH<bf16> = true;

// x * Phi(x), exact (erf) GELU for values that are stored as T: relu(x) - |x| * tail(|x|) keeps its relative accuracy
// where 1 + erf cancels.
template <class T>
FK_INLINE vf gelu(vf x) {
  NormalTail n = normal_tail<ROUGH<T>>(x);
  return max(vf{}, x) - n.a * n.tail;  // max(0, NaN) is NaN
}
#if defined(FK_X86) && FK_LANES == 16
// |x| * tail(|x|) for bfloat16 in half the instructions: cubics in the distance to the nearest multiple of 3/8, their
// coefficients looked up by one permutation each. Relative error 7e-5 up to |x| = 2.8, 4e-3 at 5.4; 0 beyond.
constexpr float GELU_CUBICS[4][16] = {
    {0, 1.32679062e-01f, 1.69969840e-01f, 1.46585715e-01f, 1.00216256e-01f, 5.69967119e-02f, 2.75062137e-02f,
     1.13724750e-02f, 4.04915987e-03f, 1.24525069e-03f, 3.31375490e-04f, 7.63939128e-05f, 1.52687861e-05f,
     2.64719114e-06f, 3.98256071e-07f, 0},
    {1.87505662e-01f, 8.04135927e-02f, 2.95345471e-04f, -4.05187708e-02f, -4.77936656e-02f, -3.69617309e-02f,
     -2.21949595e-02f, -1.09020786e-02f, -4.48165081e-03f, -1.56046013e-03f, -4.63479564e-04f, -1.17961590e-04f,
     -2.58060657e-05f, -4.86328055e-06f, -7.90808409e-07f, 0},
    {-5.62921036e-02f, -4.83833688e-02f, -3.04140404e-02f, -1.10814035e-02f, 2.09972155e-03f, 7.21448544e-03f,
     6.79668168e-03f, 4.38327836e-03f, 2.20054306e-03f, 8.99796898e-04f, 3.06202365e-04f, 8.77733443e-05f,
     2.13529761e-05f, 4.43059739e-06f, 7.86855034e-07f, 0},
    {9.94551530e-04f, 4.59784464e-03f, 6.76141672e-03f, 5.67779426e-03f, 2.95350021e-03f, 5.36195295e-04f,
     -6.62222040e-04f, -8.36624556e-04f, -5.73261249e-04f, -2.87105600e-04f, -1.13618911e-04f, -3.67269694e-05f,
     -9.86919136e-06f, -2.22816625e-06f, -4.25609326e-07f, 0},
};
template <>
FK_INLINE vf gelu<bf16>(vf x) {
  const vf magic = splat(12582912.0f);  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const vf steps = min(absolute(x) * float(8.0 / 3.0), splat(15.0f));
  const vf shifted = steps + magic, d = steps - (shifted - magic);
  const auto coefficient = [&](int power) FK_LAMBDA {
    return _mm512_permutexvar_ps((__m512i)shifted, (__m512)load(GELU_CUBICS[power]));
  };
  // by name: GCC makes them of * and + in some callers, and not in others, whose numbers are to be the same
  __m512 p = coefficient(3);
  p = _mm512_fmadd_ps(p, (__m512)d, coefficient(2));
  p = _mm512_fmadd_ps(p, (__m512)d, coefficient(1));
  p = _mm512_fmadd_ps(p, (__m512)d, coefficient(0));
  return max(vf{}, x) - (vf)p;
}
#endif

// gelu and its derivative Phi(x) + x * phi(x) from one exponential.
template <class T>
FK_INLINE vf gelu_and_slope(vf x, vf* slope) {
  NormalTail n = normal_tail<ROUGH<T>>(x);
  vf phi = x < 0 ? n.tail : 1.0f - n.tail;
  vf capped = x < 0 ? -n.a : n.a;
  *slope = phi + capped * n.bell * 0.3989422804014327f + (x - x);  // x - x: NaN and infinity stay visible
  return max(vf{}, x) - n.a * n.tail;
}

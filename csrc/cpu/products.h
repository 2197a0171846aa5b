// Matrix products of token rows with a packed weight; what becomes of the sums is an epilogue's matter (epilogues.h).
//
//   out[m, n] = sum_k a[m, k] * w[n, k]      a tile of MR rows x NV vectors of columns stays in registers.
//
// The weight is packed in panels of NV * VL columns, k after k, so that the inner loop reads it in order (packing.h).
// 16-bit operands are widened to float when packed; with AVX512_BF16, bfloat16 stays as it is and two k are
// multiplied at once (vdpbf16ps, float accumulators), panels then hold pairs of k side by side.

constexpr int NV = 3;                 // vectors of columns
constexpr int MR = VL == 16 ? 8 : 4;  // rows
constexpr int NR = NV * VL;
constexpr int64_t RUN = 384;  // k summed in one float; longer sums are made of such runs, or they would lose digits

// What values stored as T are multiplied as.
template <class T>
struct Operand {
  using type = float;
};
#ifdef FK_AVX512_BF16
template <>
struct Operand<bf16> {
  using type = bf16;
};
#endif
template <class T>
using operand_t = typename Operand<T>::type;

FK_INLINE void convert(float* to, float from) { *to = from; }
FK_INLINE void convert(float* to, bf16 from) { *to = load_scalar(&from); }
FK_INLINE void convert(float* to, f16 from) { *to = load_scalar(&from); }
FK_INLINE void convert(bf16* to, bf16 from) { *to = from; }
FK_INLINE void convert(bf16* to, float from) { store_lanes(to, 1, 1, splat(from)); }

// k is padded to whole steps.
template <class CT>
constexpr int64_t KSTEP = sizeof(CT) == 2 ? 2 : 1;
template <class CT>
FK_INLINE int64_t padded_k(int64_t K) {
  return (K + KSTEP<CT> - 1) / KSTEP<CT> * KSTEP<CT>;
}

// The left operand: n rows of padded_k values, `stride` apart.
template <class CT>
struct OperandRows {
  const CT* first;
  int64_t stride, n;
};

// R x N vectors of sums into `out`. A function of its own, without any epilogue, so that the sums stay in registers.
template <int N, int R, class CT>
static __attribute__((noinline)) void tile_product(const CT* const* a, const CT* panel, int64_t K, float* out) {
  vf acc[R][N] = {};
  for (int64_t k = 0; k < K; k += KSTEP<CT>, panel += N * VL * KSTEP<CT>) {
#ifdef FK_AVX512_BF16
    if constexpr (sizeof(CT) == 2) {
      __m512i w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = _mm512_loadu_si512(panel + j * VL * 2);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a[i] + k, 4);
        const __m512i x = _mm512_set1_epi32(pair);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] = add_pair_products(acc[i][j], x, w[j]);
      }
      continue;
    }
#endif
    if constexpr (sizeof(CT) == 4) {
      vf w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = load(panel + j * VL);
#pragma GCC unroll 8
      for (int i = 0; i < R; ++i) {
        vf x = splat(a[i][k]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] += w[j] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < R; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(out + (i * N + j) * VL, acc[i][j]);
}

// The same of any K and of `rows` rows, at most MR, from `row` on.
template <int N, class CT>
static __attribute__((noinline)) void tile_sums(const OperandRows<CT>& a, const CT* panel, int64_t K, int64_t row,
                                                int64_t rows, float* sums) {
  const CT* a_rows[MR];
  for (int i = 0; i < rows; ++i) a_rows[i] = a.first + (row + i) * a.stride;
  with_constant_up_to<MR>(rows, [&](auto r) FK_LAMBDA {
    tile_product<N, r.value>(a_rows, panel, at_most(K, RUN), sums);
    for (int64_t k = RUN; k < K; k += RUN) {
      alignas(64) float more[MR * N * VL];
      for (int i = 0; i < rows; ++i) a_rows[i] += RUN;
      tile_product<N, r.value>(a_rows, panel + k * N * VL, at_most(K - k, RUN), more);
      for (int i = 0; i < rows * N; ++i) store(sums + i * VL, load(sums + i * VL) + load(more + i * VL));
    }
  });
}

// Which columns of a packed weight (whole panels, or to its end) and which k (from a whole step on) make a product.
struct Part {
  int64_t column0, column1, k0, k1;
};

// The tile at (row, column): `rows` rows, at most MR, and `columns` of a panel's.
template <class CT, class Epilogue>
static void tile(const OperandRows<CT>& a, const CT* panel, int64_t K, int64_t row, int64_t rows, int64_t column,
                 int64_t columns, const Epilogue& epilogue) {
  alignas(64) float sums[MR * NR];
  const int vectors = int((columns + VL - 1) / VL);
  epilogue.prefetch(row, rows, column);
  with_constant_up_to<NV>(vectors, [&](auto n) FK_LAMBDA { tile_sums<n.value>(a, panel, K, row, rows, sums); });
  if (columns == NR && epilogue.full_tile(row, rows, column, sums)) return;
  const float* sum = sums;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < vectors; ++j, sum += VL)
      epilogue.edge(row + i, column + j * VL, lanes_of(columns - j * VL), load(sum));
}

// a times the panel of a weight's columns `column`..`column` + `columns`, which stays in cache while the rows pass.
template <class CT, class Epilogue>
static void panel_product(const OperandRows<CT>& a, const CT* panel, int64_t K, int64_t column, int64_t columns,
                          const Epilogue& epilogue) {
  const int64_t tiles = (a.n + MR - 1) / MR;  // of equal size: registers left idle would cost as much as used ones
  for (int64_t row = 0, i = 0, rows; i < tiles; ++i, row += rows) {
    rows = a.n / tiles + (i < a.n % tiles);
    tile(a, panel, K, row, rows, column, columns, epilogue);
  }
}

// a times a part of the packed weight; a's first k is the part's.
template <class CT, class Epilogue>
static void product(const OperandRows<CT>& a, const Packed& w, const Part& part, const Epilogue& epilogue) {
  const int64_t whole_k = padded_k<CT>(w.K), K = padded_k<CT>(part.k1) - part.k0;
  for (int64_t column = part.column0; column < part.column1; column += NR) {
    const int64_t columns = at_most(NR, part.column1 - column), vectors = (columns + VL - 1) / VL;
    const CT* panel = static_cast<const CT*>(w.panels) + column * whole_k + part.k0 * vectors * VL;
    panel_product(a, panel, K, column, columns, epilogue);
  }
}
// a times all of it.
template <class CT, class Epilogue>
static void product(const OperandRows<CT>& a, const Packed& w, const Epilogue& epilogue) {
  product(a, w, Part{0, w.N, 0, w.K}, epilogue);
}

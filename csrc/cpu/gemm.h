// Matrix products of token rows with a packed weight, with an epilogue on the accumulators.
//
//   out[m, n] = sum_k a[m, k] * w[n, k]      a tile of MR rows x NV vectors of columns stays in registers.
//
// The weight is packed in panels of NV * VL columns, k after k, so that the inner loop reads it in order.
// 16-bit operands are widened to float when packed; with AVX512_BF16, bfloat16 stays as it is and two k are
// multiplied at once (vdpbf16ps, float accumulators), panels then hold pairs of k side by side.

constexpr int NV = 3;                 // vectors of columns
constexpr int MR = VL == 16 ? 8 : 4;  // rows
constexpr int NR = NV * VL;
constexpr int64_t RUN = 384;  // k summed in one float; longer sums are made of such runs, or they would lose digits

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

// k is padded to whole steps.
template <class CT>
constexpr int64_t KSTEP = sizeof(CT) == 2 ? 2 : 1;
template <class CT>
FK_INLINE int64_t padded_k(int64_t K) {
  return (K + KSTEP<CT> - 1) / KSTEP<CT> * KSTEP<CT>;
}

// MR x N vectors of sums into `out`. A function of its own, without any epilogue, so that the sums stay in registers.
template <int N, class CT>
static __attribute__((noinline)) void tile_product(const CT* const* a, const CT* panel, int64_t K, float* out) {
  vf acc[MR][N] = {};
  for (int64_t k = 0; k < K; k += KSTEP<CT>, panel += N * VL * KSTEP<CT>) {
#ifdef FK_AVX512_BF16
    if constexpr (sizeof(CT) == 2) {
      __m512bh w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = reinterpret_cast<__m512bh>(_mm512_loadu_si512(panel + j * VL * 2));
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        int32_t pair;
        __builtin_memcpy(&pair, a[i] + k, 4);
        __m512bh x = reinterpret_cast<__m512bh>(_mm512_set1_epi32(pair));
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j)
          acc[i][j] = reinterpret_cast<vf>(_mm512_dpbf16_ps(reinterpret_cast<__m512>(acc[i][j]), x, w[j]));
      }
      continue;
    }
#endif
    if constexpr (sizeof(CT) == 4) {
      vf w[N];
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j) w[j] = load(panel + j * VL);
#pragma GCC unroll 8
      for (int i = 0; i < MR; ++i) {
        vf x = splat(a[i][k]);
#pragma GCC unroll 4
        for (int j = 0; j < N; ++j) acc[i][j] += w[j] * x;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < MR; ++i)
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) store(out + (i * N + j) * VL, acc[i][j]);
}

// epilogue(row, column, n, values): n valid columns from `column` on; epilogue.prefetch(row, rows, column): what the
// next tile's epilogue will read, fetched behind the product.
template <int N, class CT, class Epilogue>
static void tile(const CT* a, int64_t lda, int64_t rows, const CT* panel, int64_t K, int64_t row, int64_t column,
                 int64_t columns, const Epilogue& epilogue) {
  const CT* a_rows[MR];
  for (int i = 0; i < MR; ++i) a_rows[i] = a + (i < rows ? i : rows - 1) * lda;
  alignas(64) float acc[MR * N * VL];
  epilogue.prefetch(row, rows, column);
  tile_product<N>(a_rows, panel, K < RUN ? K : RUN, acc);
  for (int64_t k = RUN; k < K; k += RUN) {
    alignas(64) float more[MR * N * VL];
    for (int i = 0; i < MR; ++i) a_rows[i] += RUN;
    tile_product<N>(a_rows, panel + k * N * VL, K - k < RUN ? K - k : RUN, more);
    for (int i = 0; i < MR * N; ++i) store(acc + i * VL, load(acc + i * VL) + load(more + i * VL));
  }
  if (columns == N * VL && epilogue.template whole_tile<N>(row, rows, column, acc)) return;
  const float* value = acc;
  for (int i = 0; i < rows; ++i)
    for (int j = 0; j < N; ++j, value += VL) {
      const int64_t left = columns - j * VL;
      if (left > 0) epilogue(row + i, column + j * VL, int(left < VL ? left : VL), load(value));
    }
}

// Asks for the part of `pointers[row..row + rows)` that a tile will read or (WRITE) write: rows lie too far apart for
// the hardware to guess.
template <int WRITE, class T>
FK_INLINE void prefetch_tile(T* const* pointers, int64_t row, int64_t rows, int64_t column, int64_t stride) {
  if (stride != 1) return;
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t j = 0; j < NR + 64 / int64_t(sizeof(T)) - 1; j += 64 / int64_t(sizeof(T)))
      __builtin_prefetch(pointers[row + i] + column + (j < NR ? j : NR - 1), WRITE);
}

// out[row, column] = sum + bias, elements of a row `stride` apart. Most tiles are whole: no test per vector there.
template <class T>
struct Writing {
  T* const* out;
  int64_t stride;
  const float* bias;  // or null
  FK_INLINE vf bias_at(int64_t column, int n) const { return bias ? load_lanes(bias + column, n, 1) : vf{}; }
  FK_INLINE void operator()(int64_t row, int64_t column, int n, vf value) const {
    store_lanes(out[row] + column * stride, n, stride, value + bias_at(column, n));
  }
  template <int N>
  FK_INLINE bool whole_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    if (stride != 1) return false;
    vf b[N];
#pragma GCC unroll 4
    for (int j = 0; j < N; ++j) b[j] = bias_at(column + j * VL, VL);
    for (int64_t i = 0; i < rows; ++i, sums += N * VL) {
      T* to = out[row + i] + column;
      if (N > 1) store_two(to, load(sums) + b[0], load(sums + VL) + b[N > 1]);
      if (N % 2) store(to + (N - 1) * VL, load(sums + (N - 1) * VL) + b[N - 1]);
    }
    return true;
  }
  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const {
    prefetch_tile<1>(out, row, rows, column, stride);
  }
};

// Any other use of the sums, f(row, column, n, value), that reads the rows `in` where given.
template <class T, class F>
struct Reading {
  T* const* in;
  int64_t stride;
  F f;
  FK_INLINE void operator()(int64_t row, int64_t column, int n, vf value) const { f(row, column, n, value); }
  template <int N>
  FK_INLINE bool whole_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    for (int64_t i = 0; i < rows; ++i)
#pragma GCC unroll 4
      for (int j = 0; j < N; ++j, sums += VL) f(row + i, column + j * VL, VL, load(sums));
    return true;
  }
  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const {
    if (in) prefetch_tile<0>(in, row, rows, column, stride);
  }
};
template <class T, class F>
FK_INLINE Reading<T, F> reading(T* const* in, int64_t stride, F f) {
  return {in, stride, f};
}
template <class F>
FK_INLINE Reading<float, F> in_cache(F f) {
  return {nullptr, 1, f};
}

// Rows 0..M of `a` times the packed weight. One panel stays in cache while the rows pass.
template <class CT, class Epilogue>
static void product(const CT* a, int64_t lda, int64_t M, const Packed& w, const Epilogue& epilogue) {
  const int64_t K = padded_k<CT>(w.K);
  const CT* panel = static_cast<const CT*>(w.panels);
  for (int64_t column = 0; column < w.N; column += NR) {
    const int64_t columns = w.N - column < NR ? w.N - column : NR;
    const int64_t vectors = (columns + VL - 1) / VL;
    for (int64_t row = 0; row < M; row += MR) {
      const int64_t rows = M - row < MR ? M - row : MR;
      const CT* a_row = a + row * lda;
      if (vectors == 3)
        tile<3>(a_row, lda, rows, panel, K, row, column, columns, epilogue);
      else if (vectors == 2)
        tile<2>(a_row, lda, rows, panel, K, row, column, columns, epilogue);
      else
        tile<1>(a_row, lda, rows, panel, K, row, column, columns, epilogue);
    }
    panel += vectors * VL * K;
  }
}

template <class CT>
FK_INLINE int64_t panels_elements(int64_t N, int64_t K) {
  return (N + VL - 1) / VL * VL * padded_k<CT>(K);
}

FK_INLINE void convert(float* to, float from) { *to = from; }
FK_INLINE void convert(float* to, bf16 from) { *to = load_scalar(&from); }
FK_INLINE void convert(float* to, f16 from) { *to = load_scalar(&from); }
FK_INLINE void convert(bf16* to, bf16 from) { *to = from; }

// VL columns x VL steps of k at once, read along k or along n. False where the strides allow neither.
template <class T, class CT>
FK_INLINE bool pack_square(const T* w, int64_t stride_n, int64_t stride_k, int64_t width, CT* to) {
  constexpr bool pairs = KSTEP<CT> == 2;
  vf x[VL];
  if (stride_k == 1) {
    for (int i = 0; i < VL; ++i) {
      if constexpr (pairs)
        x[i] = load(reinterpret_cast<const float*>(w + i * stride_n));  // a pair of k is one 32-bit lane
      else
        x[i] = load(w + i * stride_n);
    }
    transpose(x);
  } else if (stride_n == 1) {
    for (int i = 0; i < VL; ++i) {
      if constexpr (pairs) {
        const vh_any* even = reinterpret_cast<const vh_any*>(w + 2 * i * stride_k);
        const vh_any* odd = reinterpret_cast<const vh_any*>(w + (2 * i + 1) * stride_k);
        vh low = *even, high = *odd;
        x[i] = reinterpret_cast<vf>(widen(low) | widen(high) << 16);
      } else {
        x[i] = load(w + i * stride_k);
      }
    }
  } else {
    return false;
  }
  for (int i = 0; i < VL; ++i) store(reinterpret_cast<float*>(to + i * width * KSTEP<CT>), x[i]);
  return true;
}

// Columns n0..n1 of the panels of w (N, K); n0 a multiple of every panel's width.
template <class T>
static void pack_matrix_of(const T* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, int64_t n0, int64_t n1,
                           void* panels) {
  using CT = operand_t<T>;
  constexpr int64_t step = KSTEP<CT>, square = VL * step;
  const int64_t Kp = padded_k<CT>(K);
  for (int64_t column = n0; column < n1; column += NR) {
    CT* panel = static_cast<CT*>(panels) + column * Kp;
    const int64_t columns = N - column < NR ? N - column : NR, width = (columns + VL - 1) / VL * VL;
    for (int64_t n = 0; n < width; n += VL)
      for (int64_t k = 0; k < Kp; k += square) {
        CT* to = panel + k * width + n * step;
        const T* from = w + (column + n) * stride_n + k * stride_k;
        if (n + VL <= columns && k + square <= K && pack_square(from, stride_n, stride_k, width, to)) continue;
        for (int64_t i = 0; i < square && k + i < Kp; ++i)  // edges, and strides of any kind
          for (int64_t j = 0; j < VL; ++j) {
            CT* one = to + (i / step * width + j) * step + i % step;
            if (n + j < columns && k + i < K)
              convert(one, from[j * stride_n + i * stride_k]);
            else
              *one = CT{};
          }
      }
  }
}

// Walks rows of tokens without dividing at every step.
template <class T>
struct RowCursor {
  const Rows& rows;
  int64_t image, t, m, w;

  RowCursor(const Rows& r, int64_t row) : rows(r) {
    image = row / r.pixels;
    int64_t pixel = row % r.pixels;
    w = pixel % r.W;
    m = pixel / r.W % r.M;
    t = pixel / r.W / r.M;
  }
  T* next() {
    T* p = static_cast<T*>(rows.data) + image * rows.image + t * rows.t + m * rows.m + w * rows.w;
    if (++w == rows.W) {
      w = 0;
      if (++m == rows.M) {
        m = 0;
        if (++t * rows.M * rows.W == rows.pixels) t = 0, ++image;
      }
    }
    return p;
  }
};

// How many rows from a multiple of the result on lie at one distance from each other.
FK_INLINE int64_t regular_run(const Rows& r) {
  const int64_t slab = r.M * r.W, T = slab ? r.pixels / slab : 0;
  if (r.M > 1 && r.m != r.W * r.w) return r.W;
  if (T > 1 && r.t != slab * r.w) return slab;
  return r.image != r.pixels * r.w ? r.pixels : int64_t(1) << 60;
}

template <class T>
FK_INLINE void row_pointers(const Rows& rows, int64_t row0, int64_t row1, T** pointers) {
  RowCursor<T> cursor(rows, row0);
  for (int64_t r = row0; r < row1; ++r) *pointers++ = cursor.next();
}

// The operand form of token rows: themselves where that is possible, otherwise a copy in `buffer` (n x padded
// K).
template <class T>
static const operand_t<T>* operand_rows(const Rows& rows, int64_t n, T* const* pointers, int64_t K,
                                        operand_t<T>* buffer, int64_t* lda) {
  using CT = operand_t<T>;
  const int64_t Kp = padded_k<CT>(K);
  if constexpr (sizeof(CT) == sizeof(T)) {
    bool regular = rows.channel == 1 && Kp == K;
    for (int64_t i = 2; regular && i < n; ++i) regular = pointers[i] - pointers[i - 1] == pointers[1] - pointers[0];
    if (regular) {
      *lda = n > 1 ? pointers[1] - pointers[0] : 0;
      return reinterpret_cast<const CT*>(pointers[0]);
    }
  }
  *lda = Kp;
  if (rows.channel == 1) {
    for (int64_t i = 0; i < n; ++i) {
      CT* to = buffer + i * Kp;
      int64_t k = 0;
      for (; k + VL <= K; k += VL) store(to + k, load(pointers[i] + k));
      for (; k < K; ++k) convert(to + k, pointers[i][k]);
    }
  } else {  // channel planes: read along the pixels
    for (int64_t i = 0; i < n; i += VL) {
      bool square = n - i >= VL;
      for (int j = 1; square && j < VL; ++j) square = pointers[i + j] - pointers[i] == j;
      int64_t k = 0;
      for (; square && k + VL <= K; k += VL) {
        vf x[VL];
        for (int j = 0; j < VL; ++j) x[j] = load(pointers[i] + (k + j) * rows.channel);
        transpose(x);
        for (int j = 0; j < VL; ++j) store(buffer + (i + j) * Kp + k, x[j]);
      }
      for (; k < K; ++k)
        for (int64_t j = i; j < n && j < i + VL; ++j) convert(buffer + j * Kp + k, pointers[j][k * rows.channel]);
    }
  }
  for (int64_t i = 0; i < n; ++i)
    for (int64_t k = K; k < Kp; ++k) buffer[i * Kp + k] = CT{};
  return buffer;
}

// Hands out pieces of a scratch buffer, each on its own cache line.
struct Arena {
  char* at;
  template <class T>
  T* take(int64_t n) {
    T* p = reinterpret_cast<T*>(at);
    at += (n * int64_t(sizeof(T)) + 63) / 64 * 64;
    return p;
  }
};

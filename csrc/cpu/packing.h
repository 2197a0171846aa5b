// A weight in the panels that product() reads: NV * VL columns side by side (the last panel: whole vectors), k after k.
// With AVX512_BF16, bfloat16 comes in pairs of k: column by column, even k and odd k.

template <class CT>
FK_INLINE int64_t panels_elements(int64_t N, int64_t K) {
  return (N + VL - 1) / VL * VL * padded_k<CT>(K);
}

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

// Whether the panels hold what w holds, as far as samples spread over its rows show.
template <class T>
static bool panels_hold(const void* panels, const T* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K) {
  using CT = operand_t<T>;
  constexpr int64_t SAMPLES = 64, step = KSTEP<CT>;
  for (int64_t i = 0; i < SAMPLES && N * K > 0; ++i) {
    const int64_t n = i * N / SAMPLES, k = i * 40503 % K, column = n / NR * NR;
    const int64_t width = (at_most(NR, N - column) + VL - 1) / VL * VL;
    const CT* panel = static_cast<const CT*>(panels) + column * padded_k<CT>(K);
    CT now;
    convert(&now, w[n * stride_n + k * stride_k]);
    if (__builtin_memcmp(&now, panel + (k / step * width + n - column) * step + k % step, sizeof(CT))) return false;
  }
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
    const int64_t columns = at_most(NR, N - column), width = (columns + VL - 1) / VL * VL;
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

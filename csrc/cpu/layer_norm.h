// LayerNorm of token rows, statistics in float.

struct RowStatistics {
  float mean, rstd;
};
// In two passes; the second one also finds what rounding took from the mean, which counts where a row hardly varies.
// load(c, lanes): the row's values from c on.
template <class F>
FK_INLINE RowStatistics statistics_of(const F& load, int64_t C, float eps) {
  vf sums = {}, rest = {}, squares = {};
  for (int64_t c = 0; c < C; c += VL) sums += load(c, lanes_of(C - c));
  const float mean = sum_lanes(sums) / float(C);
  for (int64_t c = 0; c < C; c += VL) {
    const int lanes = lanes_of(C - c);
    vf d = load(c, lanes) - mean;
    if (lanes < VL)
      for (int j = lanes; j < VL; ++j) d[j] = 0;
    rest += d;
    squares += d * d;
  }
  const float lost = sum_lanes(rest) / float(C), variance = sum_lanes(squares) / float(C) - lost * lost;
  return {mean + lost, 1.0f / __builtin_sqrtf((variance > 0 ? variance : variance * 0) + eps)};
}
template <class T>
FK_INLINE RowStatistics row_statistics(const T* x, int64_t C, float eps) {
  return statistics_of([&](int64_t c, int lanes) FK_LAMBDA { return load_lanes(x + c, lanes, 1); }, C, eps);
}

// Each of n rows in place.
template <class CT>
static void layer_norm_rows(CT* x, int64_t stride, int64_t n, int64_t C, const float* weight, const float* bias,
                            float eps) {
  for (int64_t i = 0; i < n; ++i, x += stride) {
    const auto [mean, rstd] = row_statistics(x, C, eps);
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      const vf normal = (load_lanes(x + c, lanes, 1) - mean) * rstd;
      store_lanes(x + c, lanes, 1, normal * load_lanes(weight + c, lanes, 1) + load_lanes(bias + c, lanes, 1));
    }
  }
}

// The operand form of LN(x).
template <class T, class CT>
static OperandRows<CT> layer_norm_operand(const RowBlock<T>& x, int64_t C, const float* weight, const float* bias,
                                          float eps, CT* memory) {
  const int64_t Cp = padded_k<CT>(C);
  if (x.channel != 1 && sizeof(CT) >= sizeof(T)) {
    const auto copy = operand_rows(x, C, memory);
    layer_norm_rows(memory, Cp, x.n, C, weight, bias, eps);
    return copy;
  }
  const auto normalize = [&](int64_t i, const auto& load) FK_LAMBDA {
    CT* to = memory + i * Cp;
    const auto [mean, rstd] = statistics_of(load, C, eps);
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      const vf normal = (load(c, lanes) - mean) * rstd;
      store_lanes(to + c, lanes, 1, normal * load_lanes(weight + c, lanes, 1) + load_lanes(bias + c, lanes, 1));
    }
    for (int64_t c = C; c < Cp; ++c) to[c] = CT{};
  };
  for (int64_t i = 0; i < x.n; ++i)
    if (x.channel == 1)
      normalize(i, [&](int64_t c, int lanes) FK_LAMBDA { return load_lanes(x[i] + c, lanes, 1); });
    else  // floats apart from each other: rounded to 16 bits first, they would have other statistics
      normalize(i, [&](int64_t c, int lanes) FK_LAMBDA { return x.load(i, c, lanes); });
  return {memory, Cp, x.n};
}

// The backward of one row: d, y's gradient, becomes x's; x becomes (x - mean) * rstd; y is made again. The gradients of
// weight and bias are summed from `weight_sums` and `bias_sums` on.
template <class T>
FK_INLINE void layer_norm_row_back(float* x, float* d, T* y, int64_t C, const float* weight, const float* bias,
                                   float eps, const RowSums& sums, int64_t weight_sums, int64_t bias_sums) {
  const auto [mean, rstd] = row_statistics(x, C, eps);
  vf dot = {}, sum = {};
  for (int64_t c = 0; c < C; c += VL) {
    const int lanes = lanes_of(C - c);
    const vf normal = (load_lanes(x + c, lanes, 1) - mean) * rstd, w = load_lanes(weight + c, lanes, 1);
    const vf up = load_lanes(d + c, lanes, 1);
    sums.add(weight_sums + c, lanes, up * normal);
    sums.add(bias_sums + c, lanes, up);
    store_lanes(y + c, lanes, 1, normal * w + load_lanes(bias + c, lanes, 1));
    store_lanes(x + c, lanes, 1, normal);
    store_lanes(d + c, lanes, 1, up * w);
    sum += up * w;  // 0 in the lanes beyond C
    dot += up * w * normal;
  }
  const float mean_sum = sum_lanes(sum) / float(C), mean_dot = sum_lanes(dot) / float(C);
  for (int64_t c = 0; c < C; c += VL) {
    const int lanes = lanes_of(C - c);
    const vf value = load_lanes(d + c, lanes, 1) - mean_sum - load_lanes(x + c, lanes, 1) * mean_dot;
    store_lanes(d + c, lanes, 1, value * rstd);
  }
}

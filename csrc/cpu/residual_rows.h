// What is around the body of a residual branch, row by row.

// The factor of each row's image; null where there is none.
FK_INLINE const float* row_factors(Arena& arena, const Residual& r, int64_t pixels, int64_t row0, int64_t n) {
  if (!r.drop_path) return nullptr;
  float* factors = arena.take<float>(n);
  if (arena.memory)
    for (int64_t i = 0; i < n; ++i) factors[i] = r.drop_path[(row0 + i) / pixels];
  return factors;
}

// The operand of a branch's body: x, or its pre-norm.
template <class T>
static OperandRows<operand_t<T>> branch_operand(const Residual& r, const StreamRows<T>& x, int64_t C,
                                                operand_t<T>* memory) {
  return with_rows(x, [&](const auto& rows) {
    return r.pre_norm() ? layer_norm_operand(rows, C, r.norm_weight, r.norm_bias, r.norm_eps, memory)
                        : operand_rows(rows, C, memory);
  });
}

// y = x? + drop_path * gamma * u, a vector at a time.
template <class Block>
struct AddResidual {
  const Residual& r;
  const float* factors;
  const Block &x, &y;

  FK_INLINE void operator()(int64_t row, int64_t column, int lanes, vf u) const {
    vf factor = r.gamma ? load_lanes(r.gamma + column, lanes, 1) : splat(1.0f);
    if (factors) factor *= factors[row];
    // one expression, so that every caller's code rounds it alike
    y.store(row, column, lanes, r.add ? u * factor + x.load(row, column, lanes) : u * factor);
  }
};

template <class Block>
AddResidual(const Residual&, const float*, const Block&, const Block&) -> AddResidual<Block>;

// The same of whole rows of u, in their last norm's place too.
template <class Block>
static void post_norm_rows(const AddResidual<Block>& add, float* u, int64_t n, int64_t C) {
  layer_norm_rows(u, C, n, C, add.r.norm_weight, add.r.norm_bias, add.r.norm_eps);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < C; c += VL) add(i, c, lanes_of(C - c), load_lanes(u + i * C + c, lanes_of(C - c), 1));
}

// From d, a row of y's gradient, to that of u, in place. `u`, its value, is lost; it may be null where there is neither
// a last norm nor gamma's gradient to make. Sums from `norm_sums` on: norm's weight and bias; from `gamma_sums`: gamma.
FK_INLINE void residual_row_back(const Residual& r, float factor, float* u, float* d, float* other, int64_t C,
                                 const RowSums& sums, int64_t norm_sums, int64_t gamma_sums) {
  for (int64_t c = 0; c < C; c += VL) {
    const int lanes = lanes_of(C - c);
    store_lanes(d + c, lanes, 1, load_lanes(d + c, lanes, 1) * factor);
  }
  RowStatistics of{};
  if (r.gamma && r.post_norm()) of = row_statistics(u, C, r.norm_eps);
  for (int64_t c = 0; c < C && r.gamma; c += VL) {
    const int lanes = lanes_of(C - c);
    const vf up = load_lanes(d + c, lanes, 1);
    if (u) {
      vf value = load_lanes(u + c, lanes, 1);
      if (r.post_norm())
        value = (value - of.mean) * of.rstd * load_lanes(r.norm_weight + c, lanes, 1) +
                load_lanes(r.norm_bias + c, lanes, 1);
      sums.add(gamma_sums + c, lanes, up * value);
    }
    store_lanes(d + c, lanes, 1, up * load_lanes(r.gamma + c, lanes, 1));
  }
  if (r.post_norm())
    layer_norm_row_back(u, d, other, C, r.norm_weight, r.norm_bias, r.norm_eps, sums, norm_sums, norm_sums + C);
}

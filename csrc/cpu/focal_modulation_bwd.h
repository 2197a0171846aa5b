// The layer's backward around the chain: matrix products over blocks of token rows, and the weights' gradients.

template <class T>
struct ModulateBackScratch {
  StreamRows<T> grad_out;
  RowBlock<T> grad_u, q, modulator, grad_q, grad_modulator, z, grad_ctx_all;
  const float* factors;
  float *dz, *row, *other, *sums;
  operand_t<T>* operand;

  ModulateBackScratch(Arena& arena, const ModulateBackward& p, int64_t row0, int64_t n)
      : grad_out(stream_rows<T>(arena, p.residual, p.grad_out, row0, n)),
        grad_u(row_block<T>(arena, p.grad_u, row0, n)),
        q(row_block<T>(arena, p.q, row0, n)),
        modulator(row_block<T>(arena, p.modulator, row0, n)),
        grad_q(row_block<T>(arena, p.grad_q, row0, n)),
        grad_modulator(row_block<T>(arena, p.grad_modulator, row0, n)),
        z(row_block<T>(arena, p.z, row0, n)),
        grad_ctx_all(row_block<T>(arena, p.grad_ctx_all, row0, n)),
        factors(row_factors(arena, p.residual, p.grad_out.pixels, row0, n)),
        dz(arena.take<float>(n * p.proj_t.N)),
        row(arena.take<float>(p.proj_t.N)),
        other(arena.take<float>(p.proj_t.N)),
        sums(arena.take<float>(ModulateBackward::SUMS * p.proj_t.N)),
        operand(operand_memory<T>(arena, n, p.proj_t.N)) {}
};

// q * modulator, row i.
template <class T>
FK_INLINE void modulated_row(const ModulateBackward& p, const ModulateBackScratch<T>& s, int64_t i, float* to) {
  const int64_t C = p.proj_t.N;
  for (int64_t c = 0; c < C; c += VL) {
    const int lanes = lanes_of(C - c);
    store_lanes(to + c, lanes, 1, load_lanes(s.q[i] + c, lanes, 1) * load_lanes(s.modulator[i] + c, lanes, 1));
  }
}

// The gradient of the body's result, of that of y: the operand of proj's product. In a residual branch u is made again
// where its value counts, and written where it is not y's gradient.
template <class T>
static OperandRows<operand_t<T>> modulate_grad_u(const ModulateBackward& p, const ModulateBackScratch<T>& s,
                                                 const RowSums& sums) {
  using CT = operand_t<T>;
  const Residual& r = p.residual;
  const int64_t n = s.q.n, C = p.proj_t.N, Cp = padded_k<CT>(C);
  if (!p.grad_u.data) return operand_rows(s.grad_out.of_body, C, s.operand);
  if (p.proj.panels) {
    for (int64_t i = 0; i < n; ++i) {
      CT* to = s.operand + i * Cp;
      modulated_row(p, s, i, s.row);
      for (int64_t c = 0; c < C; c += VL)
        store_lanes(to + c, lanes_of(C - c), 1, load_lanes(s.row + c, lanes_of(C - c), 1));
      for (int64_t c = C; c < Cp; ++c) to[c] = CT{};
    }
    if (p.ln_weight) layer_norm_rows(s.operand, Cp, n, C, p.ln_weight, p.ln_bias, p.ln_eps);
    product(OperandRows<CT>{s.operand, Cp, n}, p.proj,
            NoRows{[&](int64_t row, int64_t column, int lanes, vf u) FK_LAMBDA {
              if (p.proj_bias) u += load_lanes(p.proj_bias + column, lanes, 1);
              store_lanes(s.dz + row * C + column, lanes, 1, u);
            }});
  }
  for (int64_t i = 0; i < n; ++i) {
    float* d = s.row;
    for (int64_t c = 0; c < C; c += VL) store_lanes(d + c, lanes_of(C - c), 1, s.grad_out.load(i, c, lanes_of(C - c)));
    residual_row_back(r, s.factors ? s.factors[i] : 1, p.proj.panels ? s.dz + i * C : nullptr, d, s.other, C, sums,
                      4 * C, 6 * C);
    CT* to = s.operand + i * Cp;
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      const vf value = load_lanes(d + c, lanes, 1);
      store_lanes(s.grad_u[i] + c, lanes, 1, value);
      store_lanes(to + c, lanes, 1, value);
    }
    for (int64_t c = C; c < Cp; ++c) to[c] = CT{};
    sums.end_of_row(i, n);
  }
  return {s.operand, Cp, n};
}

template <class T>
static void modulate_bwd_of(const ModulateBackward& p, int64_t block, int64_t row0, int64_t row1, void* memory) {
  Arena arena(memory);
  const int64_t n = row1 - row0, C = p.proj_t.N, all_sums = ModulateBackward::SUMS * C;
  const ModulateBackScratch<T> s(arena, p, row0, n);
  const RowSums sums(s.sums, p.sums + block * all_sums, all_sums);
  const int64_t proj_bias = 0, h_bias = C, ln_weight = 2 * C, ln_bias = 3 * C;
  const RowBlock<T>& grad_u = p.grad_u.data ? s.grad_u : s.grad_out.of_body;

  product(modulate_grad_u(p, s, sums), p.proj_t,
          NoRows{[&](int64_t row, int64_t column, int lanes, vf value)
                     FK_LAMBDA { store_lanes(s.dz + row * C + column, lanes, 1, value); }});

  for (int64_t i = 0; i < n; ++i) {
    float *dz = s.dz + i * C, *row = s.row;
    T *q = s.q[i], *modulator = s.modulator[i], *z = s.z[i];
    for (int64_t c = 0; c < C; c += VL) sums.add(proj_bias + c, lanes_of(C - c), grad_u.load(i, c, lanes_of(C - c)));
    modulated_row(p, s, i, row);
    if (p.ln_weight)
      layer_norm_row_back(row, dz, z, C, p.ln_weight, p.ln_bias, p.ln_eps, sums, ln_weight, ln_bias);
    else
      for (int64_t c = 0; c < C; c += VL)
        store_lanes(z + c, lanes_of(C - c), 1, load_lanes(row + c, lanes_of(C - c), 1));
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      const vf value = load_lanes(dz + c, lanes, 1), to_modulator = value * load_lanes(q + c, lanes, 1);
      store_lanes(s.grad_q[i] + c, lanes, 1, value * load_lanes(modulator + c, lanes, 1));
      store_lanes(s.grad_modulator[i] + c, lanes, 1, to_modulator);
      sums.add(h_bias + c, lanes, to_modulator);
    }
    sums.end_of_row(i, n);
  }

  if (p.grad_ctx_all.data)
    product(operand_rows(s.grad_modulator, C, s.operand), p.h_t, StoreBias<T>{s.grad_ctx_all, nullptr});
}

template <class T>
struct ProjectBackScratch {
  RowBlock<T> grad, z;
  StreamRows<T> x, grad_y, grad_x;
  float *sums, *grad_z, *row;
  operand_t<T>* operand;

  ProjectBackScratch(Arena& arena, const ProjectBackward& p, int64_t row0, int64_t n)
      : grad(row_block<T>(arena, p.grad_projected, row0, n)),
        z(row_block<T>(arena, p.z, row0, n)),
        x(stream_rows<T>(arena, p.residual, p.x, row0, n)),
        grad_y(stream_rows<T>(arena, p.residual, p.grad_y, row0, n)),
        grad_x(stream_rows<T>(arena, p.residual, p.grad_x, row0, n)),
        sums(arena.take<float>(p.all_sums())),
        grad_z(arena.take<float>(p.residual.pre_norm() ? n * p.f_t.N : 0)),
        row(arena.take<float>(p.f_t.N)),
        operand(operand_memory<T>(arena, n, p.f_t.K)) {}
};

template <class T>
static void project_bwd_of(const ProjectBackward& p, int64_t block, int64_t row0, int64_t row1, void* memory) {
  Arena arena(memory);
  const int64_t n = row1 - row0, F = p.f_t.K, first = F - p.gates, pixels = p.g.pixels();
  const ProjectBackScratch<T> s(arena, p, row0, n);
  const RowSums sums(s.sums, p.sums + block * p.all_sums(), p.all_sums());
  for (int64_t i = 0; i < n; ++i) {
    const int64_t image = (row0 + i) / pixels, pixel = (row0 + i) % pixels;
    const float* partial = p.grad_gates + image * p.channel_blocks * p.gates * pixels + pixel;
    for (int64_t l = 0; l < p.gates; ++l) {
      float sum = 0;
      for (int64_t block_c = 0; block_c < p.channel_blocks; ++block_c) sum += partial[(block_c * p.gates + l) * pixels];
      store_lanes(s.grad[i] + first + l, 1, 1, splat(sum));
    }
    for (int64_t c = 0; c < F; c += VL) sums.add(c, lanes_of(F - c), load_lanes(s.grad[i] + c, lanes_of(F - c), 1));
    sums.end_of_row(i, n);
  }
  const Residual& r = p.residual;
  const int64_t C = p.f_t.N;
  const bool norm = r.pre_norm();
  for (int64_t i = 0; i < n && p.z.data && !norm; ++i)
    for (int64_t c = 0; c < C; c += VL) store_lanes(s.z[i] + c, lanes_of(C - c), 1, s.x.load(i, c, lanes_of(C - c)));
  if (!p.grad_x.data && !norm) return;
  if (!r.add) return product(operand_rows(s.grad, F, s.operand), p.f_t, StoreBias<T>{s.grad_x.of_body, nullptr});
  product(operand_rows(s.grad, F, s.operand), p.f_t,
          ReadRows{s.grad_y, [&](int64_t row, int64_t column, int lanes, vf value) FK_LAMBDA {
                     if (norm) return store_lanes(s.grad_z + row * C + column, lanes, 1, value);
                     s.grad_x.store(row, column, lanes, value + s.grad_y.load(row, column, lanes));
                   }});
  for (int64_t i = 0; i < n && norm; ++i) {
    float* d = s.grad_z + i * C;
    for (int64_t c = 0; c < C; c += VL) store_lanes(s.row + c, lanes_of(C - c), 1, s.x.load(i, c, lanes_of(C - c)));
    layer_norm_row_back(s.row, d, s.z[i], C, r.norm_weight, r.norm_bias, r.norm_eps, sums, F, F + C);
    sums.end_of_row(i, n);
    for (int64_t c = 0; c < C && p.grad_x.data; c += VL) {
      const int lanes = lanes_of(C - c);
      s.grad_x.store(i, c, lanes, load_lanes(d + c, lanes, 1) + s.grad_y.load(i, c, lanes));
    }
  }
}

// Tokens whose products are summed before they are added to the gradient in memory: equal parts of a unit.
FK_INLINE int64_t gradient_tokens(const WeightGradient& p) {
  constexpr int64_t MOST = 1024;
  const int64_t parts = (p.unit + MOST - 1) / MOST;
  return (p.unit + parts - 1) / parts;
}

template <class T>
struct WeightGradientScratch {
  T** columns;
  operand_t<T>*grad, *in;

  WeightGradientScratch(Arena& arena, const WeightGradient& p, int64_t N)
      : columns(arena.take<T*>(N)),
        grad(operand_memory<T>(arena, N, gradient_tokens(p))),
        in(arena.take<operand_t<T>>(panels_elements<operand_t<T>>(at_most(NR, p.K), gradient_tokens(p)))) {}
};

// Rows n0..n1 of the weight's gradient, over tokens row0..row1: the same product with tokens as the summed axis.
template <class T>
static void weight_gradient_of(const WeightGradient& p, int64_t n0, int64_t n1, int64_t row0, int64_t row1,
                               void* memory) {
  Arena arena(memory);
  const int64_t N = n1 - n0, run_in = regular_run(p.in), run_grad = regular_run(p.grad);
  const WeightGradientScratch<T> s(arena, p, N);
  for (int64_t from = row0, tokens; from < row1; from += tokens) {
    tokens = at_most(at_most(gradient_tokens(p), p.unit - from % p.unit), row1 - from);
    tokens = at_most(tokens, at_most(run_in - from % run_in, run_grad - from % run_grad));
    const T* in = RowCursor<T>(p.in, from).next();
    T* grad = RowCursor<T>(p.grad, from).next();
    for (int64_t i = 0; i < N; ++i) s.columns[i] = grad + (n0 + i) * p.grad.channel;
    const auto columns = operand_rows(RowBlock<T>{s.columns, N, p.grad.w}, tokens, s.grad);
    const bool add = p.add || from > row0;
    for (int64_t k = 0; k < p.K; k += NR) {  // a panel is used while it is in cache
      const int64_t width = at_most(NR, p.K - k);
      pack_matrix_of(in + k * p.in.channel, p.in.channel, p.in.w, width, tokens, 0, width, s.in);
      float* grad_weight = p.grad_weight + n0 * p.K + k;
      product(columns, Packed{width, tokens, s.in},
              NoRows{[&](int64_t row, int64_t column, int lanes, vf value) FK_LAMBDA {
                float* to = grad_weight + row * p.K + column;
                store_lanes(to, lanes, 1, add ? load_lanes(to, lanes, 1) + value : value);
              }});
    }
  }
}

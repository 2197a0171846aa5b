// The MLP branch of a block over blocks of token rows. Hidden values never leave the cache: as many hidden channels as
// make one run of a product at a time, fc1 and GELU make them and fc2 adds what they give to the sums of its rows.

// GELU(sum + bias), as the operand of the next product: columns from `column0` on. `pre`: where the sum is kept.
template <class T>
struct StoreGelu {
  operand_t<T>* out;
  int64_t stride, column0;
  const float* bias;  // or null
  T* const* pre;      // or null

  FK_INLINE vf value(int64_t row, int64_t column, int n, vf sum) const {
    if (bias) sum += load_lanes(bias + column, n, 1);
    if (pre) store_lanes(pre[row] + column, n, 1, sum);
    return gelu<T>(sum);
  }
  FK_INLINE void prefetch(int64_t, int64_t, int64_t) const {}
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    for (int64_t i = 0; i < rows; ++i, sums += NR) {
      operand_t<T>* to = out + (row + i) * stride + column - column0;
      vf x[NV];
#pragma GCC unroll 4
      for (int j = 0; j < NV; ++j) x[j] = value(row + i, column + j * VL, VL, load(sums + j * VL));
      store_two(to, x[0], x[1]);
      store(to + 2 * VL, x[2]);
    }
    return true;
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const {
    store_lanes(out + row * stride + column - column0, n, 1, value(row, column, n, sum));
  }
};

template <class T>
struct MlpScratch {
  StreamRows<T> x, y;
  RowBlock<T> u, pre;
  const float* factors;
  float* out;
  operand_t<T>*z, *hidden;

  MlpScratch(Arena& arena, const MlpForward& p, int64_t row0, int64_t n)
      : x(stream_rows<T>(arena, p.residual, p.x, row0, n)),
        y(stream_rows<T>(arena, p.residual, p.y, row0, n)),
        u(row_block<T>(arena, p.u, row0, n)),
        pre(row_block<T>(arena, p.pre, row0, n)),
        factors(row_factors(arena, p.residual, p.x.pixels, row0, n)),
        out(arena.take<float>(n * p.fc2.N)),
        z(operand_memory<T>(arena, n, p.fc1.K)),
        hidden(operand_memory<T>(arena, n, at_most(RUN, p.fc1.N))) {}
};

template <class T>
static void mlp_fwd_of(const MlpForward& p, int64_t row0, int64_t row1, void* memory) {
  using CT = operand_t<T>;
  Arena arena(memory);
  const int64_t n = row1 - row0, C = p.fc1.K, M = p.fc1.N;
  const Residual& r = p.residual;
  const MlpScratch<T> s(arena, p, row0, n);
  const auto z = branch_operand(r, s.x, C, s.z);

  const AddResidual finish{r, s.factors, s.x, s.y};
  for (int64_t m = 0; m < M; m += RUN) {
    const int64_t end = at_most(M, m + RUN), stride = padded_k<CT>(end - m);
    for (int64_t i = 0; i < n && stride > end - m; ++i) s.hidden[i * stride + end - m] = CT{};
    product(z, p.fc1, Part{m, end, 0, C},
            StoreGelu<T>{s.hidden, stride, m, p.fc1_bias, p.pre.data ? s.pre.rows : nullptr});
    const OperandRows<CT> hidden{s.hidden, stride, n};
    const Part part{0, C, m, end};
    const bool first = m == 0, last = end == M;
    product(hidden, p.fc2, part, ReadRows{s.x, [&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
                                            float* out = s.out + row * C + column;
                                            if (!first) sum += load_lanes(out, lanes, 1);
                                            if (!last) return store_lanes(out, lanes, 1, sum);
                                            if (p.fc2_bias) sum += load_lanes(p.fc2_bias + column, lanes, 1);
                                            if (p.u.data) store_lanes(s.u[row] + column, lanes, 1, sum);
                                            if (r.post_norm())
                                              store_lanes(out, lanes, 1, sum);
                                            else
                                              finish(row, column, lanes, sum);
                                          }});
  }
  if (r.post_norm()) post_norm_rows(finish, s.out, n, C);
}

template <class T>
struct MlpBackScratch {
  StreamRows<T> x, grad_y, grad_x;
  RowBlock<T> u, pre, z, grad_u, hidden, grad_hidden;
  const float* factors;
  float *grad_z, *row, *other, *slope, *sums, *hidden_sums;
  operand_t<T>*of_z, *of_grad_u, *of_grad_hidden;

  MlpBackScratch(Arena& arena, const MlpBackward& p, int64_t row0, int64_t n)
      : x(stream_rows<T>(arena, p.residual, p.x, row0, n)),
        grad_y(stream_rows<T>(arena, p.residual, p.grad_y, row0, n)),
        grad_x(stream_rows<T>(arena, p.residual, p.grad_x, row0, n)),
        u(row_block<T>(arena, p.u, row0, n)),
        pre(row_block<T>(arena, p.pre, row0, n)),
        z(row_block<T>(arena, p.z, row0 - p.first, n)),
        grad_u(row_block<T>(arena, p.grad_u, row0 - p.first, n)),
        hidden(row_block<T>(arena, p.hidden, row0 - p.first, n)),
        grad_hidden(row_block<T>(arena, p.grad_hidden, row0 - p.first, n)),
        factors(row_factors(arena, p.residual, p.x.pixels, row0, n)),
        grad_z(arena.take<float>(n * p.fc1.K)),
        row(arena.take<float>(p.fc1.K)),
        other(arena.take<float>(p.fc1.K)),
        slope(arena.take<float>(n * at_most(RUN, p.fc1.N))),
        sums(arena.take<float>(MlpBackward::SUMS * p.fc1.K)),
        hidden_sums(arena.take<float>(p.fc1.N)),
        of_z(operand_memory<T>(arena, n, p.fc1.K)),
        of_grad_u(operand_memory<T>(arena, n, p.fc1.K)),
        of_grad_hidden(operand_memory<T>(arena, n, at_most(RUN, p.fc1.N))) {}
};

// From grad_y to the gradient of fc2's result, and its sums over rows.
template <class T>
static OperandRows<operand_t<T>> mlp_grad_u(const MlpBackward& p, const MlpBackScratch<T>& s, const RowSums& sums) {
  using CT = operand_t<T>;
  const Residual& r = p.residual;
  const int64_t n = s.grad_u.n, C = p.fc1.K, Cp = padded_k<CT>(C);
  const int64_t norm_weight = C, gamma = 3 * C;
  for (int64_t i = 0; i < n; ++i) {
    float* d = s.row;
    CT* to = s.of_grad_u + i * Cp;
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      vf value = s.grad_y.load(i, c, lanes);
      if (s.factors) value *= s.factors[i];
      store_lanes(d + c, lanes, 1, value);
    }
    if (r.post_norm()) {
      for (int64_t c = 0; c < C; c += VL) {
        const int lanes = lanes_of(C - c);
        store_lanes(s.other + c, lanes, 1, load_lanes(s.u[i] + c, lanes, 1));
      }
      residual_row_back(r, 1, s.other, d, s.grad_z, C, sums, norm_weight, gamma);  // grad_z is not needed yet
    }
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      vf value = load_lanes(d + c, lanes, 1);
      store_lanes(s.grad_u[i] + c, lanes, 1, value);
      sums.add(c, lanes, value);
      if (r.gamma && !r.post_norm()) value *= load_lanes(r.gamma + c, lanes, 1);
      store_lanes(to + c, lanes, 1, value);
    }
    for (int64_t c = C; c < Cp; ++c) to[c] = CT{};
    sums.end_of_row(i, n);
  }
  return {s.of_grad_u, Cp, n};
}

template <class T>
static void mlp_bwd_of(const MlpBackward& p, int64_t block, int64_t row0, int64_t row1, void* memory) {
  using CT = operand_t<T>;
  Arena arena(memory);
  const int64_t n = row1 - row0, C = p.fc1.K, M = p.fc1.N, all_sums = MlpBackward::SUMS * C;
  const Residual& r = p.residual;
  const MlpBackScratch<T> s(arena, p, row0, n);
  const RowSums sums(s.sums, p.sums + block * all_sums, all_sums);
  const auto grad_u = mlp_grad_u<T>(p, s, sums);

  const auto z = branch_operand(r, s.x, C, s.of_z);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_of(C - c);
      store_lanes(s.z[i] + c, lanes, 1, load_lanes(z.first + i * z.stride + c, lanes, 1));
    }

  for (int64_t m = 0; m < M; m += RUN) {
    const int64_t end = at_most(M, m + RUN), width = end - m, stride = padded_k<CT>(width);
    const auto activate = [&](int64_t row, int64_t column, int lanes, vf pre) FK_LAMBDA {
      vf slope;
      const vf value = gelu_and_slope<T>(pre, &slope);
      store_lanes(s.hidden[row] + column, lanes, 1, value);
      store_lanes(s.slope + row * width + column - m, lanes, 1, slope);
    };
    if (p.pre.data) {
      for (int64_t i = 0; i < n; ++i)
        for (int64_t c = m; c < end; c += VL) activate(i, c, lanes_of(end - c), s.pre.load(i, c, lanes_of(end - c)));
    } else {
      product(z, p.fc1, Part{m, end, 0, C}, NoRows{[&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
                if (p.fc1_bias) sum += load_lanes(p.fc1_bias + column, lanes, 1);
                activate(row, column, lanes, sum);
              }});
    }
    for (int64_t i = 0; i < n && stride > width; ++i) s.of_grad_hidden[i * stride + width] = CT{};
    product(grad_u, p.fc2_t, Part{m, end, 0, C}, NoRows{[&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
              sum *= load_lanes(s.slope + row * width + column - m, lanes, 1);
              store_lanes(s.grad_hidden[row] + column, lanes, 1, sum);
              store_lanes(s.of_grad_hidden + row * stride + column - m, lanes, 1, sum);
            }});
    const RowSums hidden_sums(s.hidden_sums, p.hidden_sums + block * M + m, width);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t c = 0; c < width; c += VL) {
        const int lanes = lanes_of(width - c);
        hidden_sums.add(c, lanes, load_lanes(s.of_grad_hidden + i * stride + c, lanes, 1));
      }
      hidden_sums.end_of_row(i, n);
    }
    const OperandRows<CT> grad_hidden{s.of_grad_hidden, stride, n};
    product(grad_hidden, p.fc1_t, Part{0, C, m, end},
            NoRows{[&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
              float* to = s.grad_z + row * C + column;
              if (m > 0) sum += load_lanes(to, lanes, 1);
              store_lanes(to, lanes, 1, sum);
            }});
  }

  for (int64_t i = 0; i < n; ++i) {
    float* d = s.grad_z + i * C;
    if (r.pre_norm()) {
      for (int64_t c = 0; c < C; c += VL) store_lanes(s.row + c, lanes_of(C - c), 1, s.x.load(i, c, lanes_of(C - c)));
      layer_norm_row_back(s.row, d, s.other, C, r.norm_weight, r.norm_bias, r.norm_eps, sums, C, 2 * C);
      sums.end_of_row(i, n);
    }
    for (int64_t c = 0; c < C && p.grad_x.data; c += VL) {
      const int lanes = lanes_of(C - c);
      s.grad_x.store(i, c, lanes, load_lanes(d + c, lanes, 1) + s.grad_y.load(i, c, lanes));
    }
  }
}

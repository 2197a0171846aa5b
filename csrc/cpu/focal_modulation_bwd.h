// The layer's backward around the chain: matrix products over blocks of token rows, and the weights' gradients.

// Sums rows in two stages, SUMMED at a time: a long run of additions into one float would lose digits.
struct RowSums {
  static constexpr int64_t SUMMED = 16;
  float *some, *all;
  int64_t n;
  RowSums(float* scratch, float* to, int64_t count) : some(scratch), all(to), n(count) {
    __builtin_memset(some, 0, n * sizeof(float));
    __builtin_memset(all, 0, n * sizeof(float));
  }
  FK_INLINE void add(int64_t at, int lanes, vf value) const {
    store_lanes(some + at, lanes, 1, load_lanes(some + at, lanes, 1) + value);
  }
  FK_INLINE void end_of_row(int64_t row, int64_t rows) const {
    if (row % SUMMED != SUMMED - 1 && row != rows - 1) return;
    for (int64_t i = 0; i < n; ++i) all[i] += some[i], some[i] = 0;
  }
};

static int64_t modulate_bwd_scratch(const ModulateBackward& p, int64_t rows) {
  const int64_t C = p.proj_t.N;
  return rows * (2 * (C + 2) * 4 + 6 * int64_t(sizeof(void*))) + (6 * C + VL) * 4 + 13 * 64;
}

template <class T>
static void modulate_bwd_of(const ModulateBackward& p, int64_t block, int64_t row0, int64_t row1, void* scratch) {
  using CT = operand_t<T>;
  Arena arena{static_cast<char*>(scratch)};
  const int64_t n = row1 - row0, C = p.proj_t.N;
  T** grad_out = arena.take<T*>(n);
  T** q = arena.take<T*>(n);
  T** modulator = arena.take<T*>(n);
  T** grad_q = arena.take<T*>(n);
  T** grad_modulator = arena.take<T*>(n);
  T** out = arena.take<T*>(n);
  row_pointers(p.grad_out, row0, row1, grad_out);
  row_pointers(p.q, row0, row1, q);
  row_pointers(p.modulator, row0, row1, modulator);
  row_pointers(p.grad_q, row0, row1, grad_q);
  row_pointers(p.grad_modulator, row0, row1, grad_modulator);
  row_pointers(p.z, row0, row1, out);
  float* dz = arena.take<float>(n * C);
  float* product_row = arena.take<float>(C + VL);
  CT* packed = arena.take<CT>(n * padded_k<CT>(C));
  constexpr int64_t SUMS = ModulateBackward::SUMS;
  const RowSums sums(arena.take<float>(SUMS * C), p.sums + block * SUMS * C, SUMS * C);
  const int64_t proj_bias = 0, h_bias = C, ln_weight = 2 * C, ln_bias = 3 * C;
  const auto lanes_at = [&](int64_t c) FK_LAMBDA { return int(C - c < VL ? C - c : VL); };

  int64_t lda;
  const CT* a = operand_rows<T>(p.grad_out, n, grad_out, C, packed, &lda);
  product(a, lda, n, p.proj_t, in_cache([&](int64_t row, int64_t column, int lanes, vf value) FK_LAMBDA {
            store_lanes(dz + row * C + column, lanes, 1, value);
          }));

  for (int64_t i = 0; i < n; ++i) {
    float* d = dz + i * C;
    for (int64_t c = 0; c < C; c += VL)
      sums.add(proj_bias + c, lanes_at(c),
               load_lanes(grad_out[i] + c * p.grad_out.channel, lanes_at(c), p.grad_out.channel));
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_at(c);
      store_lanes(product_row + c, lanes, 1, load_lanes(q[i] + c, lanes, 1) * load_lanes(modulator[i] + c, lanes, 1));
    }
    if (p.ln_weight) {
      vf total = {};
      for (int64_t c = 0; c < C; c += VL) total += load_lanes(product_row + c, lanes_at(c), 1);
      const float mean = sum_lanes(total) / float(C);
      float squares = 0;
      for (int64_t c = 0; c < C; ++c) squares += (product_row[c] - mean) * (product_row[c] - mean);
      const float rstd = 1.0f / __builtin_sqrtf(squares / float(C) + p.ln_eps);
      vf dot = {}, sum = {};
      for (int64_t c = 0; c < C; c += VL) {
        const int lanes = lanes_at(c);
        vf normal = (load_lanes(product_row + c, lanes, 1) - mean) * rstd,
           weight = load_lanes(p.ln_weight + c, lanes, 1);
        vf up = load_lanes(d + c, lanes, 1);
        sums.add(ln_weight + c, lanes, up * normal);
        sums.add(ln_bias + c, lanes, up);
        store_lanes(out[i] + c, lanes, 1, normal * weight + load_lanes(p.ln_bias + c, lanes, 1));
        store_lanes(product_row + c, lanes, 1, normal);
        store_lanes(d + c, lanes, 1, up * weight);  // 0 in the lanes beyond C
        sum += up * weight;
        dot += up * weight * normal;
      }
      const float mean_sum = sum_lanes(sum) / float(C), mean_dot = sum_lanes(dot) / float(C);
      for (int64_t c = 0; c < C; c += VL) {
        const int lanes = lanes_at(c);
        vf value = load_lanes(d + c, lanes, 1) - mean_sum - load_lanes(product_row + c, lanes, 1) * mean_dot;
        store_lanes(d + c, lanes, 1, value * rstd);
      }
    } else {
      for (int64_t c = 0; c < C; c += VL) {
        const int lanes = lanes_at(c);
        store_lanes(out[i] + c, lanes, 1, load_lanes(product_row + c, lanes, 1));
      }
    }
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = lanes_at(c);
      vf value = load_lanes(d + c, lanes, 1), to_modulator = value * load_lanes(q[i] + c, lanes, 1);
      store_lanes(grad_q[i] + c, lanes, 1, value * load_lanes(modulator[i] + c, lanes, 1));
      store_lanes(grad_modulator[i] + c, lanes, 1, to_modulator);
      sums.add(h_bias + c, lanes, to_modulator);
    }
    sums.end_of_row(i, n);
  }
  if (!p.grad_ctx_all.data) return;

  T** grad_ctx_all = out;
  row_pointers(p.grad_ctx_all, row0, row1, grad_ctx_all);
  a = operand_rows<T>(p.grad_modulator, n, grad_modulator, C, packed, &lda);
  product(a, lda, n, p.h_t, Writing<T>{grad_ctx_all, 1, nullptr});
}

static int64_t project_bwd_scratch(const ProjectBackward& p, int64_t rows) {
  return rows * ((p.f_t.K + 2) * 4 + 2 * int64_t(sizeof(void*))) + p.f_t.K * 4 + 5 * 64;
}

template <class T>
static void project_bwd_of(const ProjectBackward& p, int64_t block, int64_t row0, int64_t row1, void* scratch) {
  using CT = operand_t<T>;
  Arena arena{static_cast<char*>(scratch)};
  const int64_t n = row1 - row0, F = p.f_t.K, first = F - p.gates, pixels = p.g.pixels();
  T** grad = arena.take<T*>(n);
  T** out = arena.take<T*>(n);
  row_pointers(p.grad_projected, row0, row1, grad);
  const RowSums sums(arena.take<float>(F), p.sums + block * F, F);
  for (int64_t i = 0; i < n; ++i) {
    const int64_t image = (row0 + i) / pixels, pixel = (row0 + i) % pixels;
    const float* share = p.grad_gates + image * p.channel_blocks * p.gates * pixels + pixel;
    for (int64_t l = 0; l < p.gates; ++l) {
      float sum = 0;
      for (int64_t block_c = 0; block_c < p.channel_blocks; ++block_c) sum += share[(block_c * p.gates + l) * pixels];
      store_lanes(grad[i] + first + l, 1, 1, splat(sum));
    }
    for (int64_t c = 0; c < F; c += VL) {
      const int lanes = int(F - c < VL ? F - c : VL);
      sums.add(c, lanes, load_lanes(grad[i] + c, lanes, 1));
    }
    sums.end_of_row(i, n);
  }
  if (!p.grad_x.data) return;
  row_pointers(p.grad_x, row0, row1, out);
  int64_t lda;
  const CT* a = operand_rows<T>(p.grad_projected, n, grad, F, arena.take<CT>(n * padded_k<CT>(F)), &lda);
  product(a, lda, n, p.f_t, Writing<T>{out, p.grad_x.channel, nullptr});
}

constexpr int64_t GRADIENT_ROWS = 256;  // tokens whose products are summed in registers

static int64_t weight_gradient_scratch(const WeightGradient& p, int64_t columns) {
  return (columns * (GRADIENT_ROWS + 2) + (p.K + VL) * (GRADIENT_ROWS + 2)) * 4 + columns * int64_t(sizeof(void*)) +
         8 * 64;
}

// Rows n0..n1 of the weight's gradient, over tokens row0..row1: the same product with tokens as the summed axis.
template <class T>
static void weight_gradient_of(const WeightGradient& p, int64_t n0, int64_t n1, int64_t row0, int64_t row1,
                               void* scratch) {
  using CT = operand_t<T>;
  const int64_t N = n1 - n0, run_in = regular_run(p.in), run_grad = regular_run(p.grad);
  const auto token = [](const Rows& rows, int64_t row) FK_LAMBDA { return RowCursor<T>(rows, row).next(); };
  const int64_t pieces = (p.unit + GRADIENT_ROWS - 1) / GRADIENT_ROWS, piece = (p.unit + pieces - 1) / pieces;
  for (int64_t from = row0, rows; from < row1; from += rows) {
    rows = at_most(at_most(piece, p.unit - from % p.unit), row1 - from);
    rows = at_most(rows, at_most(run_in - from % run_in, run_grad - from % run_grad));
    Arena arena{static_cast<char*>(scratch)};
    T** columns = arena.take<T*>(N);
    CT* packed_grad = arena.take<CT>(N * padded_k<CT>(rows));
    CT* panels = arena.take<CT>(panels_elements<CT>(p.K, rows));
    for (int64_t i = 0; i < N; ++i) columns[i] = token(p.grad, from) + (n0 + i) * p.grad.channel;
    int64_t lda;
    Rows transposed{};
    transposed.channel = p.grad.w;
    const CT* a = operand_rows<T>(transposed, N, columns, rows, packed_grad, &lda);
    pack_matrix_of(token(p.in, from), p.in.channel, p.in.w, p.K, rows, 0, p.K, panels);
    const bool add = p.add || from > row0;
    product(a, lda, N, Packed{p.K, rows, panels},
            in_cache([&](int64_t row, int64_t column, int lanes, vf value) FK_LAMBDA {
              float* to = p.grad_weight + (n0 + row) * p.K + column;
              store_lanes(to, lanes, 1, add ? load_lanes(to, lanes, 1) + value : value);
            }));
  }
}

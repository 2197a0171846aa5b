// Products of few rows: see FewRowsProduct in kernels.h.

// What a task reads of the weight for a panel.
struct PanelSource {
  const char* first;
  int64_t rows, row_bytes, stride_bytes;
};
template <class T>
static PanelSource panel_source(const FewRowsProduct& p, int64_t column) {
  using CT = operand_t<T>;
  if (column >= p.N || (!p.panels && p.stride_k != 1)) return {};
  const int64_t columns = at_most(NR, p.N - column), Kp = padded_k<CT>(p.K), size = sizeof(T);
  if (p.panels)
    return {reinterpret_cast<const char*>(static_cast<const CT*>(p.panels) + column * Kp), 1,
            panels_elements<CT>(columns, p.K) * int64_t(sizeof(CT)), 0};
  return {reinterpret_cast<const char*>(static_cast<const T*>(p.weight) + column * p.stride_n), columns, p.K * size,
          p.stride_n * size};
}

template <class T>
struct FewRowsScratch {
  StreamRows<T> x, out;
  RowBlock<T> q;
  const float* factors;
  operand_t<T>* panel;

  FewRowsScratch(Arena& arena, const FewRowsProduct& p, int64_t row0, int64_t n)
      : x(stream_rows<T>(arena, p.residual, p.x, row0, n)),
        out(stream_rows<T>(arena, p.residual, p.out, row0, n)),
        q(row_block<T>(arena, p.q, row0, n)),
        factors(row_factors(arena, p.residual, p.x.pixels, row0, n)),
        panel(arena.take<operand_t<T>>(panels_elements<operand_t<T>>(NR, p.K))) {}
};

template <class T>
static void few_rows_operand_of(const Rows& x, const Residual& r, int64_t K, int64_t row0, int64_t row1, void* operand,
                                void* memory) {
  using CT = operand_t<T>;
  Arena arena(memory);
  const StreamRows<T> rows = stream_rows<T>(arena, r, x, row0, row1 - row0);
  const int64_t stride = padded_k<CT>(K);
  CT* to = static_cast<CT*>(operand) + row0 * stride;
  const auto made = branch_operand(r, rows, K, to);
  for (int64_t i = 0; i < made.n && made.first != to; ++i)  // they are their own operand
    __builtin_memcpy(to + i * stride, made.first + i * made.stride, K * int64_t(sizeof(CT)));
}

// An epilogue that asks for some of a later panel's weights with every tile, so that reading them takes no time of its
// own.
template <class E>
struct WhileFetching {
  const E& epilogue;
  PanelSource later;
  int64_t n;  // rows of the product

  FK_INLINE void prefetch(int64_t row, int64_t rows, int64_t column) const {
    epilogue.prefetch(row, rows, column);
    if (!later.first) return;
    const int64_t per_row = (later.row_bytes + 63) / 64, lines = later.rows * per_row;
    int64_t line = lines * row / n;
    const int64_t end = lines * (row + rows) / n;
    for (int64_t i = line / per_row, at = line % per_row; line < end; ++line) {
      __builtin_prefetch(later.first + i * later.stride_bytes + at * 64, 0, 2);
      if (++at == per_row) at = 0, ++i;
    }
  }
  FK_INLINE bool full_tile(int64_t row, int64_t rows, int64_t column, const float* sums) const {
    return epilogue.full_tile(row, rows, column, sums);
  }
  FK_INLINE void edge(int64_t row, int64_t column, int n, vf sum) const { epilogue.edge(row, column, n, sum); }
};

template <class E>
WhileFetching(const E&, PanelSource, int64_t) -> WhileFetching<E>;

template <class T>
static void few_rows_product_of(const FewRowsProduct& p, int64_t n0, int64_t n1, void* memory) {
  using CT = operand_t<T>;
  using Then = FewRowsProduct::Then;
  Arena arena(memory);
  const FewRowsScratch<T> s(arena, p, 0, p.rows);
  const int64_t K = padded_k<CT>(p.K), stride = padded_k<CT>(p.N);
  const OperandRows<CT> a{static_cast<const CT*>(p.operand), K, p.rows};
  CT* next = static_cast<CT*>(p.next);
  const AddResidual finish{p.residual, s.factors, s.x, s.out};
  const bool post = p.residual.post_norm();
  const auto biased = [&](int64_t column, int lanes, vf sum)
                          FK_LAMBDA { return p.bias ? sum + load_lanes(p.bias + column, lanes, 1) : sum; };

  for (int64_t column = n0; column < n1; column += NR) {
    const int64_t columns = at_most(NR, n1 - column);
    const CT* panel = p.panels ? static_cast<const CT*>(p.panels) + column * K : s.panel;
    if (!p.panels)
      pack_matrix_of(static_cast<const T*>(p.weight) + column * p.stride_n, p.stride_n, p.stride_k, columns, p.K, 0,
                     columns, s.panel);
    const PanelSource later = panel_source<T>(p, column + p.ahead);
    const auto then = [&](const auto& epilogue) FK_LAMBDA {
      panel_product(a, panel, K, column, columns, WhileFetching{epilogue, later, a.n});
    };
    if (p.then == Then::STORE) then(StoreBias<T>{s.out.of_body, p.bias});
    if (p.then == Then::GELU) then(StoreGelu<T>{next, stride, 0, p.bias});
    if (p.then == Then::MODULATE)
      then(ReadRows{s.q, [&](int64_t row, int64_t c, int lanes, vf sum) FK_LAMBDA {
                      store_lanes(next + row * stride + c, lanes, 1, biased(c, lanes, sum) * s.q.load(row, c, lanes));
                    }});
    if (p.then == Then::RESIDUAL)
      then(ReadRows{s.x, [&](int64_t row, int64_t c, int lanes, vf sum) FK_LAMBDA {
                      const vf u = biased(c, lanes, sum);
                      if (post)
                        store_lanes(p.u + row * p.N + c, lanes, 1, u);
                      else
                        finish(row, c, lanes, u);
                    }});
  }
  for (int64_t i = 0; next && n1 == p.N && i < p.rows; ++i)
    for (int64_t c = p.N; c < stride; ++c) next[i * stride + c] = CT{};
}

template <class T>
static void few_rows_post_norm_of(const FewRowsProduct& p, int64_t row0, int64_t row1, void* memory) {
  Arena arena(memory);
  const FewRowsScratch<T> s(arena, p, row0, row1 - row0);
  post_norm_rows(AddResidual{p.residual, s.factors, s.x, s.out}, p.u + row0 * p.N, row1 - row0, p.N);
}

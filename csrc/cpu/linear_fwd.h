// out = in @ weight^T + bias over rows of tokens.

FK_INLINE vf bias_at(const float* bias, int64_t column, int n) { return bias ? load_lanes(bias + column, n, 1) : vf{}; }

static int64_t linear_scratch(const LinearForward& p, int64_t rows) {
  return rows * (p.weight.K + 2) * 4 + 2 * rows * int64_t(sizeof(void*)) + 4 * 64;
}

template <class T>
static void linear_fwd_of(const LinearForward& p, int64_t row0, int64_t row1, void* scratch) {
  using CT = operand_t<T>;
  Arena arena{static_cast<char*>(scratch)};
  const int64_t n = row1 - row0;
  T** in = arena.take<T*>(n);
  T** out = arena.take<T*>(n);
  row_pointers(p.in, row0, row1, in);
  row_pointers(p.out, row0, row1, out);
  int64_t lda;
  const CT* a = operand_rows<T>(p.in, n, in, p.weight.K, arena.take<CT>(n * padded_k<CT>(p.weight.K)), &lda);
  product(a, lda, n, p.weight,
          writing(out, p.out.channel, [&](int64_t row, int64_t column, int lanes, vf value) FK_LAMBDA {
            value += bias_at(p.bias, column, lanes);
            store_lanes(out[row] + column * p.out.channel, lanes, p.out.channel, value);
          }));
}

// out = in @ weight^T + bias over rows of tokens.

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
  product(a, lda, n, p.weight, Writing<T>{out, p.out.channel, p.bias});
}

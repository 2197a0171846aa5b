// out = pre_norm?(in) @ weight^T + bias over rows of tokens.

template <class T>
struct LinearScratch {
  RowBlock<T> in, out;
  operand_t<T>* operand;

  LinearScratch(Arena& arena, const LinearForward& p, int64_t row0, int64_t n)
      : in(row_block<T>(arena, p.in, row0, n)),
        out(row_block<T>(arena, p.out, row0, n)),
        operand(operand_memory<T>(arena, n, p.weight.K)) {}
};

template <class T>
static void linear_fwd_of(const LinearForward& p, int64_t row0, int64_t row1, void* memory) {
  Arena arena(memory);
  const LinearScratch<T> s(arena, p, row0, row1 - row0);
  product(branch_operand(p.residual, s.in, p.weight.K, s.operand), p.weight, StoreBias<T>{s.out, p.bias});
}

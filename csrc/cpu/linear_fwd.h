// out = post_norm?(pre_norm?(in) @ weight^T + bias) over rows of tokens.

template <class T>
struct LinearScratch {
  StreamRows<T> in;
  RowBlock<T> out;
  operand_t<T>* operand;
  float* u;

  LinearScratch(Arena& arena, const LinearForward& p, int64_t row0, int64_t n)
      : in(stream_rows<T>(arena, p.residual, p.in, row0, n)),
        out(row_block<T>(arena, p.out, row0, n)),
        operand(operand_memory<T>(arena, n, p.weight.K)),
        u(arena.take<float>(p.residual.post_norm() ? n * p.weight.N : 0)) {}
};

template <class T>
static void linear_fwd_of(const LinearForward& p, int64_t row0, int64_t row1, void* memory) {
  Arena arena(memory);
  const int64_t n = row1 - row0, N = p.weight.N;
  const LinearScratch<T> s(arena, p, row0, n);
  const auto in = branch_operand(p.residual, s.in, p.weight.K, s.operand);
  if (!p.residual.post_norm()) return product(in, p.weight, StoreBias<T>{s.out, p.bias});
  product(in, p.weight, NoRows{[&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
            if (p.bias) sum += load_lanes(p.bias + column, lanes, 1);
            store_lanes(s.u + row * N + column, lanes, 1, sum);
          }});
  post_norm_rows(AddResidual{p.residual, nullptr, s.out, s.out}, s.u, n, N);
}

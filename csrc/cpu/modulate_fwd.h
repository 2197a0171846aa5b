// q * (h ctx_all + bias), and where proj is given the rest of the layer: proj(LN?(q * modulator)), a block of
// rows at a time so that q * modulator never leaves the cache.

template <class T>
struct ModulateScratch {
  RowBlock<T> ctx_all, out, modulator, x, q;
  operand_t<T>*operand, *z;

  ModulateScratch(Arena& arena, const ModulateForward& p, int64_t row0, int64_t n)
      : ctx_all(row_block<T>(arena, p.ctx_all, row0, n)),
        out(row_block<T>(arena, p.out, row0, n)),
        modulator(row_block<T>(arena, p.modulator, row0, n)),
        x(row_block<T>(arena, p.x, row0, n)),
        q(p.q.data ? row_block<T>(arena, p.q, row0, n) : new_row_block<T>(arena, n, p.weight.K)),
        operand(operand_memory<T>(arena, n, p.weight.K)),
        z(operand_memory<T>(arena, n, p.weight.K)) {}
};

template <class T>
static void modulate_fwd_of(const ModulateForward& p, int64_t row0, int64_t row1, void* memory) {
  using CT = operand_t<T>;
  Arena arena(memory);
  const int64_t n = row1 - row0, C = p.weight.K, ldz = padded_k<CT>(C);
  const ModulateScratch<T> s(arena, p, row0, n);
  const bool to_proj = p.proj.panels != nullptr;

  if (!p.q.data) product(operand_rows(s.x, C, s.operand), p.f_q, StoreBias<T>{s.q, p.f_q_bias});
  product(operand_rows(s.ctx_all, C, s.operand), p.weight,
          ReadRows{s.q, [&](int64_t row, int64_t column, int lanes, vf modulator) FK_LAMBDA {
                     if (p.bias) modulator += load_lanes(p.bias + column, lanes, 1);
                     if (p.modulator.data) store_lanes(s.modulator[row] + column, lanes, 1, modulator);
                     const vf value = modulator * s.q.load(row, column, lanes);
                     if (to_proj)
                       store_lanes(s.z + row * ldz + column, lanes, 1, value);
                     else
                       s.out.store(row, column, lanes, value);
                   }});
  if (!to_proj) return;

  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = C; c < ldz; ++c) s.z[i * ldz + c] = CT{};
  if (p.ln_weight) layer_norm_rows(s.z, ldz, n, C, p.ln_weight, p.ln_bias, p.ln_eps);
  product(OperandRows<CT>{s.z, ldz, n}, p.proj, StoreBias<T>{s.out, p.proj_bias});
}

// q * (h ctx_all + bias), and where proj is given the rest of the layer, proj(LN?(q * modulator)), and of its residual
// branch: a block of rows at a time so that q * modulator never leaves the cache.

template <class T>
struct ModulateScratch {
  RowBlock<T> ctx_all, modulator, q;
  StreamRows<T> x, out;
  operand_t<T>*operand, *z;
  const float* factors;
  float* u;

  ModulateScratch(Arena& arena, const ModulateForward& p, int64_t row0, int64_t n)
      : ctx_all(row_block<T>(arena, p.ctx_all, row0, n)),
        modulator(row_block<T>(arena, p.modulator, row0, n)),
        q(p.q.data ? row_block<T>(arena, p.q, row0, n) : new_row_block<T>(arena, n, p.weight.K)),
        x(stream_rows<T>(arena, p.residual, p.x, row0, n)),
        out(stream_rows<T>(arena, p.residual, p.out, row0, n)),
        operand(operand_memory<T>(arena, n, p.weight.K)),
        z(operand_memory<T>(arena, n, p.weight.K)),
        factors(row_factors(arena, p.residual, p.x.pixels, row0, n)),
        u(arena.take<float>(p.residual.post_norm() ? n * p.weight.K : 0)) {}
};

template <class T>
static void modulate_fwd_of(const ModulateForward& p, int64_t row0, int64_t row1, void* memory) {
  using CT = operand_t<T>;
  Arena arena(memory);
  const int64_t n = row1 - row0, C = p.weight.K, ldz = padded_k<CT>(C);
  const ModulateScratch<T> s(arena, p, row0, n);
  const bool to_proj = p.proj.panels != nullptr;

  if (!p.q.data) product(branch_operand(p.residual, s.x, C, s.operand), p.f_q, StoreBias<T>{s.q, p.f_q_bias});
  const auto modulator_at = [&](int64_t row, int64_t column, int lanes, vf modulator) FK_LAMBDA {
    if (p.bias) modulator += load_lanes(p.bias + column, lanes, 1);
    if (p.modulator.data) store_lanes(s.modulator[row] + column, lanes, 1, modulator);
    return modulator * s.q.load(row, column, lanes);
  };
  const auto ctx_all = operand_rows(s.ctx_all, C, s.operand);
  if (!to_proj)
    return product(ctx_all, p.weight,
                   ReadAndWriteRows{s.q, s.out, [&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
                                      s.out.store(row, column, lanes, modulator_at(row, column, lanes, sum));
                                    }});
  product(ctx_all, p.weight, ReadRows{s.q, [&](int64_t row, int64_t column, int lanes, vf sum) FK_LAMBDA {
                                        store_lanes(s.z + row * ldz + column, lanes, 1,
                                                    modulator_at(row, column, lanes, sum));
                                      }});

  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = C; c < ldz; ++c) s.z[i * ldz + c] = CT{};
  if (p.ln_weight) layer_norm_rows(s.z, ldz, n, C, p.ln_weight, p.ln_bias, p.ln_eps);
  const OperandRows<CT> z{s.z, ldz, n};
  if (!p.residual.add) return product(z, p.proj, StoreBias<T>{s.out.of_body, p.proj_bias});

  const AddResidual finish{p.residual, s.factors, s.x, s.out};
  const bool post = p.residual.post_norm();
  product(z, p.proj, ReadRows{s.x, [&](int64_t row, int64_t column, int lanes, vf u) FK_LAMBDA {
                                if (p.proj_bias) u += load_lanes(p.proj_bias + column, lanes, 1);
                                if (post)
                                  store_lanes(s.u + row * C + column, lanes, 1, u);
                                else
                                  finish(row, column, lanes, u);
                              }});
  if (post) post_norm_rows(finish, s.u, n, C);
}

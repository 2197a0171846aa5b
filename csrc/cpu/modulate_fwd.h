// q * (h ctx_all + bias), and where proj is given the rest of the layer: proj(LN?(q * modulator)), a block of
// rows at a time so that q * modulator never leaves the cache.

static int64_t modulate_scratch(const ModulateForward& p, int64_t rows) {
  return 3 * rows * (p.weight.K + 2) * 4 + 5 * rows * int64_t(sizeof(void*)) + 10 * 64;
}

// LayerNorm of each row in place, statistics in float.
template <class CT>
static void layer_norm_rows(CT* x, int64_t ldx, int64_t n, int64_t C, const float* weight, const float* bias,
                            float eps) {
  for (int64_t i = 0; i < n; ++i, x += ldx) {
    vf sums = {};
    for (int64_t c = 0; c < C; c += VL) sums += load_lanes(x + c, int(C - c < VL ? C - c : VL), 1);
    const float mean = sum_lanes(sums) / float(C);
    vf squares = {};
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = int(C - c < VL ? C - c : VL);
      vf d = load_lanes(x + c, lanes, 1) - mean;
      if (lanes < VL)
        for (int j = lanes; j < VL; ++j) d[j] = 0;
      squares += d * d;
    }
    const float rstd = 1.0f / __builtin_sqrtf(sum_lanes(squares) / float(C) + eps);
    for (int64_t c = 0; c < C; c += VL) {
      const int lanes = int(C - c < VL ? C - c : VL);
      vf normal = (load_lanes(x + c, lanes, 1) - mean) * rstd;
      store_lanes(x + c, lanes, 1, normal * load_lanes(weight + c, lanes, 1) + load_lanes(bias + c, lanes, 1));
    }
  }
}

template <class T>
static void modulate_fwd_of(const ModulateForward& p, int64_t row0, int64_t row1, void* scratch) {
  using CT = operand_t<T>;
  Arena arena{static_cast<char*>(scratch)};
  const int64_t n = row1 - row0, C = p.weight.K, ldz = padded_k<CT>(C);
  T** in = arena.take<T*>(n);
  T** q = arena.take<T*>(n);
  T** out = arena.take<T*>(n);
  T** kept = arena.take<T*>(n);
  row_pointers(p.ctx_all, row0, row1, in);
  row_pointers(p.out, row0, row1, out);
  if (p.modulator.data) row_pointers(p.modulator, row0, row1, kept);
  CT *operand = arena.take<CT>(n * ldz), *z = arena.take<CT>(n * ldz);
  int64_t lda, q_channel = p.q.channel;
  if (p.q.data) {
    row_pointers(p.q, row0, row1, q);
  } else {
    T *made = arena.take<T>(n * C), **x = arena.take<T*>(n);
    row_pointers(p.x, row0, row1, x);
    for (int64_t i = 0; i < n; ++i) q[i] = made + i * C;
    q_channel = 1;
    const CT* rows = operand_rows<T>(p.x, n, x, C, operand, &lda);
    product(rows, lda, n, p.f_q, Writing<T>{q, 1, p.f_q_bias});
  }
  const CT* a = operand_rows<T>(p.ctx_all, n, in, C, operand, &lda);
  const bool to_proj = p.proj.panels != nullptr;

  product(a, lda, n, p.weight,
          reading(q, q_channel, [&](int64_t row, int64_t column, int lanes, vf modulator) FK_LAMBDA {
            if (p.bias) modulator += load_lanes(p.bias + column, lanes, 1);
            if (p.modulator.data) store_lanes(kept[row] + column, lanes, 1, modulator);
            vf value = modulator * load_lanes(q[row] + column * q_channel, lanes, q_channel);
            if (to_proj)
              store_lanes(z + row * ldz + column, lanes, 1, value);
            else
              store_lanes(out[row] + column * p.out.channel, lanes, p.out.channel, value);
          }));
  if (!to_proj) return;

  for (int64_t i = 0; i < n; ++i)
    for (int64_t c = C; c < ldz; ++c) z[i * ldz + c] = CT{};
  if (p.ln_weight) layer_norm_rows(z, ldz, n, C, p.ln_weight, p.ln_bias, p.ln_eps);
  product(z, ldz, n, p.proj, Writing<T>{out, p.out.channel, p.proj_bias});
}

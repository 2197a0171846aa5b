// focal_context's backward for one image and one block of VL channels, streamed along T in one pass. With
//   z_l = conv_l(ctx_{l-1}),  ctx_l = GELU(z_l),  e_l the gradient of ctx_l,  dz_l = e_l GELU'(z_l):
//
//   forward again   row t of level l at step t + A_l              A_l = rt_1 + ... + rt_l
//   e_l             = gate_l dS + conv_{l+1}^T(dz_{l+1})          (+ the mean's part for the last level)
//   backward        dz_l of row t at step t + 2 A_L - A_l; the gradient of ctx at step t + 2 A_L
//   weights         dw_l += dz_l x ctx_{l-1}, when dz_l is made
//   gates           dgate_l = sum over channels of dS ctx_l, when ctx_l is made
//
// Each quantity lives in a ring just long enough for its last reader; see the op's README for the derivation.

// x[0..VL) -> lane i holds the sum of x[i]'s lanes.
FK_INLINE vf lane_sums(vf* x) {
#pragma GCC unroll 4
  for (int n = VL / 2; n >= 1; n /= 2)
#pragma GCC unroll 8
    for (int i = 0; i < n; ++i) {
      vf low, high;
      interleave(x[i], x[i + n], &low, &high, std::make_integer_sequence<int, VL>{});
      x[i] = low + high;
    }
  return x[0];
}

// sums[k] += sum_n d[n] * in[n + k] over a row: the taps of one kernel row.
template <bool PAIRED, int KW, int N>
FK_INLINE void taps_tile(const float* d, const float* in, vf* sums) {
  vf grad[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) grad[n] = load(d + n * VL);
#pragma GCC unroll 32
  for (int j = 0; j < N + KW - 1; ++j) {
    vf x = get<PAIRED>(in + j * VL);
#pragma GCC unroll 16
    for (int k = 0; k < KW; ++k)
      if (j - k >= 0 && j - k < N) sums[k] += grad[j - k] * x;
  }
}
template <bool PAIRED, int KW>
static void taps_row_of(const float* d, const float* in, int64_t W, float* taps) {
  vf sums[KW] = {};
  int64_t w = 0;
  for (; w + TILE <= W; w += TILE) taps_tile<PAIRED, KW, TILE>(d + w * VL, in + w * VL, sums);
  for (; w < W; ++w) taps_tile<PAIRED, KW, 1>(d + w * VL, in + w * VL, sums);
#pragma GCC unroll 16
  for (int k = 0; k < KW; ++k) store(taps + k * VL, load(taps + k * VL) + sums[k]);
}
// `in`: the padded row that the kernel row lies over. A piece's sum is made apart and then added: less rounding.
template <bool PAIRED>
static void taps_row(const float* d, const float* in, int64_t kw, int64_t W, float* taps) {
  for (; W > 2 * PIECE; W -= PIECE, d += PIECE * VL, in += PIECE * VL) taps_row<PAIRED>(d, in, kw, PIECE, taps);
  with_width(kw, [&](auto KW) FK_LAMBDA {
    if constexpr (KW.value > 0)
      taps_row_of<PAIRED, KW.value>(d, in, W, taps);
    else
      for_taps(kw,
               [&](auto n, int64_t k) FK_LAMBDA { taps_row_of<PAIRED, n.value>(d, in + k * VL, W, taps + k * VL); });
  });
}

// sum += all of a row, piece by piece.
FK_INLINE void add_row(const float* row, int64_t W, float* sum) {
  for (int64_t first = 0; first < W; first += PIECE) {
    vf piece = {};
    for (int64_t w = first; w < W && w < first + PIECE; ++w) piece += load(row + w * VL);
    store(sum, load(sum) + piece);
  }
}

// How many partial sums a level's weight has: its taps, and its bias.
FK_INLINE int64_t weight_sums(const ContextForward& p, int64_t l) {
  return p.levels[l].taps() + (p.biases && p.biases[l]);
}

// out[w] = the sum over lanes of a[w] * b[w].
FK_INLINE void dot_row(const float* a, const float* b, int64_t W, float* out) {
  int64_t w = 0;
  for (; w + VL <= W; w += VL) {
    vf x[VL];
#pragma GCC unroll 16
    for (int i = 0; i < VL; ++i) x[i] = load(a + (w + i) * VL) * load(b + (w + i) * VL);
    store(out + w, lane_sums(x));
  }
  for (; w < W; ++w) out[w] = sum_lanes(load(a + w * VL) * load(b + w * VL));
}

// One level's rings, and the one of its input.
struct LevelRings {
  Ring in;     // ctx_{l-1}
  Ring slope;  // GELU'(z_l)
  Ring dz;
  int64_t lag;  // A_l
};

struct ContextBackScratch {
  LevelRings* levels;
  RowTaps* rows;
  float *z, *e, *global_row, *nowhere;
  int64_t A = 0;   // A_L
  Ring grad, all;  // dS; the gated sum of the levels so far

  ContextBackScratch(Arena& arena, const ContextBackward& p)
      : levels(arena.take<LevelRings>(p.forward.L)),
        rows(arena.take<RowTaps>(most_kernel_rows(p.forward))),
        z(arena.take<float>(p.forward.g.W * VL)),
        e(arena.take<float>(p.forward.g.W * VL)),
        global_row(arena.take<float>(p.forward.g.W * VL)),
        nowhere(arena.take<float>(p.forward.g.W * VL)) {
    const ContextForward& f = p.forward;
    const Geometry& g = f.g;
    const auto ring = [&](int64_t slots, int64_t pad)
                          FK_LAMBDA { return Ring::make(arena, at_most(slots, g.T), pad, g); };
    for (int64_t l = 0; l < f.L; ++l) A += f.levels[l].rt();
    int64_t lag = 0;
    for (int64_t l = 0; l < f.L; ++l) {
      const Level& level = f.levels[l];
      const Ring in = ring(2 * (A - lag) + 1, level.rw());
      lag += level.rt();
      const LevelRings rings{in, ring(2 * (A - lag) + 1, 0), ring(level.kt, level.rw()), lag};
      if (arena.memory) levels[l] = rings;
    }
    const int64_t first = f.L ? f.levels[0].rt() : 0;
    grad = ring(2 * A - first + 1, 0);
    all = ring(A - first + 1, 0);
  }
};

template <class T>
static void context_bwd_of(const ContextBackward& p, int64_t b, int64_t block, void* memory) {
  constexpr bool PAIRED = PAIRS<T>;
  const ContextForward& f = p.forward;
  const Geometry& g = f.g;
  const int64_t c0 = block * VL, L = f.L, blocks = (g.C + VL - 1) / VL, pixels = g.pixels();
  const int n = lanes_of(g.C - c0);
  const float scale = f.normalize ? 1.0f / float(L + 1) : 1.0f;

  Arena arena(memory);
  const ContextBackScratch s(arena, p);
  LevelRings* const levels = s.levels;
  RowTaps* const rows = s.rows;
  float *const z = s.z, *const e = s.e, *const global_row = s.global_row, *const nowhere = s.nowhere;
  const Ring grad = s.grad, all = s.all;
  const int64_t A = s.A;
  for (int64_t l = 0; l < L; ++l) levels[l].in.clear_padding(), levels[l].dz.clear_padding();

  float* gate_grads = p.grad_gates ? p.grad_gates + (b * blocks + block) * (L + 1) * pixels : nullptr;
  float* taps = nullptr;
  if (p.grad_weights) {
    int64_t count = 0;
    for (int64_t l = 0; l < L; ++l) count += weight_sums(f, l);
    taps = p.grad_weights + (b * blocks + block) * count * VL;
    __builtin_memset(taps, 0, count * VL * sizeof(float));
  }

  // the global context: what it adds everywhere, and what its gradient adds to every pixel of the last level
  const vf mean = load_lanes(p.mean + b * g.C + c0, n, 1);
  vf mean_slope, global = gelu_and_slope<T>(mean, &mean_slope);
  LongSum grad_global;
  for (int64_t t = 0; t < g.T; ++t)
    for (int64_t m = 0; m < g.M; ++m) {
      const T* gate = address<T>(f.gates, b, L, t, m);
      const T* d = address<T>(p.grad_out, b, c0, t, m);
      for (int64_t first = 0; first < g.W; first += PIECE) {
        vf piece = {};
        for (int64_t w = first; w < g.W && w < first + PIECE; ++w)
          piece += load_lanes(d + w * p.grad_out.w, n, p.grad_out.c) * broadcast(gate + w * f.gates.w);
        grad_global.add(piece);
      }
    }
  const vf to_mean = grad_global.sum * mean_slope * (scale / float(pixels));

  for (int64_t w = 0; w < g.W; ++w) store(global_row + w * VL, global);

  // a row of the gradient of ctx_l from dz_{l+1}
  const auto conv_back = [&](int64_t l, int64_t t, int64_t m, float* out) FK_LAMBDA {
    const Level& level = f.levels[l];
    const float* weights = block_taps<false>(p.flipped[l], level, block);
    conv_row<false>(rows, gather_rows<false>(levels[l].dz, level, weights, g, t, m, rows), level.kw, g.W, vf{}, out);
  };

  for (int64_t step = 0; step < g.T + 2 * A; ++step) {
    if (step < g.T)
      for (int64_t m = 0; m < g.M; ++m) {
        float* d = grad.at(step, m);
        load_row<T>(p.grad_out, g, b, c0, step, m, d);
        if (f.normalize)
          for (int64_t w = 0; w < g.W; ++w) store(d + w * VL, load(d + w * VL) * scale);
        if (L) load_into_ring<T>(f.ctx, g, b, c0, step, m, levels[0].in, z, nowhere);
        if (gate_grads) dot_row(d, global_row, g.W, gate_grads + L * pixels + (step * g.M + m) * g.W);
      }

    for (int64_t l = 0; l < L; ++l) {  // forward again
      const int64_t t = step - levels[l].lag;
      if (t < 0 || t >= g.T) continue;
      const Level& level = f.levels[l];
      const bool last = l + 1 == L;
      for (int64_t m = 0; m < g.M; ++m) {
        const float* weights = block_taps<PAIRED>(f.weights[l], level, block);
        conv_row<PAIRED>(rows, gather_rows<PAIRED>(levels[l].in, level, weights, g, t, m, rows), level.kw, g.W,
                         block_bias(f, l, block), z);
        float* next = last ? nowhere : levels[l + 1].in.at(t, m);
        float* before = last ? nowhere : levels[l + 1].in.before(t, m, nowhere);
        float *slope = levels[l].slope.at(t, m), *sum = all.at(t, m);
        const T* gate = address<T>(f.gates, b, l, t, m);
        for (int64_t w = 0; w < g.W; ++w) {
          vf s, c = gelu_and_slope<T>(load(z + w * VL), &s);
          vf gated = c * broadcast(gate + w * f.gates.w);
          store(slope + w * VL, s);
          store(z + w * VL, c);
          if (!last) put<PAIRED>(next + w * VL, before + w * VL, c);
          store(sum + w * VL, l == 0 ? gated : load(sum + w * VL) + gated);
        }
        if (gate_grads) dot_row(grad.at(t, m), z, g.W, gate_grads + l * pixels + (t * g.M + m) * g.W);
      }
    }

    if (const int64_t t = step - A; f.out.data && t >= 0 && t < g.T)  // ctx_all of row t is complete
      for (int64_t m = 0; m < g.M; ++m) {
        const T* gate = address<T>(f.gates, b, L, t, m);
        T* out = address<T>(f.out, b, c0, t, m);
        for (int64_t w = 0; w < g.W; ++w) {
          vf sum = L ? load(all.at(t, m) + w * VL) : vf{};
          sum += global * broadcast(gate + w * f.gates.w);
          store_lanes(out + w * f.out.w, n, f.out.c, f.normalize ? sum / float(L + 1) : sum);
        }
      }

    float* level_taps = taps;
    for (int64_t l = 0; l < L; ++l) {  // offsets first: the levels below run from the last to the first
      if (taps) level_taps += weight_sums(f, l) * VL;
    }
    for (int64_t l = L - 1; l >= 0; --l) {
      const Level& level = f.levels[l];
      if (taps) level_taps -= weight_sums(f, l) * VL;
      const int64_t t = step - 2 * A + levels[l].lag;
      if (t < 0 || t >= g.T) continue;
      const bool last = l + 1 == L;
      for (int64_t m = 0; m < g.M; ++m) {
        if (!last) conv_back(l + 1, t, m, e);
        const float *d = grad.at(t, m), *slope = levels[l].slope.at(t, m);
        const T* gate = address<T>(f.gates, b, l, t, m);
        float* dz = levels[l].dz.at(t, m);
        for (int64_t w = 0; w < g.W; ++w) {
          vf above = last ? to_mean : load(e + w * VL);
          above += load(d + w * VL) * broadcast(gate + w * f.gates.w);
          store(dz + w * VL, above * load(slope + w * VL));
        }
        if (!taps) continue;
        const float* weights = block_taps<PAIRED>(f.weights[l], level, block);  // only to tell which rows were reached
        const int64_t reached = gather_rows<false>(levels[l].in, level, weights, g, t, m, rows);
        for (int64_t r = 0; r < reached; ++r)
          taps_row<PAIRED>(dz, rows[r].in, level.kw, g.W, level_taps + (rows[r].w - weights));
        if (f.biases && f.biases[l]) add_row(dz, g.W, level_taps + level.taps() * VL);
      }
    }

    if (const int64_t t = step - 2 * A; p.grad_ctx.data && t >= 0 && t < g.T)
      for (int64_t m = 0; m < g.M; ++m) {
        if (L)
          conv_back(0, t, m, e);
        else
          for (int64_t w = 0; w < g.W; ++w) store(e + w * VL, to_mean);
        T* out = address<T>(p.grad_ctx, b, c0, t, m);
        for (int64_t w = 0; w < g.W; ++w) store_lanes(out + w * p.grad_ctx.w, n, p.grad_ctx.c, load(e + w * VL));
      }
  }
}

// All focal levels of one image and one block of VL channels, streamed along T.
//
// Every level keeps only the rows that the next level's kernel reaches, in a ring of kt slots (a slot: M rows
// of W vectors, zero-padded by kw/2 on both sides), so the chain stays in the first caches for any map size:
//   input -> ring 0 -> level 1 -> GELU -> ring 1 -> level 2 -> ...    and   plane += gate * level
// A level lags rt rows behind the one before it. Rows beyond the map are left out of the sums, columns are
// padding.

// With AVX512_BF16 and bfloat16 maps, a ring keeps each value as bfloat16 beside the one a row further down, in one
// 32-bit lane: vdpbf16ps then multiplies two kernel rows at once. The lower half alone is the row itself.
template <class T>
constexpr bool PAIRS = false;
#ifdef FK_AVX512_BF16
template <>
constexpr bool PAIRS<bf16> = true;
#endif

template <bool PAIRED>
FK_INLINE vf multiply_add(vf tap, vf x, vf sum) {
#ifdef FK_AVX512_BF16
  if constexpr (PAIRED) return add_pair_products(sum, (__m512i)x, (__m512i)tap);
#endif
  return sum + tap * x;
}
// What a ring keeps of `value`: in its own row, and in the upper half of the row before.
template <bool PAIRED>
FK_INLINE void put(float* row, float* before, vf value) {
  if constexpr (PAIRED) {
    vu bits = widen(to_bf16(value));
    store(row, reinterpret_cast<vf>(bits));
    store(before, reinterpret_cast<vf>(reinterpret_cast<vu>(load(before)) | bits << 16));
  } else {
    store(row, value);
  }
}
template <bool PAIRED>
FK_INLINE vf get(const float* row) {
  if constexpr (PAIRED) return reinterpret_cast<vf>(reinterpret_cast<vu>(load(row)) << 16);
  return load(row);
}

// One kernel row laid over one input row, or two over a row of pairs.
struct RowTaps {
  const float* in;  // padded row
  const float* w;   // kw vectors
};

constexpr int TILE = VL == 16 ? 8 : 4;  // outputs held in registers

// Adds KW taps beside one another to N outputs.
template <bool PAIRED, int KW, int N>
FK_INLINE void add_taps(const float* in, const float* w, vf* acc) {
  vf tap[KW];
#pragma GCC unroll 16
  for (int k = 0; k < KW; ++k) tap[k] = load(w + k * VL);
#pragma GCC unroll 32
  for (int j = 0; j < N + KW - 1; ++j) {
    vf x = load(in + j * VL);
#pragma GCC unroll 16
    for (int k = 0; k < KW; ++k)
      if (j - k >= 0 && j - k < N) acc[j - k] = multiply_add<PAIRED>(tap[k], x, acc[j - k]);
  }
}

// f(Constant<n>, k) for taps k..k + n of a kernel row, until it has had them all: as many at once as share loads of
// inputs.
template <class F>
FK_INLINE void for_taps(int64_t kw, F f) {
  int64_t k = 0;
  for (; k + 5 <= kw; k += 5) f(Constant<5>{}, k);
  if (k + 3 <= kw) f(Constant<3>{}, k), k += 3;
  for (; k < kw; ++k) f(Constant<1>{}, k);
}

template <bool PAIRED, int KW, int N>
FK_INLINE void conv_tile(const RowTaps* rows, int64_t n_rows, int64_t kw, vf bias, float* out) {
  vf acc[N];
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) acc[n] = bias;
  for (int64_t r = 0; r < n_rows; ++r) {
    const float *in = rows[r].in, *w = rows[r].w;
    if constexpr (KW > 0)
      add_taps<PAIRED, KW, N>(in, w, acc);
    else
      for_taps(kw, [&](auto n, int64_t k) FK_LAMBDA { add_taps<PAIRED, n.value, N>(in + k * VL, w + k * VL, acc); });
  }
#pragma GCC unroll 8
  for (int n = 0; n < N; ++n) store(out + n * VL, acc[n]);
}

template <bool PAIRED, int KW>
static void conv_row_of(RowTaps* rows, int64_t n_rows, int64_t kw, int64_t W, vf bias, float* out) {
  int64_t tiles = (W + TILE - 1) / TILE;
  for (int64_t i = 0; i < tiles; ++i) {
    int64_t n = W / tiles + (i < W % tiles);
    with_constant_up_to<TILE>(n,
                              [&](auto N) FK_LAMBDA { conv_tile<PAIRED, KW, N.value>(rows, n_rows, kw, bias, out); });
    out += n * VL;
    for (int64_t r = 0; r < n_rows; ++r) rows[r].in += n * VL;
  }
}

// f(Constant<kw>) for the widths that have code of their own, f(Constant<0>) for any other.
template <class F>
FK_INLINE void with_width(int64_t kw, F f) {
  if (!with_constant<1, 3, 5, 7, 9>(kw, f)) f(Constant<0>{});
}

// out[w] = bias + sum over rows and taps; consumes `rows`.
template <bool PAIRED>
static void conv_row(RowTaps* rows, int64_t n_rows, int64_t kw, int64_t W, vf bias, float* out) {
  with_width(kw, [&](auto KW) FK_LAMBDA { conv_row_of<PAIRED, KW.value>(rows, n_rows, kw, W, bias, out); });
}

// The last few rows (along T) of a map, as zero-padded float rows of VL channels.
struct Ring {
  float* data;
  int64_t slots, pad, row, slot;  // pad in pixels; row and slot in floats

  static Ring make(Arena& arena, int64_t slots, int64_t pad, const Geometry& g) {
    const int64_t row = (g.W + 2 * pad) * VL, slot = g.M * row;
    return {arena.take<float>(slots * slot), slots, pad, row, slot};
  }
  int64_t floats() const { return slots * slot; }
  void clear_padding() const {
    for (float* p = data; p < data + floats(); p += row)
      for (int64_t i = 0; i < pad; ++i) store(p + i * VL, vf{}), store(p + row - (i + 1) * VL, vf{});
  }
  FK_INLINE float* padded(int64_t t, int64_t m) const { return data + (t % slots) * slot + m * row; }
  FK_INLINE float* at(int64_t t, int64_t m) const { return padded(t, m) + pad * VL; }
  FK_INLINE float* before(int64_t t, int64_t m, float* nowhere) const {
    return t > 0 && slots > 1 ? at(t - 1, m) : nowhere;
  }
};

template <class T>
FK_INLINE T* address(const MapView& v, int64_t b, int64_t c, int64_t t, int64_t m) {
  return static_cast<T*>(v.data) + b * v.b + c * v.c + t * v.t + m * v.m;
}

// Row (t, m) of channels c0.. into VL-wide floats.
template <class T>
FK_INLINE void load_row(const MapView& v, const Geometry& g, int64_t b, int64_t c0, int64_t t, int64_t m, float* out) {
  const T* p = address<T>(v, b, c0, t, m);
  int n = lanes_of(g.C - c0);
  int64_t w = 0;
  if (v.w == 1 && v.c != 1 && n == VL)  // channel planes
    for (; w + VL <= g.W; w += VL) {
      vf x[VL];
      for (int i = 0; i < VL; ++i) x[i] = load(p + i * v.c + w);
      transpose(x);
      for (int i = 0; i < VL; ++i) store(out + (w + i) * VL, x[i]);
    }
  for (; w < g.W; ++w) {
    __builtin_prefetch(p + w * v.w + v.t);  // the row that comes next: too far apart for the hardware to guess
    __builtin_prefetch(p + w * v.w + v.t + VL - 1);
    store(out + w * VL, load_lanes(p + w * v.w, n, v.c));
  }
}

template <class T>
FK_INLINE void load_into_ring(const MapView& v, const Geometry& g, int64_t b, int64_t c0, int64_t t, int64_t m,
                              const Ring& ring, float* z, float* nowhere) {
  if (!PAIRS<T>) return load_row<T>(v, g, b, c0, t, m, ring.at(t, m));
  load_row<T>(v, g, b, c0, t, m, z);
  float *row = ring.at(t, m), *before = ring.before(t, m, nowhere);
  for (int64_t w = 0; w < g.W; ++w) put<PAIRS<T>>(row + w * VL, before + w * VL, load(z + w * VL));
}

// The kernel rows of a level that reach input row (t, m) from rows inside the map, two at a time where PAIRED.
// Returns how many. Taps are packed [kernel row][tap][lane], and where PAIRED once more as pairs of kernel rows.
template <bool PAIRED>
FK_INLINE int64_t gather_rows(const Ring& in, const Level& level, const float* weights, const Geometry& g, int64_t t,
                              int64_t m, RowTaps* rows) {
  const int64_t first = t - level.rt(), begin = first < 0 ? -first : 0;
  const int64_t end = g.T - first < level.kt ? g.T - first : level.kt;
  int64_t n = 0;
  for (int64_t dt = begin; dt < end;) {
    const bool pair = PAIRED && dt + 1 < end;
    for (int64_t dm = 0; dm < level.km; ++dm) {
      const int64_t mi = m + dm - level.rm();
      if (mi < 0 || mi >= g.M) continue;
      const int64_t tap = (dt * level.km + dm) * level.kw + (pair ? level.taps() : 0);
      rows[n++] = {in.padded(first + dt, mi), weights + tap * VL};
    }
    dt += pair ? 2 : 1;
  }
  return n;
}
// One block's taps of a level in `packed`.
template <bool PAIRED>
FK_INLINE const float* block_taps(const float* packed, const Level& level, int64_t block) {
  return packed + block * level.taps() * (PAIRED ? 2 : 1) * VL;
}

// Level l's biases of one block.
FK_INLINE vf block_bias(const ContextForward& p, int64_t l, int64_t block) {
  return p.biases && p.biases[l] ? load(p.biases[l] + block * VL) : vf{};
}

static int64_t most_kernel_rows(const ContextForward& p) {
  int64_t most = 1;
  for (int64_t l = 0; l < p.L; ++l)
    if (p.levels[l].kt * p.levels[l].km > most) most = p.levels[l].kt * p.levels[l].km;
  return most;
}

struct ContextScratch {
  Ring* rings;  // each level's input
  RowTaps* rows;
  float *z, *nowhere;  // nowhere: for the row before the first

  ContextScratch(Arena& arena, const ContextForward& p)
      : rings(arena.take<Ring>(p.L)),
        rows(arena.take<RowTaps>(most_kernel_rows(p))),
        z(arena.take<float>(p.g.W * VL)),
        nowhere(arena.take<float>(p.g.W * VL)) {
    for (int64_t l = 0; l < p.L; ++l) {
      const Ring ring = Ring::make(arena, p.levels[l].kt, p.levels[l].rw(), p.g);
      if (arena.memory) rings[l] = ring;
    }
  }
};

constexpr int64_t PIECE = 256;  // of a row, summed apart: a long run of additions into one float loses digits

// A sum of such pieces, of a whole map perhaps; what one addition rounds away is given to the next (Kahan). The mean's
// gradient and the mean go to every pixel again: all sums over pixels behind them would add up one and the same error.
struct LongSum {
  vf sum = {}, excess = {};
  FK_INLINE void add(vf x) {
    x -= excess;
    const vf next = sum + x;
    excess = (next - sum) - x;
    sum = next;
  }
};

// c = GELU(z) of a row: gated into `out`, and kept for the next level or, of the last, summed.
template <class T, bool FIRST, bool LAST>
FK_INLINE void gated_row(const float* z, const T* gate, int64_t gate_stride, int64_t W, float* out, float* next,
                         float* before, LongSum& sum) {
  for (int64_t first = 0; first < W; first += PIECE) {
    const int64_t end = at_most(W, first + PIECE);
    vf piece = {};
    for (int64_t w = first; w < end; ++w, gate += gate_stride) {
      const vf c = gelu<T>(load(z + w * VL)), gated = c * broadcast(gate);
      store(out + w * VL, FIRST ? gated : load(out + w * VL) + gated);
      if (!LAST) put<PAIRS<T>>(next + w * VL, before + w * VL, c);
      if (LAST) piece += c;
    }
    if (LAST) sum.add(piece);
  }
}

template <class T>
static void context_fwd_levels_of(const ContextForward& p, int64_t b, int64_t block, int64_t t0, int64_t t1,
                                  float* plane, float* sums, void* memory) {
  constexpr bool PAIRED = PAIRS<T>;
  const Geometry& g = p.g;
  const int64_t c0 = block * VL, slab = g.M * g.W * VL;

  Arena arena(memory);
  const ContextScratch s(arena, p);
  Ring* const rings = s.rings;
  RowTaps* const rows = s.rows;
  float *const z = s.z, *const nowhere = s.nowhere;
  int64_t reach = 0;  // how far the levels see, along T
  for (int64_t l = 0; l < p.L; ++l) {
    rings[l].clear_padding();
    reach += p.levels[l].rt();
  }
  LongSum sum;  // of p.summed rows; t below rises, and so do they
  const auto end_row = [&](int64_t t) FK_LAMBDA {
    if ((t + 1) % p.summed && t + 1 < g.T) return;
    store(sums + t / p.summed * VL, sum.sum);
    sum = {};
  };

  if (p.L == 0) {
    for (int64_t t = t0; t < t1; ++t) {
      for (int64_t m = 0; m < g.M; ++m) {
        load_row<T>(p.ctx, g, b, c0, t, m, z);
        for (int64_t first = 0; first < g.W; first += PIECE) {
          vf piece = {};
          for (int64_t w = first; w < g.W && w < first + PIECE; ++w) piece += load(z + w * VL);
          sum.add(piece);
        }
      }
      end_row(t);
    }
    __builtin_memset(plane, 0, (t1 - t0) * slab * sizeof(float));
    return;
  }

  int64_t from = t0 - reach < 0 ? 0 : t0 - reach, to = t1 + reach;
  for (int64_t step = from; step < to; ++step) {
    if (step < g.T)
      for (int64_t m = 0; m < g.M; ++m) load_into_ring<T>(p.ctx, g, b, c0, step, m, rings[0], z, nowhere);

    int64_t t = step, ahead = reach;  // ahead: rows that the later levels still need on both sides
    for (int64_t l = 0; l < p.L; ++l) {
      const Level& level = p.levels[l];
      t -= level.rt();
      ahead -= level.rt();
      if (t < 0 || t < t0 - ahead || t >= t1 + ahead || t >= g.T) continue;
      const bool inside = t >= t0 && t < t1, last = l + 1 == p.L;
      const float* weights = block_taps<PAIRED>(p.weights[l], level, block);
      const vf bias = block_bias(p, l, block);
      for (int64_t m = 0; m < g.M; ++m) {
        conv_row<PAIRED>(rows, gather_rows<PAIRED>(rings[l], level, weights, g, t, m, rows), level.kw, g.W, bias, z);
        float *next = last ? nowhere : rings[l + 1].at(t, m),
              *before = last ? nowhere : rings[l + 1].before(t, m, nowhere);
        if (!inside) {
          for (int64_t w = 0; w < g.W; ++w) put<PAIRED>(next + w * VL, before + w * VL, gelu<T>(load(z + w * VL)));
          continue;
        }
        const T* gate = address<T>(p.gates, b, l, t, m);
        float* out = plane + ((t - t0) * g.M + m) * g.W * VL;
        if (l == 0)
          last ? gated_row<T, true, true>(z, gate, p.gates.w, g.W, out, next, before, sum)
               : gated_row<T, true, false>(z, gate, p.gates.w, g.W, out, next, before, sum);
        else
          last ? gated_row<T, false, true>(z, gate, p.gates.w, g.W, out, next, before, sum)
               : gated_row<T, false, false>(z, gate, p.gates.w, g.W, out, next, before, sum);
      }
      if (last && inside) end_row(t);
    }
  }
}

template <class T>
static void context_fwd_finish_of(const ContextForward& p, int64_t b, int64_t block, int64_t t0, int64_t t1,
                                  const float* plane, const float* sums) {
  const Geometry& g = p.g;
  const int64_t c0 = block * VL;
  const int n = lanes_of(g.C - c0);
  alignas(64) float means[VL];
  for (int lane = 0; lane < VL; ++lane) {
    double sum = 0;
    for (int64_t i = 0; i < p.sums(); ++i) sum += sums[i * VL + lane];
    means[lane] = float(sum / double(g.pixels()));
  }
  const vf mean = load(means), global = gelu<T>(mean);
  const vf divisor = splat(p.normalize ? float(p.L + 1) : 1.0f);
  if (p.mean && t0 == 0) store_lanes(p.mean + b * g.C + c0, n, 1, mean);
  for (int64_t t = t0; t < t1; ++t)
    for (int64_t m = 0; m < g.M; ++m, plane += g.W * VL) {
      const T* gate = address<T>(p.gates, b, p.L, t, m);
      T* out = address<T>(p.out, b, c0, t, m);
      for (int64_t w = 0; w < g.W; ++w) {
        vf all = load(plane + w * VL) + global * broadcast(gate + w * p.gates.w);
        store_lanes(out + w * p.out.w, n, p.out.c, p.normalize ? all / divisor : all);
      }
    }
}

// See Kernels::pack_taps.
template <class T>
static void pack_taps_of(const T* w, int64_t C, const Level& level, const int64_t strides[4], bool paired,
                         int64_t block, float* packed) {
  const int64_t c0 = block * VL, forms = paired ? 2 : 1;
  const int n = lanes_of(C - c0);
  packed += block * forms * level.taps() * VL;
  for (int64_t form = 0; form < forms; ++form)
    for (int64_t i = 0; i < level.kt; ++i)
      for (int64_t j = 0; j < level.km; ++j)
        for (int64_t k = 0; k < level.kw; ++k, packed += VL) {
          const T* from = w + c0 * strides[0] + i * strides[1] + j * strides[2] + k * strides[3];
          const vf tap = load_lanes(from, n, strides[0]);
          if (!paired) {
            store(packed, tap);
            continue;
          }
          const bool pair = form == 1 && i + 1 < level.kt;
          const vf below = pair ? load_lanes(from + strides[1], n, strides[0]) : vf{};
          store(packed, reinterpret_cast<vf>(widen(to_bf16(tap)) | widen(to_bf16(below)) << 16));
        }
}

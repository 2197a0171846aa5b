// What follows h's matrix product: its bias, q *, LayerNorm.
#include "cuda/columns.h"
#include "cuda/modulate_tile.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

// Quads along whichever axis lies closest in memory.
struct Elementwise {
  ModulateForward p;
  bool along_channels;
  int64_t quads, per_line;
};

template <class T>
__global__ void __launch_bounds__(THREADS) modulate_fwd_kernel(Elementwise arguments) {
  const ModulateForward& p = arguments.p;
  const int64_t step = int64_t(gridDim.x) * THREADS;
  for (int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x; i < arguments.quads; i += step) {
    const int64_t line = i / arguments.per_line, first = i % arguments.per_line * 4;
    float q[4], modulator[4], out[4] = {};
    if (arguments.along_channels) {
      const Pixel at(p.g, line);
      const int n = int(p.g.C - first < 4 ? p.g.C - first : 4);
      load_quad(at.in<const T>(p.q, first), p.q.c, n, q);
      load_quad(at.in<const T>(p.modulator, first), p.modulator.c, n, modulator);
      for (int j = 0; j < 4; ++j)
        if (j < n)
          out[j] = (q[j] + of_vector<T>(p.q_bias, first + j)) * (modulator[j] + of_vector<T>(p.bias, first + j));
      store_quad(at.in<T>(p.out, first), p.out.c, n, out);
    } else {  // lines are (channel, image, t, m)
      const int64_t lines = p.g.B * p.g.T * p.g.M, c = line / lines;
      const Pixel at(p.g, line % lines * p.g.W + first);
      const int n = int(p.g.W - first < 4 ? p.g.W - first : 4);
      const float q_bias = of_vector<T>(p.q_bias, c), bias = of_vector<T>(p.bias, c);
      load_quad(at.in<const T>(p.q, c), p.q.w, n, q);
      load_quad(at.in<const T>(p.modulator, c), p.modulator.w, n, modulator);
      for (int j = 0; j < 4; ++j) out[j] = (q[j] + q_bias) * (modulator[j] + bias);
      store_quad(at.in<T>(p.out, c), p.out.w, n, out);
    }
  }
}

// Over tokens whose channels are adjacent.
template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) modulate_columns_fwd_kernel(ModulateForward p) {
  const ColumnsTiling tiling(p.g.C, sizeof(T));
  const ColumnsAt at(tiling);
  const int64_t column = at.column<T>(tiling), tokens = p.g.B * p.g.pixels();
  const int64_t step = gridDim.x / tiling.tiles * tiling.lanes;
  if (column >= p.g.C || at.lane >= tiling.lanes) return;
  const T* const query = static_cast<const T*>(p.q.data) + column;
  const T* const modulator = static_cast<const T*>(p.modulator.data) + column;
  T* const out = static_cast<T*>(p.out.data) + column;
#pragma unroll 4
  for (int64_t token = at.part * tiling.lanes + at.lane; token < tokens; token += step) {
    const Columns<T> q = load_columns(query + token * p.q.w), m = load_columns(modulator + token * p.modulator.w);
    Columns<T> product;
#pragma unroll
    for (int i = 0; i < Columns<T>::N; ++i) product.set(i, q[i] * m[i]);
    store_columns(out + token * p.out.w, product);
  }
}

// Over channels whose tokens are adjacent.
template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) modulate_lines_fwd_kernel(ModulateForward p) {
  const LinesAt at(p.g.C);
  const T* const query = static_cast<const T*>(p.q.data) + at.line * p.q.c;
  const T* const modulator = static_cast<const T*>(p.modulator.data) + at.line * p.modulator.c;
  T* const out = static_cast<T*>(p.out.data) + at.line * p.out.c;
  const float q_bias = of_vector<T>(p.q_bias, at.line), bias = of_vector<T>(p.bias, at.line);
  at.each<T>(p.g.W, [&](int64_t i) {
    const Columns<T> q = load_columns(query + i), m = load_columns(modulator + i);
    Columns<T> product;
#pragma unroll
    for (int j = 0; j < Columns<T>::N; ++j) product.set(j, (q[j] + q_bias) * (m[j] + bias));
    store_columns(out + i, product);
  });
}

bool by_lines(const ModulateForward& p) {
  return !p.ln_weight.data && in_lines(p.g, p.q, p.dtype) && in_lines(p.g, p.modulator, p.dtype) &&
         in_lines(p.g, p.out, p.dtype);
}

bool by_columns(const ModulateForward& p) {
  const bool plain =
      !p.ln_weight.data && !p.q_bias.data && !p.bias.data && p.g.C % (p.dtype == DType::f32 ? 4 : 8) == 0;
  return plain && in_columns(p.g, p.q, p.dtype) && in_columns(p.g, p.modulator, p.dtype) &&
         in_columns(p.g, p.out, p.dtype);
}

template <class T>
__global__ void __launch_bounds__(TOKENS* WARPS) modulate_ln_fwd_kernel(ModulateForward p) {
  const int64_t tokens = p.g.B * p.g.pixels();
  float* const area = shared_memory<float>();
  for (int64_t tile = blockIdx.x; tile * TOKENS < tokens; tile += gridDim.x) {
    const int64_t token = tile * TOKENS + threadIdx.x % TOKENS;
    const bool valid = token < tokens;
    const Pixel at(p.g, valid ? token : 0);
    const Normalizer normal = normalizer<T>(p, at, area);
    for (int64_t c = threadIdx.x / TOKENS; c < p.g.C && valid; c += WARPS) {
      const float z = (product<T>(p, at, c) - normal.mean) * normal.rstd;
      *at.in<T>(p.out, c) = from_float<T>(z * of_vector<T>(p.ln_weight, c) + of_vector<T>(p.ln_bias, c));
    }
  }
}

}  // namespace

void run_modulate_fwd(const ModulateForward& p, void* stream) {
  const int64_t tokens = p.g.B * p.g.pixels();
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.ln_weight.data)
      return launch(modulate_ln_fwd_kernel<T>, std::min<int64_t>((tokens + TOKENS - 1) / TOKENS, 1 << 20),
                    TOKENS * WARPS, TOKENS * WARPS * 4, stream, p);
    if (by_lines(p))
      return launch(modulate_lines_fwd_kernel<T>, line_parts(p.g.C, tokens) * p.g.C, ColumnsTiling::THREADS, 0, stream,
                    p);
    if (by_columns(p)) {
      const ColumnsTiling tiling(p.g.C, sizeof(T));
      return launch(modulate_columns_fwd_kernel<T>, tiling.parts(tokens) * tiling.tiles, tiling.THREADS, 0, stream, p);
    }
    Elementwise e{p, p.q.c == 1 && p.q.w != 1, 0, 0};
    e.per_line = ((e.along_channels ? p.g.C : p.g.W) + 3) / 4;
    e.quads = e.per_line * (e.along_channels ? tokens : p.g.C * p.g.B * p.g.T * p.g.M);
    launch(modulate_fwd_kernel<T>, std::min<int64_t>((e.quads + THREADS - 1) / THREADS, 1 << 20), THREADS, 0, stream,
           e);
  });
}

}  // namespace focalnet::cuda

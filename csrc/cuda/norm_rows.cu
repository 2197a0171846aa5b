// LayerNorm over dense token rows, also of a residual's sum that is made here. As many lanes share a row as keep it in
// their registers: PyTorch's kernel gives a block to each, and rows of 96 channels leave most of it idle.
#include <algorithm>

#include "cuda/columns.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

struct Arguments {
  NormForward p;
  int lanes;  // that share a row, a power of two
};

template <class T, int N>
__device__ void load_values(const Elements& e, int64_t at, float (&to)[N]) {
  const T* const from = static_cast<const T*>(e.data) + at;
#pragma unroll
  for (int i = 0; i < N; ++i) to[i] = to_float(from[i]);
}
template <int N>
__device__ void load_values(const Elements& e, int64_t at, float (&to)[N]) {
  if (e.dtype == DType::f32) return load_values<float>(e, at, to);
  if (e.dtype == DType::bf16) return load_values<__nv_bfloat16>(e, at, to);
  return load_values<__half>(e, at, to);
}

// x + drop_path * gamma * u, as it is written, of V channels from c on.
template <class X, class Y>
__device__ void add_residual(const NormForward& p, int64_t token, int c, Columns<X>& x) {
  constexpr int V = Columns<X>::N;
  const int64_t at = token * p.C + c;
  float u[V], factor[1] = {1};
  load_values<Y>(p.u, at, u);
  if (p.gamma.data) {
    float gamma[V];
    load_values(p.gamma, c, gamma);
#pragma unroll
    for (int i = 0; i < V; ++i) u[i] *= gamma[i];
  }
  if (p.drop_path.data) load_values(p.drop_path, token / p.pixels, factor);
#pragma unroll
  for (int i = 0; i < V; ++i) x.set(i, x[i] + u[i] * factor[0]);
  store_columns(static_cast<X*>(const_cast<void*>(p.sum.data)) + at, x);
}

// A lane has N accesses of V channels, `lanes` of them apart. SUM: x is a sum that is made here.
template <class X, class Y, int N, bool SUM>
__global__ void __launch_bounds__(THREADS) norm_rows_kernel(Arguments a) {
  const NormForward& p = a.p;
  constexpr int V = Columns<X>::N;
  const int lane = threadIdx.x % a.lanes, C = p.C;
  constexpr int KEPT = SUM ? 1 : N;  // weights in registers, where there are some left
  float weight[KEPT][V], bias[KEPT][V];
#pragma unroll
  for (int j = 0; j < N && !SUM; ++j) {
    const int c = (lane + j * a.lanes) * V;
    if (c < C) load_values(p.weight, c, weight[j]), load_values(p.bias, c, bias[j]);
  }
  const int64_t step = int64_t(gridDim.x) * (THREADS / a.lanes);
  // every lane of a warp goes through the same rounds: they exchange sums
  for (int64_t first = int64_t(blockIdx.x) * (THREADS / a.lanes); first < p.tokens; first += step) {
    const int64_t token = first + threadIdx.x / a.lanes;
    const X* const row = static_cast<const X*>(p.x.data) + token * C;
    Columns<X> x[N];
    float sum = 0, squares = 0;
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int c = (lane + j * a.lanes) * V;
      x[j] = Columns<X>{};
      if (c < C && token < p.tokens) {
        x[j] = load_columns(row + c);
        if constexpr (SUM) add_residual<X, Y>(p, token, c, x[j]);
      }
#pragma unroll
      for (int i = 0; i < V; ++i) sum += x[j][i];
    }
    const float mean = warp_sum(sum, a.lanes) / C;
#pragma unroll
    for (int j = 0; j < N; ++j)
#pragma unroll
      for (int i = 0; i < V; ++i) {
        const float off = x[j][i] - mean;
        squares += (lane + j * a.lanes) * V < C ? off * off : 0.0f;
      }
    const float rstd = 1.0f / sqrtf(warp_sum(squares, a.lanes) / C + p.eps);
#pragma unroll
    for (int j = 0; j < N; ++j) {
      const int c = (lane + j * a.lanes) * V;
      if (c >= C || token >= p.tokens) continue;
      float y[V];
      const int kept = SUM ? 0 : j;
      if constexpr (SUM) load_values(p.weight, c, weight[0]), load_values(p.bias, c, bias[0]);
#pragma unroll
      for (int i = 0; i < V; ++i) y[i] = (x[j][i] - mean) * rstd * weight[kept][i] + bias[kept][i];
      Y* const to = static_cast<Y*>(const_cast<void*>(p.y.data)) + token * C + c;
#pragma unroll
      for (int i = 0; i < V; i += 4) {
        const float four[4] = {y[i], y[i + 1], y[i + 2], y[i + 3]};
        store_quad(to + i, 1, 4, four);
      }
    }
  }
}

}  // namespace

bool takes_norm(const NormForward& p) {
  const int width = p.x.dtype == DType::f32 ? 4 : 8;
  const auto aligned = [](const Elements& e) { return reinterpret_cast<uintptr_t>(e.data) % 16 == 0; };
  return p.C % width == 0 && p.C <= 32 * 4 * width && aligned(p.x) && aligned(p.y) && aligned(p.u) && aligned(p.sum);
}

void run_norm_fwd(const NormForward& p, void* stream) {
  with_type(p.x.dtype, [&](auto x) {
    with_type(p.y.dtype, [&](auto y) {
      using X = decltype(x);
      using Y = decltype(y);
      if constexpr (sizeof(X) == sizeof(float) || std::is_same_v<X, Y>) {
        const int groups = p.C / Columns<X>::N;
        Arguments a{p, 1};
        while (groups > 4 * a.lanes) a.lanes *= 2;
        const int64_t blocks = (p.tokens * a.lanes + THREADS - 1) / THREADS, most = 16 * current_device().processors;
        const int least = 3;  // which more lanes than one have anyway
        with_constant<least, 4>(std::max(least, (groups + a.lanes - 1) / a.lanes), [&](auto n) {
          if (p.sum.data)
            launch(norm_rows_kernel<X, Y, n, true>, std::min(blocks, most), THREADS, 0, stream, a);
          else
            launch(norm_rows_kernel<X, Y, n, false>, std::min(blocks, most), THREADS, 0, stream, a);
        });
      }
    });
  });
}

}  // namespace focalnet::cuda

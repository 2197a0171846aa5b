// Token rows around the body of a residual branch: norm, scale, residual, and GELU's backward. Their matrix products
// are cuBLAS's. A warp takes a row; sums over tokens are made by tiles of channels, in parts that are added afterwards.
#include <algorithm>

#include "cuda/device.h"

namespace focalnet::cuda {

namespace {

constexpr int WARPS = 8, THREADS = 32 * WARPS, TILE = 128;  // TILE: channels, four per lane

// Elements i..i + 4 of a row, of which n are there.
__device__ inline void load_four(const Elements& e, int64_t i, int n, float (&to)[4]) {
  switch (e.dtype) {
    case DType::f32:
      return load_quad(static_cast<const float*>(e.data) + i, 1, n, to);
    case DType::bf16:
      return load_quad(static_cast<const __nv_bfloat16*>(e.data) + i, 1, n, to);
    case DType::f16:
      return load_quad(static_cast<const __half*>(e.data) + i, 1, n, to);
  }
}
__device__ inline void store_four(const Elements& e, int64_t i, int n, const float (&from)[4]) {
  void* data = const_cast<void*>(e.data);
  switch (e.dtype) {
    case DType::f32:
      return store_quad(static_cast<float*>(data) + i, 1, n, from);
    case DType::bf16:
      return store_quad(static_cast<__nv_bfloat16*>(data) + i, 1, n, from);
    case DType::f16:
      return store_quad(static_cast<__half*>(data) + i, 1, n, from);
  }
}

// f(channel, how many, values) for every four of a lane's channels of a row.
template <class F>
__device__ void each_four(const Elements& e, int64_t row, int C, const F& f) {
  for (int c = threadIdx.x % 32 * 4; c < C; c += TILE) {
    float values[4];
    const int n = C - c < 4 ? C - c : 4;
    load_four(e, row * C + c, n, values);
    f(c, n, values);
  }
}

struct Statistics {
  float mean, rstd;
};
__device__ inline Statistics statistics(const Elements& e, int64_t row, int C, float eps) {
  float sum = 0, squares = 0;
  each_four(e, row, C, [&](int, int n, const float (&v)[4]) {
    for (int j = 0; j < 4; ++j) sum += v[j];  // 0 beyond n
  });
  const float mean = warp_sum(sum) / C;
  each_four(e, row, C, [&](int, int n, const float (&v)[4]) {
    for (int j = 0; j < 4; ++j) squares += j < n ? (v[j] - mean) * (v[j] - mean) : 0;
  });
  return {mean, 1.0f / sqrtf(warp_sum(squares) / C + eps)};
}

__global__ void __launch_bounds__(THREADS) residual_fwd_kernel(ResidualForward p) {
  const int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32;
  if (row >= p.tokens) return;
  const Around& r = p.around;
  const Statistics of = r.norm ? statistics(p.u, row, p.C, r.norm_eps) : Statistics{0, 1};
  float factor[4] = {1};
  if (r.drop_path.data) load_four(r.drop_path, row / p.pixels, 1, factor);
  each_four(p.u, row, p.C, [&](int c, int n, float (&v)[4]) {
    float x[4], weight[4], bias[4], gamma[4];
    load_four(p.x, row * p.C + c, n, x);
    if (r.norm) load_four(r.norm_weight, c, n, weight), load_four(r.norm_bias, c, n, bias);
    if (r.gamma.data) load_four(r.gamma, c, n, gamma);
    for (int j = 0; j < 4; ++j) {
      if (r.norm) v[j] = (v[j] - of.mean) * of.rstd * weight[j] + bias[j];
      if (r.gamma.data) v[j] *= gamma[j];
      v[j] = x[j] + v[j] * factor[0];
    }
    store_four(p.y, row * p.C + c, n, v);
  });
}

// The gradients of rows; each row's mean and rstd for the sums.
__global__ void __launch_bounds__(THREADS) norm_bwd_kernel(NormBackward p) {
  const int64_t row = blockIdx.x * int64_t(WARPS) + threadIdx.x / 32;
  if (row >= p.tokens) return;
  const Around& r = p.around;
  const int C = p.C;
  float factor[4] = {1}, sum = 0, dot = 0;
  if (r.drop_path.data) load_four(r.drop_path, row / p.pixels, 1, factor);
  Statistics of{0, 1};
  // the gradient of the norm's result without its weight, of four channels
  const auto scaled = [&](int c, int n, float (&d)[4]) {
    float gamma[4], weight[4];
    if (r.gamma.data) load_four(r.gamma, c, n, gamma);
    if (r.norm) load_four(r.norm_weight, c, n, weight);
    for (int j = 0; j < 4; ++j) {
      d[j] *= factor[0];
      if (r.gamma.data) d[j] *= gamma[j];
      if (r.norm) d[j] *= weight[j];
    }
  };
  if (r.norm) {
    of = statistics(p.rows, row, C, r.norm_eps);
    if (threadIdx.x % 32 == 0) p.statistics[2 * row] = of.mean, p.statistics[2 * row + 1] = of.rstd;
    each_four(p.grad, row, C, [&](int c, int n, float (&d)[4]) {
      float v[4];
      load_four(p.rows, row * C + c, n, v);
      scaled(c, n, d);
      for (int j = 0; j < 4; ++j) sum += d[j], dot += d[j] * (v[j] - of.mean) * of.rstd;
    });
    sum = warp_sum(sum) / C, dot = warp_sum(dot) / C;
  }
  each_four(p.grad, row, C, [&](int c, int n, float (&d)[4]) {
    float v[4], more[4] = {};
    scaled(c, n, d);
    if (r.norm) load_four(p.rows, row * C + c, n, v);
    if (p.add.data) load_four(p.add, row * C + c, n, more);
    for (int j = 0; j < 4; ++j) {
      if (r.norm) d[j] = (d[j] - sum - (v[j] - of.mean) * of.rstd * dot) * of.rstd;
      d[j] += more[j];
    }
    store_four(p.grad_rows, row * C + c, n, d);
  });
}

// Adds up each lane's four sums over the block's warps; the first warp has them.
__device__ inline void add_warps(float (&sums)[4]) {
  float* const area = shared_memory<float>();
  __syncthreads();  // it may still be read
  for (int j = 0; j < 4; ++j) area[threadIdx.x * 4 + j] = sums[j];
  __syncthreads();
  for (int warp = 1; warp < WARPS; ++warp)
    for (int j = 0; j < 4; ++j) sums[j] += area[(warp * 32 + threadIdx.x % 32) * 4 + j];
}

// Sums over a part of the tokens, of a tile of channels: [part][4][C], see NormBackward::sums.
__global__ void __launch_bounds__(THREADS) norm_sums_kernel(NormBackward p) {
  const Around& r = p.around;
  const int tiles = (p.C + TILE - 1) / TILE, c = blockIdx.x % tiles * TILE + threadIdx.x % 32 * 4;
  const int64_t part = blockIdx.x / tiles;
  const int n = p.C - c < 4 ? p.C - c : 4;
  float sums[4][4] = {}, gamma[4], weight[4], bias[4];
  if (n > 0 && r.gamma.data) load_four(r.gamma, c, n, gamma);
  if (n > 0 && r.norm) load_four(r.norm_weight, c, n, weight), load_four(r.norm_bias, c, n, bias);
  for (int64_t row = part * WARPS + threadIdx.x / 32; row < p.tokens && n > 0; row += p.parts * WARPS) {
    float d[4], v[4] = {}, result[4] = {}, factor[4] = {1};
    load_four(p.grad, row * p.C + c, n, d);
    if (r.norm || r.gamma.data) load_four(p.rows, row * p.C + c, n, v);
    if (!p.add.data) load_four(p.grad_rows, row * p.C + c, n, result);
    if (r.drop_path.data) load_four(r.drop_path, row / p.pixels, 1, factor);
    for (int j = 0; j < 4; ++j) {
      const float up = d[j] * factor[0];
      const float normal = r.norm ? (v[j] - p.statistics[2 * row]) * p.statistics[2 * row + 1] : v[j];
      const float down = r.gamma.data ? up * gamma[j] : up;
      sums[0][j] += r.norm ? down * normal : 0;
      sums[1][j] += r.norm ? down : 0;
      sums[2][j] += r.gamma.data ? up * (r.norm ? normal * weight[j] + bias[j] : normal) : 0;
      sums[3][j] += result[j];
    }
  }
  for (int i = 0; i < 4; ++i) {
    add_warps(sums[i]);
    if (threadIdx.x < 32)
      for (int j = 0; j < 4; ++j)
        if (j < n) p.sums[(part * 4 + i) * p.C + c + j] = sums[i][j];
  }
}

template <class T>
__global__ void __launch_bounds__(THREADS) gelu_bwd_kernel(GeluBackward p) {
  const int tiles = (p.M + TILE - 1) / TILE, m = blockIdx.x % tiles * TILE + threadIdx.x % 32 * 4;
  const int64_t part = blockIdx.x / tiles;
  const int n = p.M - m < 4 ? p.M - m : 4;
  float sums[4] = {};
  for (int64_t row = part * WARPS + threadIdx.x / 32; row < p.tokens && n > 0; row += p.parts * WARPS) {
    const T* const pre = static_cast<const T*>(p.pre) + row * p.M + m;
    T* const hidden = static_cast<T*>(p.hidden) + row * p.M + m;
    T* const grad = static_cast<T*>(p.grad) + row * p.M + m;
    float v[4], d[4];
    load_quad(pre, 1, n, v);
    load_quad(grad, 1, n, d);
    for (int j = 0; j < 4; ++j) {
      d[j] *= gelu_slope<T>(v[j]);
      v[j] = gelu<T>(v[j]);
      sums[j] += d[j];
    }
    store_quad(hidden, 1, n, v);
    store_quad(grad, 1, n, d);
  }
  add_warps(sums);
  if (threadIdx.x < 32)
    for (int j = 0; j < 4; ++j)
      if (j < n) p.sums[part * p.M + m + j] = sums[j];
}

int64_t tiles_of(int channels) { return (channels + TILE - 1) / TILE; }

}  // namespace

int64_t token_parts(int64_t tokens, int channels) {
  const int64_t blocks = 8 * current_device().processors / tiles_of(channels) + 1;
  return std::max<int64_t>(1, std::min((tokens + WARPS - 1) / WARPS, blocks));
}

void run_residual_fwd(const ResidualForward& p, void* stream) {
  launch(residual_fwd_kernel, (p.tokens + WARPS - 1) / WARPS, THREADS, 0, stream, p);
}

void run_norm_bwd(const NormBackward& p, void* stream) {
  launch(norm_bwd_kernel, (p.tokens + WARPS - 1) / WARPS, THREADS, 0, stream, p);
  launch(norm_sums_kernel, p.parts * tiles_of(p.C), THREADS, THREADS * 16, stream, p);
}

void run_gelu_bwd(const GeluBackward& p, void* stream) {
  with_type(p.dtype, [&](auto zero) {
    launch(gelu_bwd_kernel<decltype(zero)>, p.parts * tiles_of(p.M), THREADS, THREADS * 16, stream, p);
  });
}

}  // namespace focalnet::cuda

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

// The sum over the lanes that share a row, for every one of them; `area`: a float per warp where lanes are several
// warps.
__device__ inline float sum_lanes(float value, int lanes, float* area) {
  return lanes > 32 ? group_sum(value, area, lanes) : warp_sum(value, lanes);
}

// Adds up the four sums of threads that are `lanes` apart; the first `lanes` of a block have them.
__device__ inline void add_rows(float (&sums)[4], int lanes) {
  float* const area = shared_memory<float>();
  __syncthreads();  // it may still be read
  for (int j = 0; j < 4; ++j) area[threadIdx.x * 4 + j] = sums[j];
  __syncthreads();
  for (int other = threadIdx.x + lanes; other < THREADS && int(threadIdx.x) < lanes; other += lanes)
    for (int j = 0; j < 4; ++j) sums[j] += area[other * 4 + j];
}

struct NormBackwardOnLanes {
  NormBackward p;
  int lanes;
};

// The gradients of rows, and a block's sums over its rows. Lanes that share a row keep it in registers, N times four
// channels each, and beside it what the sums of these channels have come to.
template <int N, bool NORM>
__global__ void __launch_bounds__(THREADS, N == 3 ? 2 : 1) norm_bwd_kernel(NormBackwardOnLanes arguments) {
  const NormBackward& p = arguments.p;
  const Around& r = p.around;
  const int C = p.C, lanes = arguments.lanes, lane = threadIdx.x % lanes;
  float* const area = shared_memory<float>();
  const auto channel = [&](int i) { return (i * lanes + lane) * 4; };
  const auto there = [&](int i) { return C - channel(i) < 4 ? C - channel(i) : 4; };  // or fewer than one
  float scale[N][4];                                                                  // gamma times norm's weight
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float weight[4];
    for (int j = 0; j < 4; ++j) scale[i][j] = 1;
    if (there(i) <= 0) continue;
    if (r.gamma.data) load_four(r.gamma, channel(i), there(i), scale[i]);
    if (NORM) load_four(r.norm_weight, channel(i), there(i), weight);
    for (int j = 0; NORM && j < 4; ++j) scale[i][j] *= weight[j];
  }
  // over rows: of what comes times what was normalized, of what comes, and of what goes
  float along[N][4] = {}, straight[N][4] = {}, gone[N][4] = {};
  const int64_t step = int64_t(gridDim.x) * (THREADS / lanes);
  for (int64_t first = int64_t(blockIdx.x) * (THREADS / lanes); first < p.tokens; first += step) {
    const int64_t row = first + threadIdx.x / lanes;  // every thread goes through the same rounds: they exchange sums
    const bool is_there = row < p.tokens;
    float factor[4] = {1}, v[N][4] = {}, d[N][4] = {};
    if (is_there && r.drop_path.data) load_four(r.drop_path, row / p.pixels, 1, factor);
#pragma unroll
    for (int i = 0; i < N; ++i)
      if (is_there && there(i) > 0) {
        if (NORM || r.gamma.data) load_four(p.rows, row * C + channel(i), there(i), v[i]);
        load_four(p.grad, row * C + channel(i), there(i), d[i]);
      }
    float rstd = 1;
    if (NORM) {
      float sum = 0, squares = 0;
#pragma unroll
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < 4; ++j) sum += v[i][j];  // 0 beyond C
      const float mean = sum_lanes(sum, lanes, area) / C;
#pragma unroll
      for (int i = 0; i < N; ++i)
        for (int j = 0; j < 4; ++j) v[i][j] = j < there(i) ? v[i][j] - mean : 0.0f, squares += v[i][j] * v[i][j];
      rstd = 1.0f / sqrtf(sum_lanes(squares, lanes, area) / C + r.norm_eps);
    }
    float sum = 0, dot = 0;
#pragma unroll
    for (int i = 0; i < N; ++i)
      for (int j = 0; j < 4; ++j) {
        d[i][j] *= factor[0], v[i][j] *= rstd;
        along[i][j] += d[i][j] * v[i][j], straight[i][j] += d[i][j];
        d[i][j] *= scale[i][j];
        sum += d[i][j], dot += d[i][j] * v[i][j];
      }
    if (NORM) sum = sum_lanes(sum, lanes, area) / C, dot = sum_lanes(dot, lanes, area) / C;
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (!is_there || there(i) <= 0) continue;
      float more[4] = {};
      if (p.add.data) load_four(p.add, row * C + channel(i), there(i), more);
      for (int j = 0; j < 4; ++j) {
        if (NORM) d[i][j] = (d[i][j] - sum - v[i][j] * dot) * rstd;
        d[i][j] += more[j];
      }
      store_four(p.grad_rows, row * C + channel(i), there(i), d[i]);
      for (int j = 0; j < 4; ++j) gone[i][j] += d[i][j];
    }
  }
  // over the block's rows; then each of NormBackward::sums is made of them
#pragma unroll
  for (int i = 0; i < N; ++i) {
    add_rows(along[i], lanes), add_rows(straight[i], lanes), add_rows(gone[i], lanes);
    if (int(threadIdx.x) >= lanes) continue;
    float gamma[4] = {1, 1, 1, 1}, weight[4] = {1, 1, 1, 1}, bias[4] = {};
    const int n = there(i);
    if (n > 0 && r.gamma.data) load_four(r.gamma, channel(i), n, gamma);
    if (n > 0 && NORM) load_four(r.norm_weight, channel(i), n, weight), load_four(r.norm_bias, channel(i), n, bias);
    for (int j = 0; j < n; ++j) {
      float* const to = p.sums + int64_t(blockIdx.x) * 4 * C + channel(i) + j;
      to[0] = NORM ? along[i][j] * gamma[j] : 0, to[C] = NORM ? straight[i][j] * gamma[j] : 0;
      to[2 * C] = r.gamma.data ? along[i][j] * weight[j] + straight[i][j] * bias[j] : 0,
             to[3 * C] = p.add.data ? 0 : gone[i][j];
    }
  }
}

// How many lanes share a row, of N times four channels each: those of a warp that leave the fewest idle, or more warps.
// (With eight times four a lane runs out of registers.)
struct RowLanes {
  int n = 4, lanes = 64;
  explicit RowLanes(int C) {
    const int groups = (C + 3) / 4;
    int least = 0;
    for (int some : {3, 4, 6}) {
      int share = 1;
      while (some * share < groups) share *= 2;
      if (share <= 32 && (least == 0 || some * share < least)) n = some, lanes = share, least = some * share;
    }
    if (least > 0) return;
    while (lanes < THREADS && n * lanes < groups) lanes *= 2;
    if (n * lanes < groups) n = 6;
  }
};
static_assert(MOST_NORMALIZED == 4 * 6 * THREADS);

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
  add_rows(sums, 32);
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

int64_t norm_bwd_parts(int64_t tokens, int C) {
  const int64_t rows = THREADS / RowLanes(C).lanes, blocks = (tokens + rows - 1) / rows;
  return std::max<int64_t>(1, std::min<int64_t>(blocks, 4 * current_device().processors));
}

void run_norm_bwd(const NormBackward& p, void* stream) {
  const RowLanes row(p.C);
  const NormBackwardOnLanes arguments{p, row.lanes};
  with_constant<3, 4, 6>(row.n, [&](auto n) {
    if (p.around.norm)
      launch(norm_bwd_kernel<n, true>, p.parts, THREADS, THREADS * 16, stream, arguments);
    else
      launch(norm_bwd_kernel<n, false>, p.parts, THREADS, THREADS * 16, stream, arguments);
  });
}

void run_gelu_bwd(const GeluBackward& p, void* stream) {
  with_type(p.dtype, [&](auto zero) {
    launch(gelu_bwd_kernel<decltype(zero)>, p.parts * tiles_of(p.M), THREADS, THREADS * 16, stream, p);
  });
}

}  // namespace focalnet::cuda

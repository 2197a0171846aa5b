// The second stage of every reduction: partial sums that blocks have written, added in a fixed order. And sums over
// tokens, whose first stage is nothing else.
#include "cuda/columns.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256, MOST_LANES = 32, PARTS = 8;  // PARTS: of a lane, if there are no more lanes than that
constexpr int64_t ENOUGH = 1 << 16;                       // threads: from there on a lane takes more parts instead

// Lanes add up the parts of an element: so many, as a power of two.
int lanes_of(const SumJob& job) {
  const int64_t elements = job.g.B * job.g.C * job.g.pixels();
  int power = 0;
  while (1 << power < MOST_LANES && job.count > PARTS << power && elements << power < ENOUGH) ++power;
  return power;
}

// A division of 64 bits is 90 instructions, one of 32 is 20.
__device__ int64_t quotient(int64_t a, int64_t b) {
  return (a | b) >> 32 == 0 ? int64_t(uint32_t(a) / uint32_t(b)) : a / b;
}

struct Arguments {
  SumJobs sums;
  int lanes[MAX_SUMS];
  int64_t first_block[MAX_SUMS + 1];
};

template <class T>
__global__ void __launch_bounds__(THREADS) sum_kernel(Arguments arguments) {
  const int64_t* first = arguments.first_block;
  int j = 0;
  while (blockIdx.x >= first[j + 1]) ++j;
  const SumJob& job = arguments.sums.jobs[j];
  const Geometry& g = job.g;
  const int power = arguments.lanes[j], lanes = 1 << power, elements = THREADS >> power;
  const int x = threadIdx.x % elements, lane = threadIdx.x / elements;
  const int64_t i = (blockIdx.x - first[j]) * elements + x;
  const int64_t pixels = g.pixels(), plane = quotient(i, pixels), pixel = i - plane * pixels;
  const bool is_there = plane < g.B * g.C;
  float sum = 0;
  if (is_there) {
    const float* from = job.parts + lane * job.stride + plane * job.channel_stride + pixel;
    const int parts = (int(job.count) - lane + lanes - 1) >> power;  // of this lane
#pragma unroll 4
    for (int part = 0; part < parts; ++part, from += lanes * job.stride) sum += *from;
  }
  if (lanes > 1) {
    float* const others = shared_memory<float>();
    others[threadIdx.x] = sum;
    __syncthreads();
    if (lane == 0)
      for (int y = 1; y < lanes; ++y) sum += others[y * elements + x];
  }
  if (!is_there || lane > 0) return;
  const int64_t b = quotient(plane, g.C), t = quotient(pixel, g.M * g.W), of_t = pixel - t * g.M * g.W;
  const int64_t m = quotient(of_t, g.W);
  *element<T>(job.out, b, plane - b * g.C, t, m, of_t - m * g.W) = from_float<T>(sum);
}

// Large results: a thread has four neighbouring pixels, whose parts are few.
template <class T>
__global__ void __launch_bounds__(THREADS) sum_pixels_kernel(SumJob job) {
  const Geometry& g = job.g;
  const int64_t i = (int64_t(blockIdx.x) * THREADS + threadIdx.x) * 4, pixels = g.pixels();
  if (i >= g.B * g.C * pixels) return;
  const int64_t plane = i / pixels, pixel = i % pixels;
  const float* from = job.parts + plane * job.channel_stride + pixel;
  float sum[4] = {};
#pragma unroll 4
  for (int64_t part = 0; part < job.count; ++part, from += job.stride) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
  }
  T* const to = static_cast<T*>(job.out.data) + plane / g.C * job.out.b + plane % g.C * job.out.c + pixel * job.out.w;
#pragma unroll
  for (int j = 0; j < 4; ++j) to[j * job.out.w] = from_float<T>(sum[j]);
}

bool by_pixels(const SumJob& job) {
  const Geometry& g = job.g;
  const MapView& to = job.out;
  const bool in_a_row = (g.T == 1 || to.t == g.M * g.W * to.w) && (g.M == 1 || to.m == g.W * to.w);
  return in_a_row && g.pixels() % 4 == 0 && job.channel_stride % 4 == 0 && job.stride % 4 == 0 &&
         reinterpret_cast<uintptr_t>(job.parts) % 16 == 0 && g.B * g.C * g.pixels() >= (1 << 14);
}

template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) column_sums_kernel(TokenSums p) {
  const ColumnsTiling tiling(p.n, sizeof(T));
  const ColumnsAt at(tiling);
  constexpr int N = Columns<T>::N;
  const int64_t column = at.column<T>(tiling), step = p.parts * tiling.lanes;
  const T* const from = static_cast<const T*>(p.rows) + column;
  float sum[N] = {};
  if (column < p.n && at.lane < tiling.lanes)
#pragma unroll 4
    for (int64_t token = at.part * tiling.lanes + at.lane; token < p.tokens; token += step) {
      const Columns<T> row = load_columns(from + token * p.token_stride);
#pragma unroll
      for (int i = 0; i < N; ++i) sum[i] += row[i];
    }
  sum_columns(sum, tiling, at, shared_memory<float>(), column, p.n, p.sums + at.part * p.n);
}

template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) line_sums_kernel(TokenSums p) {
  const LinesAt at(p.n);
  const T* const from = static_cast<const T*>(p.rows) + at.line * p.channel_stride;
  float sum = 0;
  at.each<T>(p.tokens, [&](int64_t i) {
    const Columns<T> values = load_columns(from + i);
#pragma unroll
    for (int j = 0; j < Columns<T>::N; ++j) sum += values[j];
  });
  sum = group_sum(sum, shared_memory<float>(), ColumnsTiling::THREADS);
  if (threadIdx.x == 0) p.sums[at.part * p.n + at.line] = sum;
}

}  // namespace

int64_t token_sums_parts(const TokenSums& p) {
  const int64_t bytes = p.dtype == DType::f32 ? 4 : 2, width = 16 / bytes;
  if (reinterpret_cast<uintptr_t>(p.rows) % 16 != 0 || p.tokens == 0) return 0;
  // the last access of a row may reach beyond its n, not beyond the row
  const bool columns = p.channel_stride == 1 && p.token_stride % width == 0;
  if (columns && (p.n % width == 0 || p.token_stride > p.n)) return ColumnsTiling(p.n, bytes).parts(p.tokens);
  const bool lines = p.token_stride == 1 && p.channel_stride % width == 0 && p.tokens % width == 0;
  return lines ? line_parts(p.n, p.tokens) : 0;
}

void run_token_sums(const TokenSums& p, void* stream) {
  with_type(p.dtype, [&](auto zero) {
    using T = decltype(zero);
    const ColumnsTiling tiling(p.n, sizeof(T));
    const int threads = tiling.THREADS;
    if (p.channel_stride == 1)
      launch(column_sums_kernel<T>, p.parts * tiling.tiles, threads, threads * Columns<T>::N * 4, stream, p);
    else
      launch(line_sums_kernel<T>, p.parts * p.n, threads, threads / 32 * 4, stream, p);
  });
}

void run_sums(const SumJobs& all, void* stream) {
  SumJobs sums{all.dtype, 0};
  for (int j = 0; j < all.n; ++j) {
    const SumJob& job = all.jobs[j];
    if (!by_pixels(job)) {
      sums.jobs[sums.n++] = job;
      continue;
    }
    const int64_t blocks = (job.g.B * job.g.C * job.g.pixels() / 4 + THREADS - 1) / THREADS;
    with_type(all.dtype,
              [&](auto zero) { launch(sum_pixels_kernel<decltype(zero)>, blocks, THREADS, 0, stream, job); });
  }
  Arguments arguments{sums};
  for (int j = 0; j < sums.n; ++j) {
    const Geometry& g = sums.jobs[j].g;
    const int power = lanes_of(sums.jobs[j]), elements = THREADS >> power;
    arguments.lanes[j] = power;
    arguments.first_block[j + 1] = arguments.first_block[j] + (g.B * g.C * g.pixels() + elements - 1) / elements;
  }
  with_type(sums.dtype, [&](auto zero) {
    launch(sum_kernel<decltype(zero)>, arguments.first_block[sums.n], THREADS, THREADS * 4, stream, arguments);
  });
}

}  // namespace focalnet::cuda

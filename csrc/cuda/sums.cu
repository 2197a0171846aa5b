// The second stage of every reduction: partial sums that blocks have written, added in a fixed order. And sums over
// tokens, whose first stage is nothing else.
#include "cuda/columns.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256, MOST_LANES = 32, PARTS = 8;  // PARTS: of a lane, if there are no more lanes than that
constexpr int64_t ENOUGH = 1 << 16;                       // threads: from there on a lane takes more parts instead
constexpr int FOUR = 4, MOST_LANES_OF_FOURS = THREADS / 32;

int64_t elements_of(const SumJob& job) { return job.g.B * job.g.C * job.g.pixels(); }

// Lanes add up the parts of an element, or of a few neighbours: so many, as a power of two.
int lanes_of(const SumJob& job, int64_t results, int most) {
  int power = 0;
  while (1 << power < most && job.count > PARTS << power && results << power < ENOUGH) ++power;
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

struct PixelsSum {
  SumJob job;
  int lanes;  // 1 << lanes
};

// Many results, whose parts lie in a row: a lane adds up the parts of four neighbours.
template <class T>
__global__ void __launch_bounds__(THREADS) sum_pixels_kernel(PixelsSum p) {
  const SumJob& job = p.job;
  const Geometry& g = job.g;
  const int power = p.lanes, lanes = 1 << power, fours = THREADS >> power, x = threadIdx.x & (fours - 1),
            lane = threadIdx.x / fours;
  const int64_t first = (int64_t(blockIdx.x) * fours + x) * FOUR, pixels = g.pixels(), plane = quotient(first, pixels);
  const bool is_there = plane < g.B * g.C;
  int64_t pixel = first - plane * pixels;
  float sum[FOUR] = {};
  const auto add = [&](const float* from) {
    const float4 four = *reinterpret_cast<const float4*>(from);
    sum[0] += four.x, sum[1] += four.y, sum[2] += four.z, sum[3] += four.w;
  };
  if (is_there) {
    const float* from = job.parts + lane * job.stride + plane * job.channel_stride + pixel;
    const int parts = (int(job.count) - lane + lanes - 1) >> power;  // of this lane
#pragma unroll 4
    for (int part = 0; part < parts; ++part, from += lanes * job.stride) add(from);
  }
  if (lanes > 1) {
    float4* const others = shared_memory<float4>();
    others[threadIdx.x] = float4{sum[0], sum[1], sum[2], sum[3]};
    __syncthreads();
    if (lane == 0)
      for (int y = 1; y < lanes; ++y) add(reinterpret_cast<const float*>(others + y * fours + x));
  }
  if (!is_there || lane > 0) return;
  int64_t b = quotient(plane, g.C), c = plane - b * g.C;
  const auto at = [&] { return static_cast<T*>(job.out.data) + b * job.out.b + c * job.out.c + pixel * job.out.w; };
  T* to = at();
#pragma unroll
  for (int j = 0; j < FOUR; ++j) {
    *to = from_float<T>(sum[j]);
    to += job.out.w;
    if (++pixel < pixels) continue;
    pixel = 0;  // the next plane
    if (++c == g.C) c = 0, ++b;
    to = at();
  }
}

bool by_pixels(const SumJob& job) {
  const Geometry& g = job.g;
  const MapView& to = job.out;
  const bool out_in_a_row = (g.T == 1 || to.t == g.M * g.W * to.w) && (g.M == 1 || to.m == g.W * to.w);
  const bool fours = g.pixels() % FOUR == 0 && job.channel_stride % FOUR == 0;
  const bool fours_of_all = job.channel_stride == g.pixels() && elements_of(job) % FOUR == 0;
  return out_in_a_row && (fours || fours_of_all) && job.stride % FOUR == 0 &&
         reinterpret_cast<uintptr_t>(job.parts) % 16 == 0 && elements_of(job) >= (1 << 14);
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
    const int64_t fours = elements_of(job) / FOUR;
    const PixelsSum p{job, lanes_of(job, fours, MOST_LANES_OF_FOURS)};
    const int64_t blocks = ((fours << p.lanes) + THREADS - 1) / THREADS,
                  shared = p.lanes ? THREADS * sizeof(float4) : 0;
    with_type(all.dtype,
              [&](auto zero) { launch(sum_pixels_kernel<decltype(zero)>, blocks, THREADS, shared, stream, p); });
  }
  Arguments arguments{sums};
  for (int j = 0; j < sums.n; ++j) {
    const int64_t results = elements_of(sums.jobs[j]);
    const int power = lanes_of(sums.jobs[j], results, MOST_LANES), elements = THREADS >> power;
    arguments.lanes[j] = power;
    arguments.first_block[j + 1] = arguments.first_block[j] + (results + elements - 1) / elements;
  }
  with_type(sums.dtype, [&](auto zero) {
    launch(sum_kernel<decltype(zero)>, arguments.first_block[sums.n], THREADS, THREADS * 4, stream, arguments);
  });
}

}  // namespace focalnet::cuda

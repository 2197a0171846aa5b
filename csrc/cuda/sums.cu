// The second stage of every reduction: partial sums that blocks have written, added in a fixed order.
#include "cuda/device.h"

namespace focalnet::cuda {

namespace {

constexpr int ELEMENTS = 32, LANES = 8;  // a block: elements of a result, threads that add up the parts of each

int64_t blocks_of(const SumJob& job) { return (job.g.B * job.g.C * job.g.pixels() + ELEMENTS - 1) / ELEMENTS; }

struct Arguments {
  SumJobs sums;
  int64_t first_block[MAX_SUMS + 1];
};

template <class T>
__global__ void __launch_bounds__(ELEMENTS* LANES) sum_kernel(Arguments arguments) {
  const int64_t* first = arguments.first_block;
  int j = 0;
  while (blockIdx.x >= first[j + 1]) ++j;
  const SumJob& job = arguments.sums.jobs[j];
  const Geometry& g = job.g;
  const int lane = threadIdx.x / ELEMENTS, x = threadIdx.x % ELEMENTS;
  const int64_t i = (blockIdx.x - first[j]) * ELEMENTS + x;
  const int64_t pixels = g.pixels(), pixel = i % pixels, plane = i / pixels;
  float sum = 0;
  if (plane < g.B * g.C)
    for (int64_t part = lane; part < job.count; part += LANES)
      sum += job.parts[part * job.stride + plane * job.channel_stride + pixel];
  float* const lanes = shared_memory<float>();
  lanes[threadIdx.x] = sum;
  __syncthreads();
  if (lane > 0 || plane >= g.B * g.C) return;
  for (int y = 1; y < LANES; ++y) sum += lanes[y * ELEMENTS + x];
  *element<T>(job.out, plane / g.C, plane % g.C, pixel / (g.M * g.W), pixel / g.W % g.M, pixel % g.W) =
      from_float<T>(sum);
}

}  // namespace

void run_sums(const SumJobs& sums, void* stream) {
  Arguments arguments{sums, {}};
  for (int j = 0; j < sums.n; ++j) arguments.first_block[j + 1] = arguments.first_block[j] + blocks_of(sums.jobs[j]);
  with_type(sums.dtype, [&](auto zero) {
    launch(sum_kernel<decltype(zero)>, arguments.first_block[sums.n], ELEMENTS * LANES, ELEMENTS * LANES * 4, stream,
           arguments);
  });
}

}  // namespace focalnet::cuda

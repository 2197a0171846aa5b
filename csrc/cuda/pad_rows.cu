// A linear layer's parameters with further rows of zeros, in one launch.
#include "cuda/device.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

template <class T>
__global__ void __launch_bounds__(THREADS) pad_rows_kernel(PadRows p) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x, row = i / (p.columns + 1),
                column = i % (p.columns + 1);
  if (row >= p.to_rows) return;
  const bool inside = row < p.rows;
  if (column < p.columns) {
    const T* const weight = static_cast<const T*>(p.weight) + row * p.row_stride + column * p.column_stride;
    static_cast<T*>(p.to_weight)[row * p.columns + column] = inside ? *weight : from_float<T>(0.0f);
  } else if (p.to_bias) {
    static_cast<T*>(p.to_bias)[row] = from_float<T>(inside ? of_vector<T>(p.bias, row) : 0.0f);
  }
}

}  // namespace

void run_pad_rows(const PadRows& p, void* stream) {
  with_type(p.dtype, [&](auto zero) {
    launch(pad_rows_kernel<decltype(zero)>, (p.to_rows * (p.columns + 1) + THREADS - 1) / THREADS, THREADS, 0, stream,
           p);
  });
}

}  // namespace focalnet::cuda

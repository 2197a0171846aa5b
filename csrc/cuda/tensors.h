// From torch's tensors to the plain descriptions of cuda/kernels.h, and the torch ops that stand between our kernels.
#pragma once

#include <algorithm>

#include "common/tensors.h"
#include "cuda/kernels.h"
#include "cuda/stream.h"

namespace focalnet::cuda {

inline Vector vector_of(const std::optional<Tensor>& t, int64_t first = 0) {
  if (!t || !t->defined()) return {};
  return {at_element(t->const_data_ptr(), first * t->stride(0), dtype_of(*t)), t->stride(0)};
}

// Rows of a (rows, tokens) matrix from `first` on, as the planes of a map.
inline MapView planes_of(const Tensor& matrix, const Geometry& g, int64_t first = 0) {
  const int64_t w = matrix.stride(1);
  return {at_element(matrix.const_data_ptr(), first * matrix.stride(0), dtype_of(matrix)),
          g.pixels() * w,
          matrix.stride(0),
          g.M * g.W * w,
          g.W * w,
          w};
}

Chain chain_of(const Geometry& g, DType dtype, const std::vector<Tensor>& weights, bool normalize);

// Writes `out`, returns the mean (B, C). `like`: any tensor on the device.
Tensor context_fwd(const Chain& chain, const MapView& out, const Tensor& like, const OnDevice& on);

// What is asked of context_bwd: views without data are not wanted.
struct ContextGradients {
  MapView ctx, gates, ctx_all;
  bool weights = false;
};
// Writes the gradients; returns the weights', each in its parameter's strides, if wanted.
std::vector<Tensor> context_bwd(const Chain& chain, const MapView& grad_out, const Tensor& mean,
                                const ContextGradients& wanted, const std::vector<Tensor>& weights, const Tensor& like,
                                const OnDevice& on);

// `value` with the strides that `empty_like(like)` has: mostly as it is.
Tensor strided_like(const Tensor& value, const Tensor& like);

// aten::linear
Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias);

}  // namespace focalnet::cuda

// From torch's tensors to the plain descriptions of geometry.h.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <vector>

#include "common/geometry.h"

#ifndef FOCALNET_NAMESPACE
#define FOCALNET_NAMESPACE focalnet_kernels  // of the raw ops: _namespace.py
#endif

namespace focalnet {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Float:
      return DType::f32;
    case ScalarType::BFloat16:
      return DType::bf16;
    case ScalarType::Half:
      return DType::f16;
    default:
      STD_TORCH_CHECK(false, "the kernels take float32, bfloat16 and float16");
      return DType::f32;
  }
}
inline int64_t bytes_of(DType dtype) { return dtype == DType::f32 ? 4 : 2; }

inline void* at_element(const void* data, int64_t element, DType dtype) {
  return static_cast<char*>(const_cast<void*>(data)) + element * bytes_of(dtype);
}

// Which tensor axis plays which part: 1-D (W), 2-D (T, W), 3-D (T, M, W); see common/geometry.h.
struct Axes {
  std::array<int64_t, 3> tmw;  // -1: absent
  Axes(int64_t ndim, int64_t first) {
    if (ndim == 1)
      tmw = {-1, -1, first};
    else if (ndim == 2)
      tmw = {first, -1, first + 1};
    else
      tmw = {first, first + 1, first + 2};
  }
};
inline int64_t size_or_1(const Tensor& t, int64_t axis) { return axis < 0 ? 1 : t.size(axis); }
inline int64_t stride_or_0(const Tensor& t, int64_t axis) { return axis < 0 ? 0 : t.stride(axis); }

// spatial axes start at `first`, the channel axis is `channel`
inline Geometry geometry_of(const Tensor& t, int64_t first, int64_t channel) {
  Axes axes(t.dim() - 2, first);
  return {t.size(0), t.size(channel), size_or_1(t, axes.tmw[0]), size_or_1(t, axes.tmw[1]), size_or_1(t, axes.tmw[2])};
}
// For reading, and for writing into what was made here, which shares its memory with no other tensor. Asked for a
// pointer to write through, torch would first copy memory that is shared until it is written to (copy-on-write), and
// refuse to in a parallel region.
inline MapView map_of(const Tensor& t, int64_t first, int64_t channel) {
  Axes axes(t.dim() - 2, first);
  return {const_cast<void*>(t.const_data_ptr()),
          t.stride(0),
          t.stride(channel),
          stride_or_0(t, axes.tmw[0]),
          stride_or_0(t, axes.tmw[1]),
          stride_or_0(t, axes.tmw[2])};
}

}  // namespace focalnet

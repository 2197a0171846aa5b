#include "cpu/tensors.h"

#include <cstdlib>
#include <memory>

namespace focalnet::cpu {

void* thread_scratch(int64_t bytes) {
  struct Scratch {
    std::unique_ptr<char[]> memory;
    int64_t size = 0;
  };
  static thread_local Scratch scratch;
  if (scratch.size < bytes) {
    scratch.memory.reset();
    scratch.memory.reset(new char[bytes + 64]);
    scratch.size = bytes;
  }
  const auto address = reinterpret_cast<uintptr_t>(scratch.memory.get());
  return reinterpret_cast<void*>((address + 63) / 64 * 64);
}

std::vector<float> floats_of(const std::optional<Tensor>& t) {
  if (!t || !t->defined()) return {};
  Tensor f = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
  const float* p = static_cast<const float*>(f.data_ptr());
  return {p, p + f.numel()};
}

PackedLevels::PackedLevels(const Kernels& k, const std::vector<Tensor>& tensors, int64_t C) {
  const int64_t channels = (C + k.lanes - 1) / k.lanes * k.lanes;
  int64_t floats = 0;
  for (const Tensor& w : tensors) {
    Axes axes(w.dim() - 2, 2);
    levels.push_back({size_or_1(w, axes.tmw[0]), size_or_1(w, axes.tmw[1]), size_or_1(w, axes.tmw[2])});
    floats += channels * levels.back().taps();
  }
  buffer_ = Buffer(floats * 4);
  float* to = buffer_.floats();
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor& w = tensors[l];
    Axes axes(w.dim() - 2, 2);
    const int64_t strides[4] = {w.stride(0), stride_or_0(w, axes.tmw[0]), stride_or_0(w, axes.tmw[1]),
                                stride_or_0(w, axes.tmw[2])};
    k.pack_taps(dtype_of(w), w.data_ptr(), C, levels[l], strides, to);
    weights.push_back(to);
    to += channels * levels[l].taps();
  }
}

PackedMatrix::PackedMatrix(const Kernels& k, const Tensor& w, bool transpose) {
  const int n = transpose ? 1 : 0;
  const DType dtype = dtype_of(w);
  packed = {w.size(n), w.size(1 - n), nullptr};
  buffer_ = Buffer(k.packed_bytes(dtype, packed.N, packed.K));
  packed.panels = buffer_.data;
  constexpr int64_t columns = 48;  // a multiple of every instruction set's panel
  parallel((packed.N + columns - 1) / columns, [&](int64_t i) {
    k.pack_matrix(dtype, w.data_ptr(), w.stride(n), w.stride(1 - n), packed.N, packed.K, i * columns,
                  std::min(packed.N, (i + 1) * columns), buffer_.data);
  });
}

}  // namespace focalnet::cpu

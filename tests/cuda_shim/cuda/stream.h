// Replaces csrc/cuda/stream.h: there is no device.
#pragma once

#include <torch/csrc/stable/tensor.h>

namespace focalnet::cuda {

struct OnDevice {
  explicit OnDevice(const torch::stable::Tensor&) {}
  void* stream = nullptr;
};

}  // namespace focalnet::cuda

// Where kernels run. (A test build has a header of this name for tensors on a CPU.)
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>

namespace focalnet::cuda {

// A tensor's device, current for as long as the object lives, and its current stream.
class OnDevice {
 public:
  explicit OnDevice(const torch::stable::Tensor& t) : guard_(t.get_device_index()) {
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  }
  void* stream = nullptr;

 private:
  torch::stable::accelerator::DeviceGuard guard_;
};

}  // namespace focalnet::cuda

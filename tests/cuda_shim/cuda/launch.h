// In the place of csrc/cuda/launch.h: kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>

namespace focalnet::cuda {

struct Device {
  int processors;
  int64_t shared_per_block;
};

// A small one, so that tests come to every way of cutting work; FOCALNET_SHIM_SHARED overrides the shared memory.
inline Device current_device() {
  const char* shared = std::getenv("FOCALNET_SHIM_SHARED");
  return {2, shared ? std::atoll(shared) : 99 * 1024};
}

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, void*, Parameters p) {
  focalnet_shim::run_blocks(blocks, threads, shared, [&] { kernel(p); });
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(focalnet_shim::shared_memory());
}

}  // namespace focalnet::cuda

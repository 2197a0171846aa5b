// Replaces csrc/cuda/launch.h: kernels run on the CPU.
#pragma once

#include <cuda_runtime.h>

#include <cstdlib>
#include <stdexcept>

namespace focalnet::cuda {

struct Device {
  int processors;
  int64_t shared_per_block, scratch;
};

inline int64_t from_environment(const char* name, int64_t otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoll(value) : otherwise;
}

// A small one, so that tests reach every way of dividing work.
inline Device current_device() {
  return {int(from_environment("FOCALNET_SHIM_PROCESSORS", 2)), from_environment("FOCALNET_SHIM_SHARED", 99 * 1024),
          from_environment("FOCALNET_SHIM_SCRATCH", int64_t(1) << 30)};
}

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, void*, Parameters p) {
  if (shared > current_device().shared_per_block)
    throw std::runtime_error("a block does not have that much shared memory");
  if (threads < 1 || threads > 1024) throw std::runtime_error("a block has 1 to 1024 threads");
  if (const focalnet_shim::Runner run = focalnet_shim::runner()) {
    if (blocks > 0 && run(reinterpret_cast<const void*>(kernel), blocks, threads, shared, &p, sizeof(p)) != 0)
      throw std::runtime_error("the kernel failed where it was run");
    return;
  }
  focalnet_shim::run_blocks(blocks, threads, shared, [&] { kernel(p); });
}

template <class T>
T* shared_memory() {
  return static_cast<T*>(focalnet_shim::shared_memory());
}

}  // namespace focalnet::cuda

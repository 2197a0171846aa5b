// Launching, and what the device has to offer. (A test build has a header of this name that runs kernels on a CPU.)
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>
#include <string>

namespace focalnet::cuda {

inline void check(cudaError_t status) {
  if (status != cudaSuccess) throw std::runtime_error(std::string("CUDA: ") + cudaGetErrorString(status));
}

struct Device {
  int processors;            // multiprocessors
  int64_t shared_per_block;  // bytes that a block can have
  int64_t scratch;           // bytes that a call may take for itself, where it has a choice
};

inline Device current_device() {
  constexpr int MOST = 64;
  static Device known[MOST];  // a race writes the same values twice
  int index;
  check(cudaGetDevice(&index));
  Device& device = known[index % MOST];
  if (device.processors == 0 || index >= MOST) {
    int shared, processors;
    check(cudaDeviceGetAttribute(&shared, cudaDevAttrMaxSharedMemoryPerBlockOptin, index));
    check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, index));
    device.shared_per_block = shared;
    device.scratch = int64_t(1) << 30;
    device.processors = processors;
  }
  return device;
}

// `blocks` on grid axis x, which reaches 2^31.
template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, int64_t shared, void* stream, Parameters p) {
  if (blocks <= 0) return;
  const void* function = reinterpret_cast<const void*>(kernel);
  if (shared > 48 * 1024)
    check(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared)));
  void* arguments[] = {&p};
  check(cudaLaunchKernel(function, dim3(unsigned(blocks)), dim3(threads), arguments, size_t(shared),
                         static_cast<cudaStream_t>(stream)));
}

// The block's shared memory, 16-byte aligned.
template <class T>
__device__ T* shared_memory() {
  extern __shared__ uint4 focalnet_shared_memory[];
  return reinterpret_cast<T*>(focalnet_shared_memory);
}

}  // namespace focalnet::cuda

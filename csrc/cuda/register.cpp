// The raw ops' kernels for GPU tensors.
#include "cuda/ops.h"

// what setup.py compiled for, such as "sm_80, sm_90, PTX 9.0 by CUDA 13.0"
#ifndef FOCALNET_CUDA_BUILD
#define FOCALNET_CUDA_BUILD "an unknown build"
#endif

namespace focalnet::cuda {

std::string cuda_build() { return FOCALNET_CUDA_BUILD; }

}  // namespace focalnet::cuda

STABLE_TORCH_LIBRARY_IMPL(FOCALNET_NAMESPACE, CUDA, m) { focalnet::cuda::implement_ops(m); }
STABLE_TORCH_LIBRARY_IMPL(FOCALNET_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&focalnet::cuda::cuda_build));
}

// Replaces csrc/cuda/register.cpp: the raw ops of backend "cuda" on CPU tensors.
#include "cuda/ops.h"

STABLE_TORCH_LIBRARY_IMPL(FOCALNET_NAMESPACE, CPU, m) { focalnet::cuda::implement_ops(m); }

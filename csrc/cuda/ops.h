// The raw ops on GPU tensors; their schemas stand in Python (ops/*/op.py).
#pragma once

#include <string>
#include <tuple>

#include "cuda/tensors.h"

namespace focalnet::cuda {

std::tuple<Tensor, Tensor> focal_context_fwd(Tensor ctx, Tensor gates, std::vector<Tensor> weights, bool normalize);
std::vector<Tensor> focal_context_bwd(Tensor grad_out, Tensor ctx, Tensor gates, std::vector<Tensor> weights,
                                      Tensor mean, bool normalize, int64_t needed);
Tensor modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, std::optional<Tensor> bias);
std::tuple<Tensor, std::vector<Tensor>> focal_modulation_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                             bool normalize, double ln_eps, bool save);
std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed);
void residual_rows_fwd(Tensor x, Tensor u, std::vector<std::optional<Tensor>> residual, double norm_eps, bool norm,
                       Tensor y);
bool norm_rows_fwd(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y);
bool residual_norm_rows_fwd(Tensor x, Tensor u, std::vector<std::optional<Tensor>> residual, Tensor weight, Tensor bias,
                            double eps, Tensor y, Tensor z);
Tensor norm_rows_bwd(Tensor rows, Tensor grad, std::optional<Tensor> add, std::vector<std::optional<Tensor>> residual,
                     double norm_eps, bool norm, bool scale, Tensor grad_rows);
Tensor gelu_rows_bwd(Tensor pre, Tensor hidden, Tensor grad);

template <class Library>
void implement_ops(Library& m) {
  m.impl("focal_context_fwd_cuda", TORCH_BOX(&focal_context_fwd));
  m.impl("focal_context_bwd_cuda", TORCH_BOX(&focal_context_bwd));
  m.impl("modulate_fwd_cuda", TORCH_BOX(&modulate_fwd));
  m.impl("focal_modulation_fwd_cuda", TORCH_BOX(&focal_modulation_fwd));
  m.impl("focal_modulation_bwd_cuda", TORCH_BOX(&focal_modulation_bwd));
  m.impl("residual_rows_fwd_cuda", TORCH_BOX(&residual_rows_fwd));
  m.impl("norm_rows_fwd_cuda", TORCH_BOX(&norm_rows_fwd));
  m.impl("residual_norm_rows_fwd_cuda", TORCH_BOX(&residual_norm_rows_fwd));
  m.impl("norm_rows_bwd_cuda", TORCH_BOX(&norm_rows_bwd));
  m.impl("gelu_rows_bwd_cuda", TORCH_BOX(&gelu_rows_bwd));
}

}  // namespace focalnet::cuda

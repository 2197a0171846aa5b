// The raw ops' CPU kernels. Their schemas stand in Python (ops/*/op.py).
#include <string>
#include <tuple>

#include "cpu/tensors.h"

namespace focalnet::cpu {

std::tuple<Tensor, Tensor> focal_context_fwd(Tensor ctx, Tensor gates, std::vector<Tensor> weights, bool normalize);
std::vector<Tensor> focal_context_bwd(Tensor grad_out, Tensor ctx, Tensor gates, std::vector<Tensor> weights,
                                      Tensor mean, bool normalize, int64_t needed);
Tensor modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, std::optional<Tensor> bias);
std::tuple<Tensor, std::vector<Tensor>> focal_modulation_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                             bool normalize, double ln_eps, bool save);
std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed);
std::tuple<Tensor, std::vector<Tensor>> focal_branch_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                         bool normalize, double ln_eps, double norm_eps, bool post,
                                                         bool save);
std::vector<Tensor> focal_branch_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                     std::vector<Tensor> saved, bool normalize, double ln_eps, double norm_eps,
                                     bool post, int64_t needed);
std::tuple<Tensor, std::vector<Tensor>> mlp_branch_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                       double norm_eps, bool post, bool keep_hidden, bool save);
std::vector<Tensor> mlp_branch_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                   std::vector<Tensor> saved, double norm_eps, bool post, bool keep_hidden,
                                   int64_t needed);
std::tuple<Tensor, bool> focal_modulation_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                 std::vector<std::optional<Tensor>> packed, bool normalize,
                                                 double ln_eps);
std::tuple<Tensor, bool> focal_branch_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                             std::vector<std::optional<Tensor>> packed, bool normalize, double ln_eps,
                                             double norm_eps, bool post);
std::tuple<Tensor, bool> mlp_branch_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                           std::vector<std::optional<Tensor>> packed, double norm_eps, bool post);
Tensor pack_weight(Tensor weight);
Tensor patch_embed_fwd(Tensor patches, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                       std::optional<Tensor> norm_bias, double norm_eps);

std::string cpu_isa() { return kernels().name; }

}  // namespace focalnet::cpu

STABLE_TORCH_LIBRARY_IMPL(FOCALNET_NAMESPACE, CPU, m) {
  m.impl("focal_context_fwd", TORCH_BOX(&focalnet::cpu::focal_context_fwd));
  m.impl("focal_context_bwd", TORCH_BOX(&focalnet::cpu::focal_context_bwd));
  m.impl("modulate_fwd", TORCH_BOX(&focalnet::cpu::modulate_fwd));
  m.impl("focal_modulation_fwd", TORCH_BOX(&focalnet::cpu::focal_modulation_fwd));
  m.impl("focal_modulation_bwd", TORCH_BOX(&focalnet::cpu::focal_modulation_bwd));
  m.impl("focal_branch_fwd", TORCH_BOX(&focalnet::cpu::focal_branch_fwd));
  m.impl("focal_branch_bwd", TORCH_BOX(&focalnet::cpu::focal_branch_bwd));
  m.impl("mlp_branch_fwd", TORCH_BOX(&focalnet::cpu::mlp_branch_fwd));
  m.impl("mlp_branch_bwd", TORCH_BOX(&focalnet::cpu::mlp_branch_bwd));
  m.impl("focal_modulation_packed", TORCH_BOX(&focalnet::cpu::focal_modulation_packed));
  m.impl("focal_branch_packed", TORCH_BOX(&focalnet::cpu::focal_branch_packed));
  m.impl("mlp_branch_packed", TORCH_BOX(&focalnet::cpu::mlp_branch_packed));
  m.impl("pack_weight", TORCH_BOX(&focalnet::cpu::pack_weight));
  m.impl("patch_embed_fwd", TORCH_BOX(&focalnet::cpu::patch_embed_fwd));
}
STABLE_TORCH_LIBRARY_IMPL(FOCALNET_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cpu_isa", TORCH_BOX(&focalnet::cpu::cpu_isa));
}

// modulate on a GPU: the matrix product is torch's, what follows it is one launch.
#include "cuda/ops.h"

namespace focalnet::cuda {

Tensor linear(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias) {
  std::array<StableIValue, 3> stack{torch::stable::detail::from(input), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, std::optional<Tensor> bias) {
  const OnDevice on(q);
  Tensor out = torch::stable::empty_like(q), tokens = ctx_all;
  for (int64_t axis = 1; axis + 1 < q.dim(); ++axis) tokens = torch::stable::transpose(tokens, axis, axis + 1);
  const Tensor modulator = linear(tokens, weight, std::nullopt);
  ModulateForward p{};
  p.g = geometry_of(q, 2, 1);
  p.dtype = dtype_of(q);
  p.q = map_of(q, 2, 1);
  p.modulator = map_of(modulator, 1, q.dim() - 1);
  p.bias = vector_of(bias);
  p.out = map_of(out, 2, 1);
  run_modulate_fwd(p, on.stream);
  return out;
}

}  // namespace focalnet::cuda

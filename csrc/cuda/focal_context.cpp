// focal_context on a GPU. Of whole images: one launch. Over tokens: a launch per level and step. Otherwise one launch,
// or two where strips have to wait for each other; in the backward one, or four for as many images as fit the scratch
// memory, and one for the sums.
#include <stdexcept>
#include <variant>

#include "cuda/ops.h"

namespace focalnet::cuda {

Chain chain_of(const Geometry& g, DType dtype, const std::vector<Tensor>& weights, bool normalize) {
  STD_TORCH_CHECK(weights.size() <= MAX_LEVELS, "the CUDA kernels take at most 8 focal levels");
  Chain chain{};
  chain.g = g;
  chain.dtype = dtype;
  chain.L = int(weights.size());
  for (int l = 0; l < chain.L; ++l) {
    const Tensor& w = weights[l];
    const Geometry size = geometry_of(w, 2, 0);
    chain.levels[l].size = {size.T, size.M, size.W};
    chain.levels[l].weights = map_of(w, 2, 0);
  }
  chain.scale = normalize ? 1.0f / float(chain.L + 1) : 1.0f;
  return chain;
}

namespace {

using ForwardPlan = std::variant<ImagesPlan, TokensPlan, RowsForwardPlan, PlanesPlan>;
using BackwardPlan = std::variant<ImagesBackwardPlan, TokensBackwardPlan, PassesPlan, PlanesPlan>;

// The first form that can take the call; planes take every one.
ForwardPlan plan_forward(const ContextForward& p) {
  if (const auto images = plan_images_fwd(p)) return *images;
  if (const auto tokens = plan_tokens_fwd(p)) return *tokens;
  if (const auto rows = plan_rows_fwd(p.chain)) return *rows;
  return plan_planes_fwd(p.chain);
}
BackwardPlan plan_backward(const ContextBackward& p) {
  if (const auto images = plan_images_bwd(p)) return *images;
  if (const auto tokens = plan_tokens_bwd(p)) return *tokens;
  if (const auto passes = plan_passes_bwd(p.chain)) return *passes;
  return plan_planes_bwd(p.chain);
}

Tensor new_floats(const Tensor& like, int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Float); }
float* floats_of(Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

template <class PLAN>
Tensor new_scratch(const Tensor& like, const PLAN& plan) {
  return torch::stable::new_empty(like, {plan.scratch_bytes()}, ScalarType::Byte);
}

}  // namespace

Tensor context_fwd(const Chain& chain, const MapView& out, const Tensor& like, const OnDevice& on) {
  Tensor mean = torch::stable::new_empty(like, {chain.g.B, chain.g.C}, ScalarType::Float);
  if (chain.g.B == 0) return mean;
  ContextForward p{chain, out, floats_of(mean), nullptr};
  std::visit(
      [&](const auto& form) {
        Tensor scratch = new_scratch(like, form);
        p.scratch = scratch.mutable_data_ptr();
        run_context_fwd(p, form, on.stream);
      },
      plan_forward(p));
  return mean;
}

std::vector<Tensor> context_bwd(const Chain& chain, const MapView& grad_out, const Tensor& mean,
                                const ContextGradients& wanted, const std::vector<Tensor>& weights, const Tensor& like,
                                const OnDevice& on) {
  const Geometry& g = chain.g;
  const int64_t gates = chain.L + 1, gates_size = g.B * gates * g.pixels();
  int64_t taps = 0;
  for (int l = 0; l < chain.L; ++l) taps += chain.levels[l].size.taps();
  ContextBackward p{};
  p.chain = chain;
  p.grad_out = grad_out;
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.grad_ctx = wanted.ctx;
  p.ctx_all = wanted.ctx_all;
  const BackwardPlan plan = plan_backward(p);
  const std::optional<int64_t> gate_parts = std::visit([](const auto& form) { return form.gate_parts(); }, plan);
  const int64_t weight_parts = std::visit([](const auto& form) { return form.weight_parts(); }, plan);

  SumJobs sums{};
  sums.dtype = chain.dtype;
  if (!gate_parts) p.grad_gates = wanted.gates;
  Tensor gate_sums = new_floats(like, wanted.gates.data && gate_parts ? *gate_parts * gates_size : 0);
  if (wanted.gates.data && gate_parts) {
    p.gate_sums = floats_of(gate_sums);
    const Geometry all{gates, g.B, g.T, g.M, g.W};  // a gate of all images after the other
    MapView to = wanted.gates;
    std::swap(to.b, to.c);
    sums.jobs[sums.n++] = {p.gate_sums, *gate_parts, gates_size, g.pixels(), all, to};
  }
  std::vector<Tensor> gradients;
  Tensor weight_sums = new_floats(like, wanted.weights ? weight_parts * g.C * taps : 0);
  if (wanted.weights) {
    p.weight_sums = floats_of(weight_sums);
    const float* parts = p.weight_sums;
    for (int l = 0; l < chain.L; ++l) {
      const Level& k = chain.levels[l].size;
      gradients.push_back(torch::stable::empty_like(weights[l]));
      const MapView to = map_of(gradients[l], 2, 0);
      sums.jobs[sums.n++] = {parts, weight_parts, g.C * taps, taps, {1, g.C, k.kt, k.km, k.kw}, to};
      parts += k.taps();
    }
  }
  std::visit(
      [&](const auto& form) {
        Tensor scratch = new_scratch(like, form);
        p.scratch = scratch.mutable_data_ptr();
        run_context_bwd(p, form, on.stream);
      },
      plan);
  run_sums(sums, on.stream);
  return gradients;
}

Tensor strided_like(const Tensor& value, const Tensor& like) {
  Tensor out = torch::stable::empty_like(like);
  for (int64_t axis = 0; axis < like.dim(); ++axis)
    if (value.dim() != like.dim() || value.stride(axis) != out.stride(axis)) {
      torch::stable::copy_(out, value);
      return out;
    }
  return value;
}

namespace {

Chain context_chain(const Tensor& ctx, const Tensor& gates, const std::vector<Tensor>& weights, bool normalize) {
  Chain chain = chain_of(geometry_of(ctx, 2, 1), dtype_of(ctx), weights, normalize);
  chain.ctx = map_of(ctx, 2, 1);
  chain.gates = map_of(gates, 2, 1);
  return chain;
}

}  // namespace

std::tuple<Tensor, Tensor> focal_context_fwd(Tensor ctx, Tensor gates, std::vector<Tensor> weights, bool normalize) {
  const OnDevice on(ctx);
  Tensor out = torch::stable::empty_like(ctx);
  return {out, context_fwd(context_chain(ctx, gates, weights, normalize), map_of(out, 2, 1), ctx, on)};
}

// needed: bit 0 ctx, bit 1 gates, bit 2 + l weights[l]. An empty tensor where not needed.
std::vector<Tensor> focal_context_bwd(Tensor grad_out, Tensor ctx, Tensor gates, std::vector<Tensor> weights,
                                      Tensor mean, bool normalize, int64_t needed) {
  const OnDevice on(ctx);
  std::vector<Tensor> gradients{torch::stable::new_empty(ctx, {0}), torch::stable::new_empty(ctx, {0})};
  ContextGradients wanted;
  wanted.weights = needed >> 2 != 0;
  if (needed & 1) {
    gradients[0] = torch::stable::empty_like(ctx);
    wanted.ctx = map_of(gradients[0], 2, 1);
  }
  if (needed & 2) {
    gradients[1] = torch::stable::empty_like(gates);
    wanted.gates = map_of(gradients[1], 2, 1);
  }
  const Chain chain = context_chain(ctx, gates, weights, normalize);
  const auto of_weights = context_bwd(chain, map_of(grad_out, 2, 1), mean, wanted, weights, ctx, on);
  for (size_t l = 0; l < weights.size(); ++l)
    gradients.push_back(needed >> (2 + l) & 1 ? of_weights[l] : torch::stable::new_empty(ctx, {0}));
  return gradients;
}

}  // namespace focalnet::cuda

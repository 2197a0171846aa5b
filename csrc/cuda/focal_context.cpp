// focal_context on a GPU. Over tokens: a launch per level and step. Otherwise one launch, or two where strips have to
// wait for each other; in the backward one, or four for as many images as fit the scratch memory, and one for the sums.
#include <stdexcept>

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

Tensor context_fwd(const Chain& chain, const MapView& out, const Tensor& like, const OnDevice& on) {
  Tensor mean = torch::stable::new_empty(like, {chain.g.B, chain.g.C}, ScalarType::Float);
  if (chain.g.B == 0) return mean;
  const auto floats = [&](int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Float); };
  ContextForward p{chain, out, static_cast<float*>(mean.mutable_data_ptr()), nullptr};
  const TokensPlan tokens = plan_tokens(p);
  const RowsPlan rows = tokens.fits ? RowsPlan{} : plan_rows_fwd(chain);
  if (tokens.fits) {
    Tensor scratch = torch::stable::new_empty(like, {tokens.elements}), sums = floats(tokens.floats);
    run_tokens_fwd(p, tokens, scratch.mutable_data_ptr(), static_cast<float*>(sums.mutable_data_ptr()), on.stream);
  } else if (rows.fits) {
    Tensor shares = floats(rows.shares);
    run_rows_fwd(p, rows, static_cast<float*>(shares.mutable_data_ptr()), on.stream);
  } else {
    const ContextPlan plan = plan_context_fwd(chain);
    Tensor scratch = floats(plan.scratch);
    p.scratch = static_cast<float*>(scratch.mutable_data_ptr());
    run_context_fwd(p, plan, on.stream);
  }
  return mean;
}

std::vector<Tensor> context_bwd(const Chain& chain, const MapView& grad_out, const Tensor& mean,
                                const ContextGradients& wanted, const std::vector<Tensor>& weights, const Tensor& like,
                                const OnDevice& on) {
  const Geometry& g = chain.g;
  const int64_t gates = chain.L + 1;
  int64_t taps = 0;
  for (int l = 0; l < chain.L; ++l) taps += chain.levels[l].size.taps();
  ContextBackward p{};
  p.chain = chain;
  p.grad_out = grad_out;
  p.mean = static_cast<const float*>(mean.const_data_ptr());
  p.grad_ctx = wanted.ctx;
  p.ctx_all = wanted.ctx_all;
  const TokensPlan tokens = plan_tokens(p);
  const RowsBackwardPlan rows = tokens.fits ? RowsBackwardPlan{} : plan_rows_bwd(chain);
  const PassesPlan passes = tokens.fits || rows.rows.fits ? PassesPlan{} : plan_passes_bwd(chain);
  const bool over_planes = !tokens.fits && !rows.rows.fits && !passes.down.fits;
  const ContextPlan planes = over_planes ? plan_context_bwd(chain) : ContextPlan{};
  const int64_t slots = over_planes ? planes.slots : rows.rows.fits ? rows.slots : passes.slots;
  const int64_t image_runs = tokens.fits      ? tokens.all_weights_parts
                             : over_planes    ? planes.image_runs
                             : rows.rows.fits ? rows.rows.runs
                                              : passes.image_runs;
  const auto floats = [&](int64_t n) { return torch::stable::new_empty(like, {n}, ScalarType::Float); };
  Tensor scratch = floats(over_planes ? planes.scratch : passes.scratch);
  const bool in_parts = wanted.gates.data && !tokens.fits;
  Tensor gates_parts = floats(in_parts ? slots * g.B * gates * g.pixels() : 0);
  Tensor weights_parts = floats(wanted.weights ? image_runs * g.C * taps : 0);
  p.scratch = static_cast<float*>(scratch.mutable_data_ptr());
  if (tokens.fits) p.grad_gates = wanted.gates;

  SumJobs sums{};
  sums.dtype = chain.dtype;
  if (in_parts) {
    p.gates_parts = static_cast<float*>(gates_parts.mutable_data_ptr());
    const Geometry all{g.B, gates, g.T, g.M, g.W};
    sums.jobs[sums.n++] = {p.gates_parts, slots, g.B * gates * g.pixels(), g.pixels(), all, wanted.gates};
  }
  std::vector<Tensor> gradients;
  if (wanted.weights) {
    p.weights_parts = static_cast<float*>(weights_parts.mutable_data_ptr());
    const float* parts = p.weights_parts;
    for (int l = 0; l < chain.L; ++l) {
      const Level& k = chain.levels[l].size;
      gradients.push_back(torch::stable::empty_like(weights[l]));
      const MapView to = map_of(gradients[l], 2, 0);
      sums.jobs[sums.n++] = {parts, image_runs, g.C * taps, taps, {1, g.C, k.kt, k.km, k.kw}, to};
      parts += k.taps();
    }
  }
  if (tokens.fits) {
    Tensor levels = torch::stable::new_empty(like, {tokens.elements}), means = floats(tokens.floats);
    run_tokens_bwd(p, tokens, levels.mutable_data_ptr(), static_cast<float*>(means.mutable_data_ptr()), on.stream);
  } else if (rows.rows.fits)
    run_rows_bwd(p, rows, on.stream);
  else if (passes.down.fits)
    run_passes_bwd(p, passes, on.stream);
  else
    run_context_bwd(p, planes, on.stream);
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

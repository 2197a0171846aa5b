// The whole layer on a GPU. Between f and proj everything is a (channels, tokens) matrix, logically. In memory it is
// either tokens (channels adjacent; products add their biases), or planes (tokens adjacent; who reads next adds them).
#include "cuda/ops.h"

namespace focalnet::cuda {

namespace {

// Inputs in the order of LayerParameters.flat(), x first: the bits of `needed` and the places of the result.
enum Input { X, F_WEIGHT, F_BIAS, H_WEIGHT, H_BIAS, PROJ_WEIGHT, PROJ_BIAS, LN_WEIGHT, LN_BIAS, FOCAL_WEIGHTS };

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// A layer's parts, from its input, f's product and the parameters' places.
struct Layer {
  Geometry g;
  DType dtype;
  int64_t C, outputs, tokens;  // outputs: of f
  bool by_tokens;              // how matrices lie; ops/focal_modulation/native.py says the same to PyTorch
  Tensor rows;                 // x as (tokens, C)

  Layer(const Tensor& x, const std::vector<Tensor>& focal_weights, const std::optional<Tensor>& ln_weight)
      : g(geometry_of(x, 1, x.dim() - 1)),
        dtype(dtype_of(x)),
        C(g.C),
        outputs(2 * C + int64_t(focal_weights.size()) + 1),
        tokens(g.B * g.pixels()),
        by_tokens(!ln_weight && takes_tokens(chain_of(g, dtype, focal_weights, false))),
        rows(torch::stable::reshape(x, {tokens, C})) {}

  // (n, tokens). By tokens each has whole eights of elements, for 16-byte accesses.
  Tensor matrix(int64_t n) const {
    if (!by_tokens) return torch::stable::new_empty(rows, {n, tokens});
    return first_rows(torch::stable::new_empty(rows, {tokens, eights(n)}), n);
  }
  // a @ b, a matrix
  Tensor product(const Tensor& a, const Tensor& b) const {
    return by_tokens ? transposed(torch::stable::matmul(transposed(b), transposed(a))) : torch::stable::matmul(a, b);
  }
  // weight @ input, a matrix, with the bias by tokens
  Tensor with_bias(const Tensor& weight, const Tensor& input, const std::optional<Tensor>& bias) const {
    if (!by_tokens) return torch::stable::matmul(weight, input);
    const int64_t n = weight.size(0), more = eights(n) - n;
    if (more == 0) return transposed(linear(transposed(input), weight, bias));
    std::optional<Tensor> padded;
    if (bias) padded = torch::stable::pad(*bias, std::array<int64_t, 2>{0, more});
    const Tensor taller = torch::stable::pad(weight, std::array<int64_t, 4>{0, 0, 0, more});
    return first_rows(linear(transposed(input), taller, padded), n);
  }
  MapView planes(const Tensor& t, int64_t first = 0) const { return planes_of(t, g, first); }

  Chain chain(const Tensor& projected, const std::optional<Tensor>& f_bias, const std::vector<Tensor>& focal_weights,
              bool normalize) const {
    Chain chain = chain_of(g, dtype, focal_weights, normalize);
    chain.ctx = planes(projected, C);
    chain.gates = planes(projected, 2 * C);
    if (!by_tokens) chain.ctx_bias = vector_of(f_bias, C), chain.gates_bias = vector_of(f_bias, 2 * C);
    return chain;
  }

  // LN?(q * modulator), into `out`: one long row of tokens per channel
  ModulateForward modulate(const Tensor& projected, const Tensor& modulator, const std::optional<Tensor>& f_bias,
                           const std::optional<Tensor>& h_bias, const std::optional<Tensor>& ln_weight,
                           const std::optional<Tensor>& ln_bias, double ln_eps) const {
    ModulateForward p{};
    p.g = {1, C, 1, 1, tokens};
    p.dtype = dtype;
    p.q = line(projected);
    p.modulator = line(modulator);
    if (!by_tokens) p.q_bias = vector_of(f_bias), p.bias = vector_of(h_bias);
    p.ln_weight = vector_of(ln_weight);
    p.ln_bias = vector_of(ln_bias);
    p.ln_eps = float(ln_eps);
    return p;
  }
  MapView line(const Tensor& t) const { return planes_of(t, {1, t.size(0), 1, 1, tokens}); }

 private:
  // of the matrix that lies in memory as (tokens, n or more)
  static Tensor first_rows(Tensor t, int64_t n) { return transposed(torch::stable::narrow(t, 1, 0, n)); }
  static int64_t eights(int64_t n) { return (n + 7) / 8 * 8; }
};

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor> focal_modulation_fwd(
    Tensor x, Tensor f_weight, std::optional<Tensor> f_bias, Tensor h_weight, std::optional<Tensor> h_bias,
    Tensor proj_weight, std::optional<Tensor> proj_bias, std::optional<Tensor> ln_weight, std::optional<Tensor> ln_bias,
    std::vector<Tensor> focal_weights, bool normalize, double ln_eps, bool save) {
  const OnDevice on(x);
  const Layer layer(x, focal_weights, ln_weight);
  const Tensor projected = layer.with_bias(f_weight, transposed(layer.rows), f_bias);
  Tensor ctx_all = layer.matrix(layer.C);
  const Tensor mean =
      context_fwd(layer.chain(projected, f_bias, focal_weights, normalize), layer.planes(ctx_all), x, on);
  const Tensor modulator = layer.with_bias(h_weight, ctx_all, h_bias);
  ModulateForward p = layer.modulate(projected, modulator, f_bias, h_bias, ln_weight, ln_bias, ln_eps);
  p.out = layer.line(ctx_all);  // which nobody needs any more
  run_modulate_fwd(p, on.stream);
  const Tensor rows = linear(transposed(ctx_all), proj_weight, proj_bias);
  const Tensor y = strided_like(torch::stable::reshape(rows, x.sizes()), x);
  if (save) return {y, projected, modulator, mean};
  return {y, torch::stable::new_empty(x, {0, 0}), torch::stable::new_empty(x, {0, 0}),
          torch::stable::new_empty(mean, {0, 0})};
}

std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, Tensor f_weight, std::optional<Tensor> f_bias,
                                         Tensor h_weight, std::optional<Tensor> h_bias, Tensor proj_weight,
                                         std::optional<Tensor> proj_bias, std::optional<Tensor> ln_weight,
                                         std::optional<Tensor> ln_bias, std::vector<Tensor> focal_weights,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed) {
  const OnDevice on(x);
  const Layer layer(x, focal_weights, ln_weight);
  const int64_t C = layer.C, L = int64_t(focal_weights.size());
  const auto needs = [&](int input) { return (needed >> input & 1) != 0; };
  const bool to_projected = needs(X) || needs(F_WEIGHT) || needs(F_BIAS), focal = needed >> FOCAL_WEIGHTS != 0;
  std::vector<Tensor> found;
  for (int64_t i = 0; i < FOCAL_WEIGHTS + L; ++i) found.push_back(torch::stable::new_empty(x, {0}));
  const auto put = [&](int input, const Tensor& gradient, const Tensor& parameter) {
    if (needs(input)) found[input] = strided_like(gradient, parameter);
  };

  const Tensor dy = torch::stable::reshape(grad_y, {layer.tokens, C});
  Tensor grad_projected = layer.matrix(layer.outputs), grad_modulator = layer.matrix(C);
  const Tensor z =
      layer.product(transposed(proj_weight), transposed(dy));  // the gradient of proj's input, then that itself
  ModulateBackward m{};
  m.forward = layer.modulate(projected, modulator, f_bias, h_bias, ln_weight, ln_bias, ln_eps);
  m.grad = layer.line(z);
  m.grad_q = layer.line(grad_projected);
  m.grad_modulator = layer.line(grad_modulator);
  m.parts = modulate_bwd_parts(m);
  const Tensor parts = torch::stable::new_empty(x, {m.parts, 3, C}, ScalarType::Float);
  m.sums = static_cast<float*>(parts.mutable_data_ptr());
  run_modulate_bwd(m, on.stream);
  if (needs(PROJ_WEIGHT)) put(PROJ_WEIGHT, torch::stable::matmul(transposed(dy), transposed(z)), proj_weight);
  if (needs(PROJ_BIAS)) put(PROJ_BIAS, torch::stable::sum(dy, std::array<int64_t, 1>{0}), *proj_bias);
  SumJobs sums{};
  sums.dtype = layer.dtype;
  const std::optional<Tensor>* summed[] = {&h_bias, &ln_weight, &ln_bias};
  const int places[] = {H_BIAS, LN_WEIGHT, LN_BIAS};
  for (int i = 0; i < 3; ++i)
    if (needs(places[i])) {
      found[places[i]] = torch::stable::empty_like(**summed[i]);
      MapView to{};
      to.data = found[places[i]].mutable_data_ptr(), to.c = found[places[i]].stride(0);
      sums.jobs[sums.n++] = {m.sums + i * C, m.parts, 3 * C, 1, {1, C, 1, 1, 1}, to};
    }
  run_sums(sums, on.stream);

  if (to_projected || needs(H_WEIGHT) || focal) {
    const Tensor grad_ctx_all = layer.product(transposed(h_weight), grad_modulator);
    const Tensor ctx_all = layer.matrix(needs(H_WEIGHT) ? C : 0);
    ContextGradients wanted;
    if (to_projected) wanted.ctx = layer.planes(grad_projected, C), wanted.gates = layer.planes(grad_projected, 2 * C);
    if (needs(H_WEIGHT)) wanted.ctx_all = layer.planes(ctx_all);
    wanted.weights = focal;
    const Chain chain = layer.chain(projected, f_bias, focal_weights, normalize);
    const auto of_levels = context_bwd(chain, layer.planes(grad_ctx_all), mean, wanted, focal_weights, x, on);
    for (int64_t l = 0; l < L; ++l)
      if (needs(FOCAL_WEIGHTS + int(l))) found[FOCAL_WEIGHTS + l] = of_levels[l];
    if (needs(H_WEIGHT)) put(H_WEIGHT, torch::stable::matmul(grad_modulator, transposed(ctx_all)), h_weight);
  }
  if (needs(X)) {
    const Tensor rows = torch::stable::matmul(transposed(grad_projected), f_weight);
    put(X, torch::stable::reshape(rows, x.sizes()), x);
  }
  if (needs(F_WEIGHT)) put(F_WEIGHT, torch::stable::matmul(grad_projected, layer.rows), f_weight);
  if (needs(F_BIAS)) put(F_BIAS, torch::stable::sum(grad_projected, std::array<int64_t, 1>{1}), *f_bias);
  return found;
}

}  // namespace focalnet::cuda

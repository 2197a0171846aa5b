// The whole layer on a GPU. Between f and proj everything is a (channels, tokens) matrix, logically. In memory it is
// either tokens (channels adjacent; products add their biases), or planes (tokens adjacent; the next kernel adds them).
#include "common/parameters.h"
#include "cuda/ops.h"

namespace focalnet::cuda {

namespace {

// Planes for the kernels of whole images, of rows and over planes, and where a LayerNorm follows. Rows issue a third of
// what tokens do forward, a fifth backward: see ops/focal_context/README.md.
bool lies_by_tokens(const Chain& chain, bool normalized) {
  return !normalized && takes_tokens(chain) && !takes_images(chain) && !takes_rows(chain);
}

Tensor transposed(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// A layer's parts, from its input, f's product and its parameters.
struct Layer {
  const LayerParameters& p;
  Geometry g;
  DType dtype;
  int64_t C, outputs, tokens;  // outputs: of f
  bool by_tokens;              // how matrices lie; ops/focal_modulation/native.py says the same to PyTorch
  Tensor rows;                 // x as (tokens, C)

  void* stream;

  Layer(const Tensor& x, const LayerParameters& parameters, const OnDevice& on)
      : p(parameters),
        g(geometry_of(x, 1, x.dim() - 1)),
        dtype(dtype_of(x)),
        C(g.C),
        outputs(2 * C + p.levels() + 1),
        tokens(g.B * g.pixels()),
        by_tokens(lies_by_tokens(chain_of(g, dtype, p.focal_weights, false), p.ln_weight.has_value())),
        rows(torch::stable::reshape(x, {tokens, C})),
        stream(on.stream) {}

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
    const int64_t n = weight.size(0), more = eights(n);
    if (more == n) return transposed(linear(transposed(input), weight, bias));
    std::optional<Tensor> padded;
    if (bias) padded = torch::stable::new_empty(rows, {more});
    Tensor taller = torch::stable::new_empty(rows, {more, C});
    const PadRows pad{dtype,
                      n,
                      more,
                      C,
                      weight.stride(0),
                      weight.stride(1),
                      weight.const_data_ptr(),
                      vector_of(bias),
                      taller.mutable_data_ptr(),
                      bias ? padded->mutable_data_ptr() : nullptr};
    run_pad_rows(pad, stream);
    return first_rows(linear(transposed(input), taller, padded), n);
  }
  MapView planes(const Tensor& t, int64_t first = 0) const { return planes_of(t, g, first); }

  Chain chain(const Tensor& projected, bool normalize) const {
    Chain chain = chain_of(g, dtype, p.focal_weights, normalize);
    chain.ctx = planes(projected, C);
    chain.gates = planes(projected, 2 * C);
    if (!by_tokens) chain.ctx_bias = vector_of(p.f_bias, C), chain.gates_bias = vector_of(p.f_bias, 2 * C);
    return chain;
  }

  // LN?(q * modulator), into `out`: one long row of tokens per channel
  ModulateForward modulate(const Tensor& projected, const Tensor& modulator, double ln_eps) const {
    ModulateForward m{};
    m.g = {1, C, 1, 1, tokens};
    m.dtype = dtype;
    m.q = line(projected);
    m.modulator = line(modulator);
    if (!by_tokens) m.q_bias = vector_of(p.f_bias), m.bias = vector_of(p.h_bias);
    m.ln_weight = vector_of(p.ln_weight);
    m.ln_bias = vector_of(p.ln_bias);
    m.ln_eps = float(ln_eps);
    return m;
  }
  MapView line(const Tensor& t) const { return planes_of(t, {1, t.size(0), 1, 1, tokens}); }

 private:
  // of the matrix that lies in memory as (tokens, n or more)
  static Tensor first_rows(Tensor t, int64_t n) { return transposed(torch::stable::narrow(t, 1, 0, n)); }
  static int64_t eights(int64_t n) { return (n + 7) / 8 * 8; }
};

// Sums over tokens whose partial sums are there: the last stage of all in one launch.
class LastSums {
  SumJobs jobs_{};
  std::vector<Tensor> parts_;  // which others would write over

 public:
  explicit LastSums(DType dtype) { jobs_.dtype = dtype; }
  // The sums over `count` parts, of n floats each, to some elements of a vector from `first` on.
  void add(const Tensor& parts, int64_t at, int64_t count, int64_t stride, int64_t n, const Tensor& to,
           int64_t first = 0) {
    MapView out{};
    out.data = at_element(to.mutable_data_ptr(), first * to.stride(0), jobs_.dtype), out.c = to.stride(0);
    const float* const from = static_cast<const float*>(parts.const_data_ptr()) + at;
    jobs_.jobs[jobs_.n++] = {from, count, stride, 1, {1, n, 1, 1, 1}, out};
    parts_.push_back(parts);
  }
  // Those over the rows of (tokens, n); false, and nothing, where they do not lie so that we would take them.
  bool add_rows(const Tensor& rows, const Tensor& to, int64_t first, const OnDevice& on) {
    const int64_t n = rows.size(1);
    TokenSums p{rows.size(0), n, rows.stride(0), rows.stride(1), dtype_of(rows), rows.const_data_ptr()};
    p.parts = token_sums_parts(p);
    if (p.parts == 0) return false;
    const Tensor parts = torch::stable::new_empty(rows, {p.parts, n}, ScalarType::Float);
    p.sums = static_cast<float*>(parts.mutable_data_ptr());
    run_token_sums(p, on.stream);
    add(parts, 0, p.parts, n, n, to, first);
    return true;
  }
  void run(const OnDevice& on) const {
    if (jobs_.n > 0) run_sums(jobs_, on.stream);
  }
};

Tensor sum_of_rows(const Tensor& rows, const Tensor& like) {
  return strided_like(torch::stable::sum(rows, std::array<int64_t, 1>{0}), like);
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> focal_modulation_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                             bool normalize, double ln_eps, bool save) {
  const OnDevice on(x);
  const LayerParameters p(parameters);
  const Layer layer(x, p, on);
  const Tensor projected = layer.with_bias(p.f_weight, transposed(layer.rows), p.f_bias);
  Tensor ctx_all = layer.matrix(layer.C);
  const Tensor mean = context_fwd(layer.chain(projected, normalize), layer.planes(ctx_all), x, on);
  const Tensor modulator = layer.with_bias(p.h_weight, ctx_all, p.h_bias);
  ModulateForward modulate = layer.modulate(projected, modulator, ln_eps);
  modulate.out = layer.line(ctx_all);  // which is not needed any more
  run_modulate_fwd(modulate, on.stream);
  const Tensor rows = linear(transposed(ctx_all), p.proj_weight, p.proj_bias);
  const Tensor y = strided_like(torch::stable::reshape(rows, x.sizes()), x);
  std::vector<Tensor> saved;
  if (save) saved = {projected, modulator, mean};
  return {y, saved};
}

std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed) {
  const OnDevice on(x);
  const LayerParameters p(parameters);
  const Layer layer(x, p, on);
  const int64_t C = layer.C;
  const LayerNeeds needs(needed, p.levels());
  LayerGradients gradients(x, p.levels());

  // around q * modulator, with proj's input z recomputed in its gradient's place
  const Tensor dy = torch::stable::reshape(grad_y, {layer.tokens, C});
  Tensor grad_projected = layer.matrix(layer.outputs), grad_modulator = layer.matrix(C);
  Tensor z = layer.product(transposed(p.proj_weight), transposed(dy));
  ModulateBackward m{};
  m.forward = layer.modulate(projected, modulator, ln_eps);
  m.grad = layer.line(z);
  m.grad_q = layer.line(grad_projected);
  m.grad_modulator = layer.line(grad_modulator);
  m.parts = modulate_bwd_parts(m);
  const Tensor parts = torch::stable::new_empty(x, {m.parts, m.SUMS, C}, ScalarType::Float);
  m.sums = static_cast<float*>(parts.mutable_data_ptr());
  run_modulate_bwd(m, on.stream);
  if (needs.proj_weight)
    gradients.proj_weight = strided_like(torch::stable::matmul(transposed(dy), transposed(z)), p.proj_weight);
  z = Tensor();  // its memory is wanted
  LastSums sums(layer.dtype);
  const auto add_parts = [&](int part, const Tensor& to) { sums.add(parts, part * C, m.parts, m.SUMS * C, C, to); };
  const auto vector = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of) {
    if (wanted) gradient = torch::stable::empty_like(*of);
    return wanted;
  };
  if (vector(needs.proj_bias, gradients.proj_bias, p.proj_bias) && !sums.add_rows(dy, gradients.proj_bias, 0, on))
    gradients.proj_bias = sum_of_rows(dy, *p.proj_bias);
  if (vector(needs.h_bias, gradients.h_bias, p.h_bias)) add_parts(0, gradients.h_bias);
  if (vector(needs.ln_weight, gradients.ln_weight, p.ln_weight)) add_parts(2, gradients.ln_weight);
  if (vector(needs.ln_bias, gradients.ln_bias, p.ln_bias)) add_parts(3, gradients.ln_bias);

  if (needs.projected() || needs.h_weight || needs.any_level()) {
    const Tensor grad_ctx_all = layer.product(transposed(p.h_weight), grad_modulator);
    const Tensor ctx_all = layer.matrix(needs.h_weight ? C : 0);
    ContextGradients wanted;
    if (needs.projected())
      wanted.ctx = layer.planes(grad_projected, C), wanted.gates = layer.planes(grad_projected, 2 * C);
    if (needs.h_weight) wanted.ctx_all = layer.planes(ctx_all);
    wanted.weights = needs.any_level();
    const auto of_levels = context_bwd(layer.chain(projected, normalize), layer.planes(grad_ctx_all), mean, wanted,
                                       p.focal_weights, x, on);
    for (size_t l = 0; l < p.focal_weights.size(); ++l)
      if (needs.focal_weights[l]) gradients.focal_weights[l] = of_levels[l];
    if (needs.h_weight)
      gradients.h_weight = strided_like(torch::stable::matmul(grad_modulator, transposed(ctx_all)), p.h_weight);
  }
  if (needs.x) {
    const Tensor rows = torch::stable::matmul(transposed(grad_projected), p.f_weight);
    gradients.x = strided_like(torch::stable::reshape(rows, x.sizes()), x);
  }
  if (needs.f_weight) gradients.f_weight = strided_like(torch::stable::matmul(grad_projected, layer.rows), p.f_weight);
  if (vector(needs.f_bias, gradients.f_bias, p.f_bias)) {
    Tensor rows = transposed(grad_projected);  // of whose first C modulate has the sums
    if (sums.add_rows(torch::stable::narrow(rows, 1, C, layer.outputs - C), gradients.f_bias, C, on))
      add_parts(1, gradients.f_bias);
    else if (!sums.add_rows(rows, gradients.f_bias, 0, on))
      gradients.f_bias = sum_of_rows(rows, *p.f_bias);
  }
  sums.run(on);
  return gradients.list();
}

}  // namespace focalnet::cuda

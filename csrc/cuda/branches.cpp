// Norm, scale, residual and GELU's backward over dense token rows on a GPU: what a residual branch has beside the
// layer's kernels and cuBLAS.
#include "common/parameters.h"
#include "cuda/ops.h"

namespace focalnet::cuda {

namespace {

Elements elements(const std::optional<Tensor>& t) {
  if (!t || !t->defined()) return {};
  return {const_cast<void*>(t->const_data_ptr()), dtype_of(*t)};
}

// The first tokens of a sample where drop_path says how many there are.
int64_t pixels_of(int64_t tokens, const ResidualParameters& r) {
  const int64_t samples = r.drop_path ? r.drop_path->size(0) : 1;
  return std::max<int64_t>(1, tokens / std::max<int64_t>(1, samples));
}

Around around_of(const ResidualParameters& r, double norm_eps, bool norm, bool scale) {
  Around around{};
  around.norm = norm;
  around.norm_eps = float(norm_eps);
  if (norm) around.norm_weight = elements(r.norm_weight), around.norm_bias = elements(r.norm_bias);
  if (scale) around.gamma = elements(r.gamma), around.drop_path = elements(r.drop_path);
  return around;
}

Tensor partial_sums(const Tensor& like, int64_t parts, int64_t n) {
  return torch::stable::new_empty(like, {parts, n}, ScalarType::Float);
}
Tensor added(const Tensor& parts) { return torch::stable::sum(parts, std::array<int64_t, 1>{0}); }

}  // namespace

void residual_rows_fwd(Tensor x, Tensor u, std::vector<std::optional<Tensor>> residual, double norm_eps, bool norm,
                       Tensor y) {
  const OnDevice on(x);
  const ResidualParameters r(residual.data());
  const int64_t tokens = x.size(0);
  const ResidualForward p{tokens,
                          int(x.size(1)),
                          pixels_of(tokens, r),
                          elements(x),
                          elements(u),
                          elements(y),
                          around_of(r, norm_eps, norm, true)};
  run_residual_fwd(p, on.stream);
}

namespace {

NormForward norm_of(const Tensor& x, const Tensor& weight, const Tensor& bias, double eps, const Tensor& y) {
  NormForward p{};
  p.tokens = x.size(0), p.C = int(x.size(1)), p.eps = float(eps);
  p.x = elements(x), p.weight = elements(weight), p.bias = elements(bias), p.y = elements(y);
  return p;
}

// Whether it was taken: y is written.
bool run_if_taken(const NormForward& p, void* stream) {
  if (!takes_norm(p) || (p.x.dtype != DType::f32 && p.x.dtype != p.y.dtype)) return false;
  if (p.tokens > 0) run_norm_fwd(p, stream);
  return true;
}

}  // namespace

bool norm_rows_fwd(Tensor x, Tensor weight, Tensor bias, double eps, Tensor y) {
  const OnDevice on(x);
  return run_if_taken(norm_of(x, weight, bias, eps, y), on.stream);
}

bool residual_norm_rows_fwd(Tensor x, Tensor u, std::vector<std::optional<Tensor>> residual, Tensor weight, Tensor bias,
                            double eps, Tensor y, Tensor z) {
  const OnDevice on(x);
  const ResidualParameters r(residual.data());
  NormForward p = norm_of(x, weight, bias, eps, z);
  p.u = elements(u), p.sum = elements(y), p.gamma = elements(r.gamma), p.drop_path = elements(r.drop_path);
  p.pixels = pixels_of(p.tokens, r);
  return p.u.dtype == p.y.dtype && run_if_taken(p, on.stream);
}

Tensor norm_rows_bwd(Tensor rows, Tensor grad, std::optional<Tensor> add, std::vector<std::optional<Tensor>> residual,
                     double norm_eps, bool norm, bool scale, Tensor grad_rows) {
  const OnDevice on(grad);
  const ResidualParameters r(residual.data());
  const int64_t tokens = grad.size(0), C = grad.size(1);
  NormBackward p{};
  p.tokens = tokens, p.C = int(C), p.pixels = pixels_of(tokens, r);
  p.rows = elements(rows), p.grad = elements(grad), p.add = elements(add), p.grad_rows = elements(grad_rows);
  p.around = around_of(r, norm_eps, norm, scale);
  p.parts = norm_bwd_parts(tokens, int(C));
  const Tensor sums = partial_sums(grad, p.parts, 4 * C);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  run_norm_bwd(p, on.stream);
  return torch::stable::reshape(added(sums), {4, C});
}

Tensor gelu_rows_bwd(Tensor pre, Tensor hidden, Tensor grad) {
  const OnDevice on(grad);
  const int64_t tokens = grad.size(0), M = grad.size(1);
  GeluBackward p{};
  p.tokens = tokens, p.M = int(M), p.dtype = dtype_of(grad);
  p.pre = pre.const_data_ptr(), p.hidden = hidden.mutable_data_ptr(), p.grad = grad.mutable_data_ptr();
  p.parts = token_parts(tokens, int(M));
  const Tensor sums = partial_sums(grad, p.parts, M);
  p.sums = static_cast<float*>(sums.mutable_data_ptr());
  run_gelu_bwd(p, on.stream);
  return added(sums);
}

}  // namespace focalnet::cuda

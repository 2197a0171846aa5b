// The MLP branch of a block on the CPU, forward: blocks of tokens.
#include "common/parameters.h"
#include "cpu/few_rows_ops.h"

namespace focalnet::cpu {

namespace {

std::tuple<Tensor, std::vector<Tensor>> forward(const Tensor& x, const MlpBranchParameters& p, double norm_eps,
                                                bool post, bool keep_hidden, bool save, const KeptPanels& kept) {
  const Kernels& k = kernels();
  const Geometry g = geometry_of(x, 1, x.dim() - 1);
  const int64_t tokens = g.B * g.pixels();
  const DType dtype = dtype_of(p.fc1_weight);
  const ScalarType of_body = p.fc1_weight.scalar_type();
  const Tensor y = torch::stable::empty_like(x);
  std::vector<Tensor> saved;
  if (save && post) saved.push_back(torch::stable::new_empty(x, {tokens, g.C}, of_body));
  if (save && keep_hidden) saved.push_back(torch::stable::new_empty(x, {tokens, p.fc1_weight.size(0)}, of_body));
  if (tokens == 0) return {y, saved};

  const Rows rows = rows_of(map_of(x, 1, x.dim() - 1), g), out = rows_of(map_of(y, 1, x.dim() - 1), g);
  const std::vector<float> fc1_bias = floats_of(p.fc1_bias), fc2_bias = floats_of(p.fc2_bias);
  const ResidualFloats residual(p.residual, norm_eps, post, dtype_of(x) != dtype);
  if (few_rows(tokens, g.C) && saved.empty()) {
    const FewRows few(k, dtype, tokens);
    const Buffer z = few.operand(rows, residual.values(), g.C);
    const Buffer hidden(k.operand_bytes(dtype, tokens, p.fc1_weight.size(0)));
    FewRowsProduct first = few.product(z, p.fc1_weight, kept[0], fc1_bias, FewRowsProduct::Then::GELU);
    first.next = hidden.data;
    few.run(first);
    FewRowsProduct second = few.product(hidden, p.fc2_weight, kept[1], fc2_bias, FewRowsProduct::Then::RESIDUAL);
    second.residual = residual.values();
    second.x = rows;
    second.out = out;
    few.run_residual(second);
    return {y, saved};
  }

  const PackedMatrix fc1(k, p.fc1_weight, 0, p.fc1_weight.size(0), kept[0]), fc2(k, p.fc2_weight, 0, g.C, kept[1]);
  MlpForward f{};
  f.dtype = dtype;
  f.fc1 = fc1.packed;
  f.fc2 = fc2.packed;
  f.fc1_bias = data_or_null(fc1_bias);
  f.fc2_bias = data_or_null(fc2_bias);
  f.residual = residual.values();
  f.x = rows;
  f.y = out;
  if (save && post) f.u = dense_rows(saved.front().mutable_data_ptr(), tokens, g.C);
  if (save && keep_hidden) f.pre = dense_rows(saved.back().mutable_data_ptr(), tokens, p.fc1_weight.size(0));
  const RowBlocks blocks(tokens);
  for_blocks(blocks, k.mlp_scratch(f, blocks.size),
             [&](int64_t, int64_t row0, int64_t row1, void* scratch) { k.mlp_fwd(f, row0, row1, scratch); });
  return {y, saved};
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> mlp_branch_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                       double norm_eps, bool post, bool keep_hidden, bool save) {
  return forward(x, MlpBranchParameters(parameters), norm_eps, post, keep_hidden, save, {});
}

std::tuple<Tensor, bool> mlp_branch_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                           std::vector<std::optional<Tensor>> packed, double norm_eps, bool post) {
  const MlpBranchParameters p(parameters);
  const KeptPanels kept({p.fc1_weight, p.fc2_weight}, packed);
  const Tensor y = std::get<0>(forward(x, p, norm_eps, post, false, false, kept));
  return {y, kept.up_to_date()};
}

}  // namespace focalnet::cpu

// The MLP branch's backward on the CPU, a group of tokens at a time. GELU is made again, and fc1 where it was not kept.
#include "common/parameters.h"
#include "cpu/gradients.h"
#include "cpu/residual.h"

namespace focalnet::cpu {

namespace {

using Needs = MlpBranchInputs<char>;
using Gradients = MlpBranchInputs<Tensor>;

class MlpBackwardPass {
 public:
  MlpBackwardPass(const Tensor& grad_y, const Tensor& x, const MlpBranchParameters& p, const std::vector<Tensor>& saved,
                  double norm_eps, bool post, bool keep_hidden, int64_t needed)
      : grad_y_(grad_y),
        x_(x),
        p_(p),
        u_(post ? &saved.front() : nullptr),
        pre_(keep_hidden ? &saved.back() : nullptr),
        g_(geometry_of(x, 1, x.dim() - 1)),
        dtype_(dtype_of(p.fc1_weight)),
        tokens_(g_.B * g_.pixels()),
        C_(g_.C),
        M_(p.fc1_weight.size(0)),
        scaled_(p.residual.gamma && !(post && p.residual.norm_weight)),
        fc1_(k_, p.fc1_weight),
        fc1_t_(k_, p.fc1_weight, true),
        fc2_t_(k_, p.fc2_weight, true),
        fc1_bias_(floats_of(p.fc1_bias)),
        fc2_bias_(floats_of(p.fc2_bias)),
        gamma_(floats_of(p.residual.gamma)),
        residual_(p.residual, norm_eps, post, dtype_of(x) != dtype_),
        units_({tokens_, C_, 1, 1, 1}),
        totals_(MlpBackward::SUMS * C_),
        hidden_totals_(M_) {
    needs_.each([&](char& one) { one = needed & 1, needed >>= 1; });
    grad_x_ = needs_.x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
    // enough tokens for the threads and for the products over tokens; what is made of them stays in cache
    const int64_t units = std::max<int64_t>(8, 2 * torch::stable::get_num_threads());
    group_ = std::max<int64_t>(1, std::min(tokens_, units * units_.tokens));
    const int64_t bytes = bytes_of(dtype_), blocks = RowBlocks(group_, units_).count;
    z_ = Buffer(group_ * C_ * bytes);
    grad_u_ = Buffer(group_ * C_ * bytes);
    hidden_ = Buffer(group_ * M_ * bytes);
    grad_hidden_ = Buffer(group_ * M_ * bytes);
    sums_ = Buffer(blocks * MlpBackward::SUMS * C_ * 4);
    hidden_sums_ = Buffer(blocks * M_ * 4);
    if (needs_.fc1_weight) grad_fc1_ = Buffer(M_ * C_ * 4);
    if (of_fc2()) grad_fc2_ = Buffer(M_ * C_ * 4);
  }

  std::vector<Tensor> run() {
    for (int64_t first = 0; first < tokens_; first += group_) {
      const int64_t n = std::min(tokens_, first + group_) - first;
      rows_back(first, n);
      WeightGradients gradients(k_, dtype_, M_ + C_, 4 * units_.tokens, first > 0);
      if (needs_.fc1_weight) gradients.of(M_, C_, dense(grad_hidden_, M_), dense(z_, C_), grad_fc1_);
      if (of_fc2()) gradients.of(C_, M_, dense(grad_u_, C_), dense(hidden_, M_), grad_fc2_);
      gradients.run(n);
    }
    return finish();
  }

 private:
  // gamma's gradient is made of fc2_weight's, where nothing is between them
  bool of_fc2() const { return needs_.fc2_weight || (needs_.gamma && scaled_); }
  Rows dense(const Buffer& buffer, int64_t width) const { return dense_rows(buffer.data, group_, width); }

  void rows_back(int64_t first, int64_t n) {
    MlpBackward b{};
    b.dtype = dtype_;
    b.fc1 = fc1_.packed;
    b.fc1_t = fc1_t_.packed;
    b.fc2_t = fc2_t_.packed;
    b.fc1_bias = data_or_null(fc1_bias_);
    b.residual = residual_.values();
    b.first = first;
    b.x = rows(x_);
    b.grad_y = rows(grad_y_);
    if (u_) b.u = kept(*u_, C_);
    if (pre_) b.pre = kept(*pre_, M_);
    if (needs_.x) b.grad_x = rows(grad_x_);
    b.z = dense(z_, C_);
    b.grad_u = dense(grad_u_, C_);
    b.hidden = dense(hidden_, M_);
    b.grad_hidden = dense(grad_hidden_, M_);
    b.sums = sums_.floats();
    b.hidden_sums = hidden_sums_.floats();
    const RowBlocks blocks(n, units_);
    for_blocks(blocks, k_.mlp_bwd_scratch(b, blocks.size), [&](int64_t i, int64_t row0, int64_t row1, void* scratch) {
      k_.mlp_bwd(b, i, first + row0, first + row1, scratch);
    });
    add_partial_sums(b.sums, blocks.count, int64_t(totals_.size()), totals_.data());
    add_partial_sums(b.hidden_sums, blocks.count, M_, hidden_totals_.data());
  }
  Rows kept(const Tensor& t, int64_t width) const {
    return dense_rows(const_cast<void*>(t.const_data_ptr()), tokens_, width);
  }
  Rows rows(const Tensor& t) const { return rows_of(map_of(t, 1, t.dim() - 1), g_); }

  std::vector<Tensor> finish() {
    Gradients gradients;
    gradients.each([&](Tensor& one) { one = torch::stable::new_empty(x_, {0}); });
    gradients.x = grad_x_;
    const auto put = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of, const float* values) {
      if (!wanted) return;
      if (tokens_ > 0) {
        gradient = like_parameter(k_, *of, values);
      } else {  // nothing was summed
        gradient = torch::stable::empty_like(*of);
        torch::stable::zero_(gradient);
      }
    };
    const auto put_vector = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of,
                                const std::vector<double>& totals, int64_t first, int64_t n) {
      const std::vector<float> values(totals.begin() + first, totals.begin() + first + n);
      put(wanted, gradient, of, values.data());
    };
    if (tokens_ > 0 && scaled_) scale_fc2();
    put(needs_.fc1_weight, gradients.fc1_weight, p_.fc1_weight, grad_fc1_.floats());
    put(needs_.fc2_weight, gradients.fc2_weight, p_.fc2_weight, grad_fc2_.floats());
    put_vector(needs_.fc1_bias, gradients.fc1_bias, p_.fc1_bias, hidden_totals_, 0, M_);
    put_vector(needs_.fc2_bias, gradients.fc2_bias, p_.fc2_bias, totals_, 0, C_);
    put_vector(needs_.norm_weight, gradients.norm_weight, p_.residual.norm_weight, totals_, C_, C_);
    put_vector(needs_.norm_bias, gradients.norm_bias, p_.residual.norm_bias, totals_, 2 * C_, C_);
    put_vector(needs_.gamma, gradients.gamma, p_.residual.gamma, totals_, 3 * C_, C_);
    std::vector<Tensor> all;
    gradients.each([&](Tensor& one) { all.push_back(one); });
    return all;
  }

  // Without a last norm gamma multiplies fc2's result, u[c] = sum_m fc2[c, m] hidden[m] + bias[c]: so the sum over
  // tokens of grad * u is made of those of grad * hidden and of grad, which fc2's own gradients are gamma times.
  void scale_fc2() {
    const Tensor weight = torch::stable::contiguous(torch::stable::to(p_.fc2_weight, ScalarType::Float));
    const float* w = static_cast<const float*>(weight.const_data_ptr());
    for (int64_t c = 0; c < C_; ++c) {
      double sum = fc2_bias_.empty() ? 0 : fc2_bias_[size_t(c)] * totals_[size_t(c)];
      totals_[size_t(c)] *= gamma_[size_t(c)];
      if (!of_fc2()) continue;
      float* row = grad_fc2_.floats() + c * M_;
      for (int64_t m = 0; m < M_; ++m) {
        sum += double(w[c * M_ + m]) * row[m];
        row[m] *= gamma_[size_t(c)];
      }
      totals_[size_t(3 * C_ + c)] = sum;
    }
  }

  const Kernels& k_ = kernels();
  const Tensor &grad_y_, &x_;
  const MlpBranchParameters& p_;
  const Tensor *u_, *pre_;  // what the forward kept, or null
  const Geometry g_;
  const DType dtype_;
  const int64_t tokens_, C_, M_;
  const bool scaled_;
  Needs needs_{};
  const PackedMatrix fc1_, fc1_t_, fc2_t_;
  const std::vector<float> fc1_bias_, fc2_bias_, gamma_;
  const ResidualFloats residual_;
  const Units units_;  // of tokens alone
  int64_t group_;      // tokens that go through together

  Tensor grad_x_;
  Buffer grad_fc1_, grad_fc2_;                  // float
  std::vector<double> totals_, hidden_totals_;  // of MlpBackward::sums and hidden_sums

  // of one group
  Buffer z_, grad_u_, hidden_, grad_hidden_;
  Buffer sums_, hidden_sums_;  // per block
};

}  // namespace

std::vector<Tensor> mlp_branch_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                   std::vector<Tensor> saved, double norm_eps, bool post, bool keep_hidden,
                                   int64_t needed) {
  const MlpBranchParameters p(parameters);
  return MlpBackwardPass(grad_y, x, p, saved, norm_eps, post, keep_hidden, needed).run();
}

}  // namespace focalnet::cpu

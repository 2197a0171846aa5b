// The whole layer's backward on the CPU, a group of images at a time:
//   grad_y -> proj^T, LN, q*, h^T -> the chain -> f^T -> grad_x, and the weights' gradients of the group.
#include "cpu/gradients.h"
#include "cpu/layer.h"

namespace focalnet::cpu {

namespace {

// What the forward saved.
struct Saved {
  Tensor projected, modulator, mean;
};

// What the groups of images share, and the steps that each goes through.
class LayerBackward {
 public:
  // `around`: a residual branch's parameters, or null
  LayerBackward(const Tensor& grad_y, const Tensor& x, const LayerParameters& p, const ResidualParameters* around,
                const ResidualFloats& residual, const Saved& saved, bool normalize, double ln_eps, int64_t needed)
      : grad_y_(grad_y),
        x_(x),
        p_(p),
        around_(around),
        residual_(residual),
        saved_(saved),
        g_(geometry_of(x, 1, x.dim() - 1)),
        dtype_(dtype_of(p.f_weight)),
        L_(p.levels()),
        C_(g_.C),
        F_(p.f_weight.size(0)),
        normalize_(normalize),
        ln_eps_(float(ln_eps)),
        needs_(needed, L_, around != nullptr),
        proj_t_(k_, p.proj_weight, true),
        h_t_(k_, p.h_weight, true),
        f_t_(k_, p.f_weight, true),
        levels_(k_, p.focal_weights, C_),
        flipped_(k_, p.focal_weights, C_, true),
        ln_weight_(floats_of(p.ln_weight)),
        ln_bias_(floats_of(p.ln_bias)),
        units_(g_),
        images_((images_per_group(g_, k_) + units_.images - 1) / units_.images * units_.images),
        grad_x_(needs_.x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0})),
        grad_f_(needs_.f_weight ? F_ * C_ * 4 : 0),
        grad_h_(needs_.h_weight ? C_ * C_ * 4 : 0),
        grad_proj_(needs_.proj_weight ? C_ * C_ * 4 : 0),
        tap_sums_(needs_.any_level() ? g_.B * taps_of_image() * 4 : 0),
        modulate_totals_(ModulateBackward::SUMS * C_),
        f_bias_totals_(F_ + 2 * C_) {
    const int64_t images = std::min(g_.B, images_), rows = images * g_.pixels(), bytes = bytes_of(dtype_);
    const int64_t blocks = RowBlocks(rows, units_).count;
    grad_projected_ = Buffer(rows * F_ * bytes);
    for (Buffer* matrix : {&grad_modulator_, &z_, &grad_ctx_all_, &ctx_all_}) *matrix = Buffer(rows * C_ * bytes);
    gate_sums_ = Buffer(rows * k_.channel_blocks(C_) * (L_ + 1) * 4);
    modulate_sums_ = Buffer(blocks * ModulateBackward::SUMS * C_ * 4);
    f_bias_sums_ = Buffer(blocks * (F_ + 2 * C_) * 4);
    const Residual r = residual_.values();
    if (r.gamma || r.drop_path || r.post_norm() || r.wide) grad_u_ = Buffer(rows * C_ * bytes);
    if (r.pre_norm() || r.wide) f_in_ = Buffer(rows * C_ * bytes);
    if (r.post_norm() || needs_.gamma) proj_ = PackedMatrix(k_, p.proj_weight), proj_bias_ = floats_of(p.proj_bias);
  }

  std::vector<Tensor> run() {
    for (int64_t b = 0; b < g_.B && g_.pixels() > 0; b += images_) {
      const ImageGroup group(g_, dtype_, b, std::min(g_.B, b + images_));
      const RowBlocks blocks(group.tokens(), units_);
      modulate_back(group, blocks);
      if (chain()) context_back(group);
      if (projected()) project_back(group, blocks);
      weight_gradients(group);
    }
    return finish();
  }

 private:
  // Whether anything up to f is asked for.
  bool projected() const {
    return needs_.projected() || (residual_.values().pre_norm() && (needs_.norm_weight || needs_.norm_bias));
  }
  // Whether anything before h is.
  bool chain() const { return projected() || needs_.any_level() || needs_.h_weight; }
  int64_t taps_of_image() const { return k_.channel_blocks(C_) * k_.lanes * levels_.sums; }

  // grad_y -> q's part of grad_projected, grad_modulator, grad_ctx_all; z, proj's input, is made again.
  void modulate_back(const ImageGroup& group, const RowBlocks& blocks) {
    ModulateBackward p{};
    p.dtype = dtype_;
    p.proj_t = proj_t_.packed;
    p.h_t = h_t_.packed;
    p.ln_weight = data_or_null(ln_weight_);
    p.ln_bias = data_or_null(ln_bias_);
    p.ln_eps = ln_eps_;
    p.residual = residual_.values(group.first);
    p.proj = proj_.packed;
    p.proj_bias = data_or_null(proj_bias_);
    p.grad_out = group.rows(grad_y_);
    if (grad_u_.data) p.grad_u = group.rows(grad_u_.data, C_);
    p.q = group.rows(group.part(saved_.projected), F_);
    p.modulator = group.rows(group.part(saved_.modulator), C_);
    p.grad_q = group.rows(grad_projected_.data, F_);
    p.grad_modulator = group.rows(grad_modulator_.data, C_);
    p.z = group.rows(z_.data, C_);
    if (chain()) p.grad_ctx_all = group.rows(grad_ctx_all_.data, C_);
    p.sums = modulate_sums_.floats();
    for_blocks(
        blocks, k_.modulate_bwd_scratch(p, blocks.size),
        [&](int64_t i, int64_t row0, int64_t row1, void* scratch) { k_.modulate_bwd(p, i, row0, row1, scratch); });
    add_partial_sums(p.sums, blocks.count, int64_t(modulate_totals_.size()), modulate_totals_.data());
  }

  // grad_ctx_all -> ctx's part of grad_projected, partial sums of the gates' and the taps' gradients; ctx_all is made
  // again where h's gradient needs it.
  void context_back(const ImageGroup& group) {
    void* stored = group.part(saved_.projected);
    ContextBackward p{};
    p.forward.g = group.g;
    p.forward.dtype = dtype_;
    p.forward.L = L_;
    p.forward.levels = levels_.levels.data();
    p.forward.weights = levels_.weights.data();
    p.forward.biases = levels_.biases.data();
    p.forward.ctx = group.map(stored, F_, C_);
    p.forward.gates = group.map(stored, F_, 2 * C_);
    p.forward.normalize = normalize_;
    if (needs_.h_weight) p.forward.out = group.map(ctx_all_.data, C_);
    p.flipped = flipped_.weights.data();
    p.mean = static_cast<const float*>(saved_.mean.const_data_ptr()) + group.first * C_;
    p.grad_out = group.map(grad_ctx_all_.data, C_);
    if (projected()) {
      p.grad_ctx = group.map(grad_projected_.data, F_, C_);
      p.grad_gates = gate_sums_.floats();
    }
    if (needs_.any_level()) p.grad_weights = tap_sums_.floats() + group.first * taps_of_image();
    run_context_bwd(k_, p);
  }

  // The gates' part of grad_projected; then all of it -> grad_x.
  void project_back(const ImageGroup& group, const RowBlocks& blocks) {
    ProjectBackward p{};
    p.dtype = dtype_;
    p.g = group.g;
    p.gates = L_ + 1;
    p.channel_blocks = k_.channel_blocks(C_);
    p.grad_gates = gate_sums_.floats();
    p.f_t = f_t_.packed;
    p.grad_projected = group.rows(grad_projected_.data, F_);
    p.residual = residual_.values(group.first);
    p.x = group.rows(x_);
    p.grad_y = group.rows(grad_y_);
    if (f_in_.data) p.z = group.rows(f_in_.data, C_);
    if (needs_.x) p.grad_x = group.rows(grad_x_);
    p.sums = f_bias_sums_.floats();
    for_blocks(
        blocks, k_.project_bwd_scratch(p, blocks.size),
        [&](int64_t i, int64_t row0, int64_t row1, void* scratch) { k_.project_bwd(p, i, row0, row1, scratch); });
    add_partial_sums(p.sums, blocks.count, p.all_sums(), f_bias_totals_.data());
  }

  void weight_gradients(const ImageGroup& group) {
    WeightGradients gradients(k_, dtype_, F_ + 2 * C_, units_.tokens, group.first > 0);
    if (needs_.f_weight)
      gradients.of(F_, C_, group.rows(grad_projected_.data, F_),
                   f_in_.data ? group.rows(f_in_.data, C_) : group.rows(x_), grad_f_);
    if (needs_.h_weight)
      gradients.of(C_, C_, group.rows(grad_modulator_.data, C_), group.rows(ctx_all_.data, C_), grad_h_);
    if (needs_.proj_weight)
      gradients.of(C_, C_, grad_u_.data ? group.rows(grad_u_.data, C_) : group.rows(grad_y_), group.rows(z_.data, C_),
                   grad_proj_);
    gradients.run(group.tokens());
  }

  std::vector<Tensor> finish() {
    LayerGradients gradients(x_, L_, around_ != nullptr);
    gradients.x = grad_x_;
    const bool nothing = g_.B * g_.pixels() == 0;  // no tokens: nothing was summed
    const auto put = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of, const float* values) {
      if (!wanted) return;
      if (nothing) {
        gradient = torch::stable::empty_like(*of);
        torch::stable::zero_(gradient);
      } else {
        gradient = like_parameter(k_, *of, values);
      }
    };
    const auto put_vector = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of, const double* totals,
                                int64_t n) {
      put(wanted, gradient, of, std::vector<float>(totals, totals + n).data());
    };
    put(needs_.f_weight, gradients.f_weight, p_.f_weight, grad_f_.floats());
    put(needs_.h_weight, gradients.h_weight, p_.h_weight, grad_h_.floats());
    put(needs_.proj_weight, gradients.proj_weight, p_.proj_weight, grad_proj_.floats());
    put_vector(needs_.f_bias, gradients.f_bias, p_.f_bias, f_bias_totals_.data(), F_);
    const double* totals = modulate_totals_.data();  // see ModulateBackward::sums
    put_vector(needs_.proj_bias, gradients.proj_bias, p_.proj_bias, totals, C_);
    put_vector(needs_.h_bias, gradients.h_bias, p_.h_bias, totals + C_, C_);
    put_vector(needs_.ln_weight, gradients.ln_weight, p_.ln_weight, totals + 2 * C_, C_);
    put_vector(needs_.ln_bias, gradients.ln_bias, p_.ln_bias, totals + 3 * C_, C_);
    if (around_) {
      put_vector(needs_.norm_weight, gradients.norm_weight, around_->norm_weight, norm_totals(0), C_);
      put_vector(needs_.norm_bias, gradients.norm_bias, around_->norm_bias, norm_totals(1), C_);
      put_vector(needs_.gamma, gradients.gamma, around_->gamma, totals + 6 * C_, C_);
    }
    gradients.focal_weights = focal_weight_gradients(k_, levels_, p_.focal_weights, needs_.focal_weights,
                                                     tap_sums_.floats(), nothing ? 0 : g_.B);
    return gradients.list();
  }

  // Of the residual's norm: weight, bias.
  const double* norm_totals(int64_t i) const {
    return residual_.values().post ? modulate_totals_.data() + (4 + i) * C_ : f_bias_totals_.data() + F_ + i * C_;
  }

  const Kernels& k_ = kernels();
  const Tensor &grad_y_, &x_;
  const LayerParameters& p_;
  const ResidualParameters* around_;
  const ResidualFloats& residual_;
  const Saved& saved_;
  const Geometry g_;
  const DType dtype_;
  const int64_t L_, C_, F_;
  const bool normalize_;
  const float ln_eps_;
  const LayerNeeds needs_;
  const PackedMatrix proj_t_, h_t_, f_t_;
  PackedMatrix proj_;  // and its bias: where the body's result is made again
  std::vector<float> proj_bias_;
  const PackedLevels levels_, flipped_;
  const std::vector<float> ln_weight_, ln_bias_;
  const Units units_;
  const int64_t images_;  // in a group

  // results, float
  Tensor grad_x_;
  const Buffer grad_f_, grad_h_, grad_proj_;
  const Buffer tap_sums_;                                // per image
  std::vector<double> modulate_totals_, f_bias_totals_;  // of ModulateBackward::sums, ProjectBackward::sums

  // of one group: gradients and what is made again, and partial sums per block
  Buffer grad_projected_, grad_modulator_, z_, grad_ctx_all_, ctx_all_;
  Buffer grad_u_, f_in_;  // what is not grad_y, and not x, as they are
  Buffer gate_sums_, modulate_sums_, f_bias_sums_;
};

}  // namespace

std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed) {
  const LayerParameters p(parameters);
  const Saved saved{projected, modulator, mean};
  return LayerBackward(grad_y, x, p, nullptr, {}, saved, normalize, ln_eps, needed).run();
}

std::vector<Tensor> focal_branch_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                     std::vector<Tensor> saved, bool normalize, double ln_eps, double norm_eps,
                                     bool post, int64_t needed) {
  const FocalBranchParameters p(parameters);
  const bool wide = x.scalar_type() != p.layer.f_weight.scalar_type();
  const ResidualFloats residual(p.residual, norm_eps, post, wide);
  const Saved of_forward{saved.at(0), saved.at(1), saved.at(2)};
  return LayerBackward(grad_y, x, p.layer, &p.residual, residual, of_forward, normalize, ln_eps, needed).run();
}

}  // namespace focalnet::cpu

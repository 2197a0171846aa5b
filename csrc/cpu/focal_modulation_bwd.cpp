// The whole layer's backward on the CPU, a group of images at a time:
//   grad_y -> proj^T, LN, q*, h^T -> the chain -> f^T -> grad_x, and the weights' gradients of the group.
#include "cpu/layer.h"

namespace focalnet::cpu {

namespace {

// total[i] += the sum over blocks of partial[block * n + i], in double: there may be thousands, of one sign
void add_partial_sums(const float* partial, int64_t blocks, int64_t n, double* total) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < n; ++i) total[i] += partial[block * n + i];
}

// How many of a weight's rows make a task: a few tasks per thread, for each packs the tokens anew.
int64_t gradient_columns(int64_t rows_of_all) {
  const int64_t tasks = 8 * torch::stable::get_num_threads();
  return std::clamp<int64_t>((rows_of_all / tasks + 47) / 48 * 48, 48, 384);
}

// What the forward saved.
struct Saved {
  Tensor projected, modulator, mean;
};

// What the groups of images share, and the steps that each goes through.
class LayerBackward {
 public:
  LayerBackward(const Tensor& grad_y, const Tensor& x, const LayerParameters& p, const Saved& saved, bool normalize,
                double ln_eps, int64_t needed)
      : grad_y_(grad_y),
        x_(x),
        p_(p),
        saved_(saved),
        g_(geometry_of(x, 1, x.dim() - 1)),
        dtype_(dtype_of(x)),
        L_(p.levels()),
        C_(g_.C),
        F_(p.f_weight.size(0)),
        normalize_(normalize),
        ln_eps_(float(ln_eps)),
        needs_(needed, L_),
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
        f_bias_totals_(F_) {
    const int64_t images = std::min(g_.B, images_), rows = images * g_.pixels(), bytes = bytes_of(dtype_);
    const int64_t blocks = RowBlocks(rows, units_).count;
    grad_projected_ = Buffer(rows * F_ * bytes);
    for (Buffer* matrix : {&grad_modulator_, &z_, &grad_ctx_all_, &ctx_all_}) *matrix = Buffer(rows * C_ * bytes);
    gate_sums_ = Buffer(rows * k_.channel_blocks(C_) * (L_ + 1) * 4);
    modulate_sums_ = Buffer(blocks * ModulateBackward::SUMS * C_ * 4);
    f_bias_sums_ = Buffer(blocks * F_ * 4);
  }

  std::vector<Tensor> run() {
    for (int64_t b = 0; b < g_.B && g_.pixels() > 0; b += images_) {
      const ImageGroup group(g_, dtype_, b, std::min(g_.B, b + images_));
      const RowBlocks blocks(group.tokens(), units_);
      modulate_back(group, blocks);
      if (chain()) context_back(group);
      if (needs_.projected()) project_back(group, blocks);
      weight_gradients(group);
    }
    return finish();
  }

 private:
  // Whether anything before h is asked for.
  bool chain() const { return needs_.projected() || needs_.any_level() || needs_.h_weight; }
  int64_t taps_of_image() const { return k_.channel_blocks(C_) * k_.lanes * levels_.taps; }

  // grad_y -> q's part of grad_projected, grad_modulator, grad_ctx_all; z, proj's input, is made again.
  void modulate_back(const ImageGroup& group, const RowBlocks& blocks) {
    ModulateBackward p{};
    p.dtype = dtype_;
    p.proj_t = proj_t_.packed;
    p.h_t = h_t_.packed;
    p.ln_weight = data_or_null(ln_weight_);
    p.ln_bias = data_or_null(ln_bias_);
    p.ln_eps = ln_eps_;
    p.grad_out = group.rows(grad_y_);
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
    void* projected = group.part(saved_.projected);
    ContextBackward p{};
    p.forward.g = group.g;
    p.forward.dtype = dtype_;
    p.forward.L = L_;
    p.forward.levels = levels_.levels.data();
    p.forward.weights = levels_.weights.data();
    p.forward.ctx = group.map(projected, F_, C_);
    p.forward.gates = group.map(projected, F_, 2 * C_);
    p.forward.normalize = normalize_;
    if (needs_.h_weight) p.forward.out = group.map(ctx_all_.data, C_);
    p.flipped = flipped_.weights.data();
    p.mean = static_cast<const float*>(saved_.mean.const_data_ptr()) + group.first * C_;
    p.grad_out = group.map(grad_ctx_all_.data, C_);
    if (needs_.projected()) {
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
    if (needs_.x) p.grad_x = group.rows(grad_x_);
    p.sums = f_bias_sums_.floats();
    for_blocks(
        blocks, k_.project_bwd_scratch(p, blocks.size),
        [&](int64_t i, int64_t row0, int64_t row1, void* scratch) { k_.project_bwd(p, i, row0, row1, scratch); });
    add_partial_sums(p.sums, blocks.count, F_, f_bias_totals_.data());
  }

  // What the group adds to the matrices' gradients: tasks of some rows of one of them, each over all tokens.
  void weight_gradients(const ImageGroup& group) {
    struct Task {
      WeightGradient gradient;
      int64_t n0, n1;
    };
    const int64_t columns = gradient_columns(F_ + 2 * C_);
    std::vector<Task> tasks;
    const auto add = [&](bool wanted, int64_t N, const Rows& grad, const Rows& in, const Buffer& out) {
      if (!wanted) return;
      const WeightGradient gradient{dtype_, N, C_, grad, in, out.floats(), group.first > 0, units_.tokens};
      for (int64_t n = 0; n < N; n += columns) tasks.push_back({gradient, n, std::min(N, n + columns)});
    };
    add(needs_.f_weight, F_, group.rows(grad_projected_.data, F_), group.rows(x_), grad_f_);
    add(needs_.h_weight, C_, group.rows(grad_modulator_.data, C_), group.rows(ctx_all_.data, C_), grad_h_);
    add(needs_.proj_weight, C_, group.rows(grad_y_), group.rows(z_.data, C_), grad_proj_);
    parallel(int64_t(tasks.size()), [&](int64_t i) {
      const Task& task = tasks[i];
      const Buffer scratch(k_.weight_gradient_scratch(task.gradient, columns));
      k_.weight_gradient(task.gradient, task.n0, task.n1, 0, group.tokens(), scratch.data);
    });
  }

  std::vector<Tensor> finish() {
    LayerGradients gradients(x_, L_);
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
    gradients.focal_weights = focal_weight_gradients(k_, levels_, p_.focal_weights, needs_.focal_weights,
                                                     tap_sums_.floats(), nothing ? 0 : g_.B);
    return gradients.list();
  }

  const Kernels& k_ = kernels();
  const Tensor &grad_y_, &x_;
  const LayerParameters& p_;
  const Saved& saved_;
  const Geometry g_;
  const DType dtype_;
  const int64_t L_, C_, F_;
  const bool normalize_;
  const float ln_eps_;
  const LayerNeeds needs_;
  const PackedMatrix proj_t_, h_t_, f_t_;
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
  Buffer gate_sums_, modulate_sums_, f_bias_sums_;
};

}  // namespace

std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed) {
  const LayerParameters p(parameters);
  const Saved saved{projected, modulator, mean};
  return LayerBackward(grad_y, x, p, saved, normalize, ln_eps, needed).run();
}

}  // namespace focalnet::cpu

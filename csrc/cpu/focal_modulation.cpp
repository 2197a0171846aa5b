// The whole layer on the CPU, a group of images at a time: f -> focal_context -> h, q*, LN?, proj.
#include "cpu/few_rows_ops.h"
#include "cpu/layer.h"

namespace focalnet::cpu {

int64_t images_per_group(const Geometry& g, const Kernels& k) {
  const int64_t blocks = k.channel_blocks(g.C), threads = torch::stable::get_num_threads();
  const int64_t for_cache = 6272 / std::max<int64_t>(1, g.pixels());
  const int64_t for_threads = (2 * threads + blocks - 1) / blocks;
  return std::max<int64_t>(1, std::min(g.B, std::max(for_cache, for_threads)));
}

namespace {

// `saved`: projected, modulator and mean; nothing where there will be no backward.
struct Outputs {
  Tensor y;
  std::vector<Tensor> saved;
  const Tensor& projected() const { return saved[0]; }
  const Tensor& modulator() const { return saved[1]; }
  const Tensor& mean() const { return saved[2]; }
};

// What the groups of images share, and the steps that each goes through.
class LayerForward {
 public:
  LayerForward(const Tensor& x, const LayerParameters& p, const ResidualFloats& residual, bool normalize, double ln_eps,
               bool save, const KeptPanels& kept, const Outputs& out)
      : x_(x),
        residual_(residual),
        out_(out),
        g_(geometry_of(x, 1, x.dim() - 1)),
        dtype_(dtype_of(p.f_weight)),
        F_(p.f_weight.size(0)),
        save_(save),
        normalize_(normalize),
        ln_eps_(float(ln_eps)),
        first_(save ? 0 : g_.C),
        f_(k_, p.f_weight, first_, F_, kept[0]),
        f_q_(k_, p.f_weight, 0, first_, kept[0]),
        h_(k_, p.h_weight, 0, g_.C, kept[1]),
        proj_(k_, p.proj_weight, 0, g_.C, kept[2]),
        levels_(k_, p.focal_weights, g_.C),
        f_bias_(floats_of(p.f_bias)),
        h_bias_(floats_of(p.h_bias)),
        proj_bias_(floats_of(p.proj_bias)),
        ln_weight_(floats_of(p.ln_weight)),
        ln_bias_(floats_of(p.ln_bias)) {}

  void run() const {
    const int64_t threads = torch::stable::get_num_threads();
    if (g_.B % threads == 0 || g_.B >= 8 * threads) {
      // every thread takes images of its own through the whole layer: nothing crosses from one cache to another
      const int64_t per_thread = (g_.B + threads - 1) / threads;
      const int64_t group = std::clamp<int64_t>(1024 / g_.pixels(), 1, per_thread);
      parallel(threads, [&](int64_t thread) {
        const int64_t end = std::min(g_.B, (thread + 1) * per_thread);
        for (int64_t b = thread * per_thread; b < end; b += group) run({g_, dtype_, b, std::min(end, b + group)});
      });
    } else {
      const int64_t group = images_per_group(g_, k_);
      for (int64_t b = 0; b < g_.B; b += group) run({g_, dtype_, b, std::min(g_.B, b + group)});
    }
  }

 private:
  // Run inside a task, its parallel parts run on that task's thread.
  void run(const ImageGroup& group) const {
    const Buffer f_out(save_ ? 0 : group.tokens() * width() * bytes_of(dtype_));
    const Buffer ctx_all_memory(save_ ? group.tokens() * g_.C * bytes_of(dtype_) : 0);
    void* projected = save_ ? group.part(out_.projected()) : f_out.data;
    const MapView ctx = group.map(projected, width(), g_.C - first_);
    // over ctx itself where nothing needs it again: a map is read to its end before its result is written
    const MapView ctx_all = save_ ? group.map(ctx_all_memory.data, g_.C) : ctx;
    const RowBlocks blocks(group.tokens());

    project(group, blocks, projected);
    context(group, ctx, group.map(projected, width(), 2 * g_.C - first_), ctx_all);
    modulate(group, blocks, projected, ctx_all);
  }

  void project(const ImageGroup& group, const RowBlocks& blocks, void* projected) const {
    LinearForward p{};
    p.dtype = dtype_;
    p.weight = f_.packed;
    p.bias = f_bias_.empty() ? nullptr : f_bias_.data() + first_;
    p.in = group.rows(x_);
    const Residual residual = residual_.values(group.first);
    p.residual.wide = residual.wide;
    if (residual.pre_norm()) p.residual = residual;
    p.out = group.rows(projected, width());
    for_blocks(blocks, k_.linear_scratch(p, blocks.size),
               [&](int64_t, int64_t row0, int64_t row1, void* scratch) { k_.linear_fwd(p, row0, row1, scratch); });
  }

  void context(const ImageGroup& group, const MapView& ctx, const MapView& gates, const MapView& ctx_all) const {
    ContextForward p{};
    p.g = group.g;
    p.dtype = dtype_;
    p.L = levels_.count();
    p.levels = levels_.levels.data();
    p.weights = levels_.weights.data();
    p.biases = levels_.biases.data();
    p.ctx = ctx;
    p.gates = gates;
    p.out = ctx_all;
    p.normalize = normalize_;
    p.mean = save_ ? static_cast<float*>(out_.mean().mutable_data_ptr()) + group.first * g_.C : nullptr;
    run_context_fwd(k_, p);
  }

  void modulate(const ImageGroup& group, const RowBlocks& blocks, void* projected, const MapView& ctx_all) const {
    ModulateForward p{};
    p.dtype = dtype_;
    p.weight = h_.packed;
    p.bias = data_or_null(h_bias_);
    p.ctx_all = rows_of(ctx_all, group.g);
    p.out = group.rows(out_.y);
    p.x = group.rows(x_);
    p.residual = residual_.values(group.first);
    if (save_) {
      p.q = group.rows(projected, F_);
      p.modulator = group.rows(group.part(out_.modulator()), g_.C);
    } else {
      p.f_q = f_q_.packed;
      p.f_q_bias = data_or_null(f_bias_);
    }
    p.proj = proj_.packed;
    p.proj_bias = data_or_null(proj_bias_);
    p.ln_weight = data_or_null(ln_weight_);
    p.ln_bias = data_or_null(ln_bias_);
    p.ln_eps = ln_eps_;
    for_blocks(blocks, k_.modulate_scratch(p, blocks.size),
               [&](int64_t, int64_t row0, int64_t row1, void* scratch) { k_.modulate_fwd(p, row0, row1, scratch); });
  }

  // of f's output that is stored: channels first_..F_
  int64_t width() const { return F_ - first_; }

  const Kernels& k_ = kernels();
  const Tensor& x_;
  const ResidualFloats& residual_;
  const Outputs& out_;
  const Geometry g_;
  const DType dtype_;
  const int64_t F_;
  const bool save_, normalize_;
  const float ln_eps_;
  // Inference: q, f's first C channels, is recomputed per block of rows instead of stored
  const int64_t first_;
  const PackedMatrix f_, f_q_, h_, proj_;
  const PackedLevels levels_;
  const std::vector<float> f_bias_, h_bias_, proj_bias_, ln_weight_, ln_bias_;
};

// All images at once, every product cut by columns: inference over few tokens.
void few_rows_fwd(const Tensor& x, const LayerParameters& p, const ResidualFloats& residual, bool normalize,
                  double ln_eps, const KeptPanels& kept, const Tensor& y) {
  using Then = FewRowsProduct::Then;
  const Kernels& k = kernels();
  const DType dtype = dtype_of(p.f_weight);
  const Geometry g = geometry_of(x, 1, x.dim() - 1);
  const ImageGroup all(g, dtype, 0, g.B);
  const int64_t C = g.C, F = p.f_weight.size(0), rows = all.tokens();
  const FewRows few(k, dtype, rows);
  const std::vector<float> f_bias = floats_of(p.f_bias), h_bias = floats_of(p.h_bias),
                           proj_bias = floats_of(p.proj_bias), ln_weight = floats_of(p.ln_weight),
                           ln_bias = floats_of(p.ln_bias);
  const PackedLevels levels(k, p.focal_weights, C);

  const Buffer projected(rows * F * bytes_of(dtype));
  const Buffer f_in = few.operand(all.rows(x), residual.values(), C);
  FewRowsProduct f = few.product(f_in, p.f_weight, kept[0], f_bias, Then::STORE);
  f.out = all.rows(projected.data, F);
  few.run(f);

  const MapView ctx = all.map(projected.data, F, C);
  ContextForward c{};
  c.g = g;
  c.dtype = dtype;
  c.L = levels.count();
  c.levels = levels.levels.data();
  c.weights = levels.weights.data();
  c.biases = levels.biases.data();
  c.ctx = ctx;
  c.gates = all.map(projected.data, F, 2 * C);
  c.out = ctx;  // a map is read to its end before its result is written
  c.normalize = normalize;
  run_context_fwd(k, c);

  const Buffer ctx_all = few.operand(rows_of(ctx, g), Residual{}, C);
  const Buffer z(k.operand_bytes(dtype, rows, C));
  FewRowsProduct h = few.product(ctx_all, p.h_weight, kept[1], h_bias, Then::MODULATE);
  h.q = all.rows(projected.data, F);
  h.next = z.data;
  few.run(h);
  if (!ln_weight.empty()) few.norm(z, C, ln_weight.data(), ln_bias.data(), float(ln_eps));

  FewRowsProduct proj =
      few.product(z, p.proj_weight, kept[2], proj_bias, residual.values().add ? Then::RESIDUAL : Then::STORE);
  proj.out = all.rows(y);
  proj.x = all.rows(x);
  proj.residual = residual.values();
  few.run_residual(proj);
}

std::tuple<Tensor, std::vector<Tensor>> layer_fwd(const Tensor& x, const LayerParameters& p,
                                                  const ResidualFloats& residual, bool normalize, double ln_eps,
                                                  bool save, const KeptPanels& kept = {}) {
  const Geometry g = geometry_of(x, 1, x.dim() - 1);
  const int64_t tokens = g.B * g.pixels();
  const ScalarType of_body = p.f_weight.scalar_type();
  Outputs out{torch::stable::empty_like(x), {}};
  if (save)
    out.saved = {torch::stable::new_empty(x, {tokens, p.f_weight.size(0)}, of_body),
                 torch::stable::new_empty(x, {tokens, g.C}, of_body),
                 torch::stable::new_empty(x, {g.B, g.C}, ScalarType::Float)};
  if (tokens > 0 && few_rows(tokens, g.C) && !save)
    few_rows_fwd(x, p, residual, normalize, ln_eps, kept, out.y);
  else if (tokens > 0)
    LayerForward(x, p, residual, normalize, ln_eps, save, kept, out).run();
  return {out.y, out.saved};
}

}  // namespace

std::tuple<Tensor, std::vector<Tensor>> focal_modulation_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                             bool normalize, double ln_eps, bool save) {
  return layer_fwd(x, LayerParameters(parameters), {}, normalize, ln_eps, save);
}

std::tuple<Tensor, std::vector<Tensor>> focal_branch_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                         bool normalize, double ln_eps, double norm_eps, bool post,
                                                         bool save) {
  const FocalBranchParameters p(parameters);
  const bool wide = x.scalar_type() != p.layer.f_weight.scalar_type();
  return layer_fwd(x, p.layer, {p.residual, norm_eps, post, wide}, normalize, ln_eps, save);
}

namespace {

std::tuple<Tensor, bool> layer_packed(const Tensor& x, const LayerParameters& p,
                                      const std::vector<std::optional<Tensor>>& packed, const ResidualFloats& residual,
                                      bool normalize, double ln_eps) {
  const KeptPanels kept({p.f_weight, p.h_weight, p.proj_weight}, packed);
  const Tensor y = std::get<0>(layer_fwd(x, p, residual, normalize, ln_eps, false, kept));
  return {y, kept.up_to_date()};
}

}  // namespace

std::tuple<Tensor, bool> focal_modulation_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                 std::vector<std::optional<Tensor>> packed, bool normalize,
                                                 double ln_eps) {
  return layer_packed(x, LayerParameters(parameters), packed, {}, normalize, ln_eps);
}

std::tuple<Tensor, bool> focal_branch_packed(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                             std::vector<std::optional<Tensor>> packed, bool normalize, double ln_eps,
                                             double norm_eps, bool post) {
  const FocalBranchParameters p(parameters);
  const bool wide = x.scalar_type() != p.layer.f_weight.scalar_type();
  return layer_packed(x, p.layer, packed, {p.residual, norm_eps, post, wide}, normalize, ln_eps);
}

}  // namespace focalnet::cpu

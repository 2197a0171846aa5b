// The whole layer on the CPU, a group of images at a time so that what flows between its parts stays in
// cache: f -> focal_context -> h, q*, LN?, proj.
#include "common/parameters.h"
#include "cpu/tensors.h"

namespace focalnet::cpu {

int64_t images_per_group(const Geometry& g, int lanes) {
  const int64_t blocks = (g.C + lanes - 1) / lanes, threads = torch::stable::get_num_threads();
  const int64_t for_cache = 6272 / std::max<int64_t>(1, g.pixels());
  const int64_t for_threads = (2 * threads + blocks - 1) / blocks;
  return std::max<int64_t>(1, std::min(g.B, std::max(for_cache, for_threads)));
}

std::tuple<Tensor, std::vector<Tensor>> focal_modulation_fwd(Tensor x, std::vector<std::optional<Tensor>> parameters,
                                                             bool normalize, double ln_eps, bool save) {
  const Kernels& k = kernels();
  const LayerParameters p(parameters);
  const int64_t channel = x.dim() - 1;
  const Geometry g = geometry_of(x, 1, channel);
  const DType dtype = dtype_of(x);
  const int64_t tokens = g.B * g.pixels(), F = p.f_weight.size(0);

  Tensor y = torch::stable::empty_like(x);
  std::vector<Tensor> saved;  // projected, modulator, mean
  if (save) {
    saved.push_back(torch::stable::new_empty(x, {tokens, F}));
    saved.push_back(torch::stable::new_empty(x, {tokens, g.C}));
    saved.push_back(torch::stable::new_empty(x, {g.B, g.C}, ScalarType::Float));
  }
  if (tokens == 0) return {y, saved};

  // Where nothing is kept for a backward, q is made where it is used, and f's output is ctx and gates alone.
  const int64_t first = save ? 0 : g.C, width = F - first;
  const PackedMatrix f(k, p.f_weight, first, F), f_q(k, p.f_weight, 0, first);
  const PackedMatrix h(k, p.h_weight), proj(k, p.proj_weight);
  const PackedLevels levels(k, p.focal_weights, g.C);
  const auto bias_f = floats_of(p.f_bias), bias_h = floats_of(p.h_bias), bias_proj = floats_of(p.proj_bias);
  const auto weight_ln = floats_of(p.ln_weight), bias_ln = floats_of(p.ln_bias);

  // images b0..b1; run inside a task, its parallel parts run on that task's thread
  const auto run = [&](int64_t b0, int64_t b1) {
    const int64_t tokens_here = (b1 - b0) * g.pixels();
    const Buffer f_out(save ? 0 : tokens_here * width * bytes_of(dtype));
    const Buffer ctx_all(save ? tokens_here * g.C * bytes_of(dtype) : 0);
    Geometry part = g;
    part.B = b1 - b0;
    const int64_t row0 = b0 * g.pixels();
    void* projected_here = save ? at_element(saved[0].mutable_data_ptr(), row0 * F, dtype) : f_out.data;
    MapView in = map_of(x, 1, channel), out = map_of(y, 1, channel);
    in.data = at_element(in.data, b0 * in.b, dtype);
    out.data = at_element(out.data, b0 * out.b, dtype);
    const RowBlocks blocks(part.B * g.pixels());

    LinearForward to_f{};
    to_f.dtype = dtype;
    to_f.weight = f.packed;
    to_f.bias = bias_f.empty() ? nullptr : bias_f.data() + first;
    to_f.in = rows_of(in, part);
    to_f.out = rows_of(dense_map(projected_here, dtype, part, width, 0), part);
    const int64_t linear_scratch = k.linear_scratch(to_f, blocks.size);
    parallel(blocks.count, [&](int64_t i) {
      const Buffer memory(linear_scratch);
      k.linear_fwd(to_f, blocks.begin(i), blocks.end(i), memory.data);
    });

    ContextForward context{};
    context.g = part;
    context.dtype = dtype;
    context.L = p.levels();
    context.levels = levels.levels.data();
    context.weights = levels.weights.data();
    context.ctx = dense_map(projected_here, dtype, part, width, g.C - first);
    context.gates = dense_map(projected_here, dtype, part, width, 2 * g.C - first);
    // over ctx itself where nobody needs it again: a map is read to its end before its result is written
    context.out = save ? dense_map(ctx_all.data, dtype, part, g.C, 0) : context.ctx;
    context.normalize = normalize;
    context.mean = save ? static_cast<float*>(saved[2].mutable_data_ptr()) + b0 * g.C : nullptr;
    run_context_fwd(k, context);

    ModulateForward modulate{};
    modulate.dtype = dtype;
    modulate.weight = h.packed;
    modulate.bias = data_or_null(bias_h);
    modulate.ctx_all = rows_of(context.out, part);
    modulate.out = rows_of(out, part);
    if (save) {
      modulate.q = rows_of(dense_map(projected_here, dtype, part, F, 0), part);
      void* modulator_here = at_element(saved[1].mutable_data_ptr(), row0 * g.C, dtype);
      modulate.modulator = rows_of(dense_map(modulator_here, dtype, part, g.C, 0), part);
    } else {
      modulate.f_q = f_q.packed;
      modulate.f_q_bias = data_or_null(bias_f);
      modulate.x = rows_of(in, part);
    }
    modulate.proj = proj.packed;
    modulate.proj_bias = data_or_null(bias_proj);
    modulate.ln_weight = data_or_null(weight_ln);
    modulate.ln_bias = data_or_null(bias_ln);
    modulate.ln_eps = float(ln_eps);
    const int64_t modulate_scratch = k.modulate_scratch(modulate, blocks.size);
    parallel(blocks.count, [&](int64_t i) {
      const Buffer memory(modulate_scratch);
      k.modulate_fwd(modulate, blocks.begin(i), blocks.end(i), memory.data);
    });
  };

  const int64_t threads = torch::stable::get_num_threads();
  if (g.B % threads == 0 || g.B >= 8 * threads) {
    // every thread takes images of its own through the whole layer: nothing crosses from one cache to another
    const int64_t per_thread = (g.B + threads - 1) / threads;
    const int64_t group = std::clamp<int64_t>(1024 / g.pixels(), 1, per_thread);
    const int64_t groups = (per_thread + group - 1) / group;
    parallel(threads, [&](int64_t thread) {
      const int64_t end = std::min(g.B, (thread + 1) * per_thread);
      for (int64_t i = 0; i < groups; ++i) {
        const int64_t b0 = thread * per_thread + i * group;
        if (b0 < end) run(b0, std::min(end, b0 + group));
      }
    });
  } else {
    const int64_t group = images_per_group(g, k.lanes);
    for (int64_t b0 = 0; b0 < g.B; b0 += group) run(b0, std::min(g.B, b0 + group));
  }
  return {y, saved};
}

}  // namespace focalnet::cpu

// The whole layer's backward on the CPU, a group of images at a time:
//   grad_y -> proj^T, LN, q*, h^T -> the chain -> f^T -> grad_x, and the weights' gradients of the group.
#include "common/parameters.h"
#include "cpu/tensors.h"

namespace focalnet::cpu {

namespace {

// total[i] += the sum over blocks of shares[block * stride + i], in double: there may be thousands, of one sign
void add_shares(const float* shares, int64_t blocks, int64_t stride, int64_t n, double* total) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < n; ++i) total[i] += shares[block * stride + i];
}

// How many of a weight's rows make a task: a few tasks per thread, for each packs the tokens anew.
int64_t gradient_columns(int64_t rows_of_all) {
  const int64_t tasks = 8 * torch::stable::get_num_threads();
  return std::clamp<int64_t>((rows_of_all / tasks + 47) / 48 * 48, 48, 384);
}

// One weight's gradient, cut into tasks of some of its rows, numbered from `first`.
struct GradientTasks {
  WeightGradient gradient;
  int64_t first, count;
};

}  // namespace

std::vector<Tensor> focal_modulation_bwd(Tensor grad_y, Tensor x, std::vector<std::optional<Tensor>> parameters,
                                         Tensor projected, Tensor modulator, Tensor mean, bool normalize, double ln_eps,
                                         int64_t needed) {
  const Kernels& k = kernels();
  const LayerParameters parameter(parameters);
  const int64_t channel = x.dim() - 1, L = parameter.levels();
  const LayerNeeds needs(needed, L);
  const Geometry g = geometry_of(x, 1, channel);
  const DType dtype = dtype_of(x);
  const int64_t C = g.C, F = parameter.f_weight.size(0), pixels = g.pixels(), blocks_c = (C + k.lanes - 1) / k.lanes;

  const bool focal = needs.any_level(), to_projected = needs.projected();
  const bool chain = to_projected || focal || needs.h_weight;

  Tensor grad_x = needs.x ? torch::stable::empty_like(x) : torch::stable::new_empty(x, {0});
  const Buffer grad_f(needs.f_weight ? F * C * 4 : 0), grad_h(needs.h_weight ? C * C * 4 : 0);
  const Buffer grad_proj(needs.proj_weight ? C * C * 4 : 0);
  std::vector<double> grad_f_bias(F), sums(ModulateBackward::SUMS * C);

  const PackedMatrix proj_t(k, parameter.proj_weight, true), h_t(k, parameter.h_weight, true),
      f_t(k, parameter.f_weight, true);
  const PackedLevels levels(k, parameter.focal_weights, C), flipped(k, parameter.focal_weights, C, true);
  const auto weight_ln = floats_of(parameter.ln_weight), bias_ln = floats_of(parameter.ln_bias);

  const Units units(g);
  const int64_t group = (images_per_group(g, k.lanes) + units.images - 1) / units.images * units.images;
  const int64_t rows = std::min(g.B, group) * pixels, bytes = bytes_of(dtype);
  const Buffer grad_projected(rows * F * bytes), grad_modulator(rows * C * bytes), z(rows * C * bytes);
  const Buffer grad_ctx_all(rows * C * bytes), ctx_all(rows * C * bytes);
  const Buffer gate_shares(std::min(g.B, group) * blocks_c * (L + 1) * pixels * 4);
  const Buffer tap_shares(focal ? g.B * blocks_c * levels.taps * k.lanes * 4 : 0);
  const Buffer modulate_sums(RowBlocks(rows, units).count * ModulateBackward::SUMS * C * 4);
  const Buffer project_sums(RowBlocks(rows, units).count * F * 4);

  for (int64_t b0 = 0; b0 < g.B && pixels > 0; b0 += group) {
    Geometry part = g;
    part.B = std::min(group, g.B - b0);
    const int64_t row0 = b0 * pixels;
    const RowBlocks blocks(part.B * pixels, units);
    const auto view = [&](const Tensor& t) {
      MapView v = map_of(t, 1, channel);
      v.data = at_element(v.data, b0 * v.b, dtype);
      return v;
    };
    const auto dense = [&](void* data, int64_t width, int64_t first) {
      return dense_map(data, dtype, part, width, first);
    };
    void* projected_here = at_element(projected.const_data_ptr(), row0 * F, dtype);
    void* modulator_here = at_element(modulator.const_data_ptr(), row0 * C, dtype);

    ModulateBackward modulate{};
    modulate.dtype = dtype;
    modulate.proj_t = proj_t.packed;
    modulate.h_t = h_t.packed;
    modulate.ln_weight = data_or_null(weight_ln);
    modulate.ln_bias = data_or_null(bias_ln);
    modulate.ln_eps = float(ln_eps);
    modulate.grad_out = rows_of(view(grad_y), part);
    modulate.q = rows_of(dense(projected_here, F, 0), part);
    modulate.modulator = rows_of(dense(modulator_here, C, 0), part);
    modulate.grad_q = rows_of(dense(grad_projected.data, F, 0), part);
    modulate.grad_modulator = rows_of(dense(grad_modulator.data, C, 0), part);
    modulate.z = rows_of(dense(z.data, C, 0), part);
    if (chain) modulate.grad_ctx_all = rows_of(dense(grad_ctx_all.data, C, 0), part);
    modulate.sums = modulate_sums.floats();
    const int64_t modulate_scratch = k.modulate_bwd_scratch(modulate, blocks.size);
    parallel(blocks.count, [&](int64_t i) {
      const Buffer scratch(modulate_scratch);
      k.modulate_bwd(modulate, i, blocks.begin(i), blocks.end(i), scratch.data);
    });
    add_shares(modulate_sums.floats(), blocks.count, ModulateBackward::SUMS * C, ModulateBackward::SUMS * C,
               sums.data());

    if (chain) {
      ContextBackward context{};
      context.forward.g = part;
      context.forward.dtype = dtype;
      context.forward.L = L;
      context.forward.levels = levels.levels.data();
      context.forward.weights = levels.weights.data();
      context.forward.ctx = dense(projected_here, F, C);
      context.forward.gates = dense(projected_here, F, 2 * C);
      context.forward.normalize = normalize;
      if (needs.h_weight) context.forward.out = dense(ctx_all.data, C, 0);
      context.flipped = flipped.weights.data();
      context.mean = static_cast<const float*>(mean.const_data_ptr()) + b0 * C;
      context.grad_out = dense(grad_ctx_all.data, C, 0);
      if (to_projected) {
        context.grad_ctx = dense(grad_projected.data, F, C);
        context.grad_gates = gate_shares.floats();
      }
      if (focal) context.grad_weights = tap_shares.floats() + b0 * blocks_c * levels.taps * k.lanes;
      run_context_bwd(k, context);
    }

    if (to_projected) {
      ProjectBackward project{};
      project.dtype = dtype;
      project.g = part;
      project.gates = L + 1;
      project.channel_blocks = blocks_c;
      project.grad_gates = gate_shares.floats();
      project.f_t = f_t.packed;
      project.grad_projected = rows_of(dense(grad_projected.data, F, 0), part);
      if (needs.x) project.grad_x = rows_of(view(grad_x), part);
      project.sums = project_sums.floats();
      const int64_t project_scratch = k.project_bwd_scratch(project, blocks.size);
      parallel(blocks.count, [&](int64_t i) {
        const Buffer scratch(project_scratch);
        k.project_bwd(project, i, blocks.begin(i), blocks.end(i), scratch.data);
      });
      add_shares(project_sums.floats(), blocks.count, F, F, grad_f_bias.data());
    }

    // the weights' gradients of the group: tasks of some rows of one weight, each over all tokens
    const int64_t columns = gradient_columns(F + 2 * C);
    std::vector<GradientTasks> tasks;
    const auto add_gradient = [&](bool wanted, int64_t N, const Rows& grad, const Rows& in, const Buffer& out) {
      if (!wanted) return;
      const int64_t first = tasks.empty() ? 0 : tasks.back().first + tasks.back().count;
      tasks.push_back(
          {{dtype, N, C, grad, in, out.floats(), b0 > 0, units.tokens}, first, (N + columns - 1) / columns});
    };
    add_gradient(needs.f_weight, F, rows_of(dense(grad_projected.data, F, 0), part), rows_of(view(x), part), grad_f);
    add_gradient(needs.h_weight, C, modulate.grad_modulator, rows_of(dense(ctx_all.data, C, 0), part), grad_h);
    add_gradient(needs.proj_weight, C, modulate.grad_out, modulate.z, grad_proj);
    if (tasks.empty()) continue;
    parallel(tasks.back().first + tasks.back().count, [&](int64_t i) {
      const GradientTasks* task = tasks.data();
      while (i >= task->first + task->count) ++task;
      const int64_t n0 = (i - task->first) * columns, n1 = std::min(task->gradient.N, n0 + columns);
      const Buffer scratch(k.weight_gradient_scratch(task->gradient, columns));
      k.weight_gradient(task->gradient, n0, n1, 0, part.B * pixels, scratch.data);
    });
  }

  const auto floats = [](const std::vector<double>& values, int64_t first, int64_t n) {
    return std::vector<float>(values.begin() + first, values.begin() + first + n);
  };
  LayerGradients gradients(x, L);
  gradients.x = grad_x;
  const auto put = [&](bool wanted, Tensor& gradient, const std::optional<Tensor>& of, const float* values) {
    if (!wanted) return;
    if (g.B * pixels == 0) {  // no tokens: nothing was summed
      gradient = torch::stable::empty_like(*of);
      torch::stable::zero_(gradient);
    } else {
      gradient = like_parameter(k, *of, values);
    }
  };
  put(needs.f_weight, gradients.f_weight, parameter.f_weight, grad_f.floats());
  put(needs.f_bias, gradients.f_bias, parameter.f_bias, floats(grad_f_bias, 0, F).data());
  put(needs.h_weight, gradients.h_weight, parameter.h_weight, grad_h.floats());
  put(needs.h_bias, gradients.h_bias, parameter.h_bias, floats(sums, C, C).data());
  put(needs.proj_weight, gradients.proj_weight, parameter.proj_weight, grad_proj.floats());
  put(needs.proj_bias, gradients.proj_bias, parameter.proj_bias, floats(sums, 0, C).data());
  put(needs.ln_weight, gradients.ln_weight, parameter.ln_weight, floats(sums, 2 * C, C).data());
  put(needs.ln_bias, gradients.ln_bias, parameter.ln_bias, floats(sums, 3 * C, C).data());
  // with no tokens there are no shares to sum
  const int64_t images = pixels > 0 ? g.B : 0;
  gradients.focal_weights =
      focal_weight_gradients(k, levels, parameter.focal_weights, needs.focal_weights, tap_shares.floats(), images);
  return gradients.list();
}

}  // namespace focalnet::cpu

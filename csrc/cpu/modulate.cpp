// modulate on the CPU: blocks of tokens.
#include "cpu/tensors.h"

namespace focalnet::cpu {

Tensor modulate_fwd(Tensor q, Tensor ctx_all, Tensor weight, std::optional<Tensor> bias) {
  const Kernels& k = kernels();
  Tensor out = torch::stable::empty_like(q);
  if (q.numel() == 0) return out;
  const Geometry g = geometry_of(q, 2, 1);
  const std::vector<float> h_bias = floats_of(bias);
  const PackedMatrix h(k, weight);
  ModulateForward p{};
  p.dtype = dtype_of(q);
  p.weight = h.packed;
  p.bias = data_or_null(h_bias);
  p.ctx_all = rows_of(map_of(ctx_all, 2, 1), g);
  p.q = rows_of(map_of(q, 2, 1), g);
  p.out = rows_of(map_of(out, 2, 1), g);
  const RowBlocks blocks(g.B * g.pixels());
  for_blocks(blocks, k.modulate_scratch(p, blocks.size),
             [&](int64_t, int64_t row0, int64_t row1, void* scratch) { k.modulate_fwd(p, row0, row1, scratch); });
  return out;
}

}  // namespace focalnet::cpu

// Patch embedding on the CPU, forward: patches gathered as rows, a product, and its norm.
#include <cstring>

#include "common/parameters.h"
#include "cpu/few_rows_ops.h"

namespace focalnet::cpu {

namespace {

// Patches (B, C, *grid, *kernel) of any strides: overlapping ones share memory.
class Patches {
 public:
  Patches(const Tensor& t, bool taps_first)
      : C(t.size(1)),
        bytes_(bytes_of(dtype_of(t))),
        data_(t.const_data_ptr()),
        image_(t.stride(0)),
        channel_(t.stride(1)),
        taps_first_(taps_first) {
    const int64_t ndim = (t.dim() - 2) / 2;
    const Axes grid(ndim, 2), kernel(ndim, 2 + ndim);
    for (size_t i = 0; i < 3; ++i) {
      size_[i] = size_or_1(t, grid.tmw[i]);
      stride_[i] = stride_or_0(t, grid.tmw[i]);
      pixels *= size_[i];
    }
    offsets_ = {0};
    for (const int64_t axis : kernel.tmw) {
      std::vector<int64_t> longer;
      for (const int64_t offset : offsets_)
        for (int64_t i = 0; i < size_or_1(t, axis); ++i) longer.push_back(offset + i * stride_or_0(t, axis));
      offsets_ = longer;
    }
  }
  int64_t taps() const { return int64_t(offsets_.size()); }

  // Rows row0..row1, each of (tap, channel) or (channel, tap).
  void gather(int64_t row0, int64_t row1, void* rows) const {
    if (bytes_ == 4)
      gather_of(row0, row1, static_cast<uint32_t*>(rows));
    else
      gather_of(row0, row1, static_cast<uint16_t*>(rows));
  }

  int64_t C, pixels = 1;

 private:
  template <class E>
  void gather_of(int64_t row0, int64_t row1, E* to) const {
    const size_t taps = offsets_.size(), channels = size_t(C);
    const size_t to_tap = taps_first_ ? channels : 1, to_channel = taps_first_ ? 1 : taps;
    for (int64_t row = row0; row < row1; ++row, to += taps * channels) {
      const int64_t pixel = row % pixels, line = pixel / size_[2];
      const E* from = static_cast<const E*>(data_) + row / pixels * image_ + line / size_[1] * stride_[0] +
                      line % size_[1] * stride_[1] + pixel % size_[2] * stride_[2];
      if (channel_ == 1) {
        for (size_t tap = 0; tap < taps; ++tap) {
          const E* const of_tap = from + offsets_[tap];
          if (taps_first_)
            std::memcpy(to + tap * channels, of_tap, channels * sizeof(E));
          else
            for (size_t c = 0; c < channels; ++c) to[tap + c * taps] = of_tap[c];
        }
      } else {
        for (size_t c = 0; c < channels; ++c)
          for (size_t tap = 0; tap < taps; ++tap)
            to[tap * to_tap + c * to_channel] = from[offsets_[tap] + int64_t(c) * channel_];
      }
    }
  }

  int64_t bytes_;
  const void* data_;
  int64_t image_, channel_;
  std::array<int64_t, 3> size_, stride_;
  std::vector<int64_t> offsets_;  // of the taps
  bool taps_first_;
};

// The weight (N, C, *kernel) as (N, *kernel, C).
Tensor channels_last(Tensor weight) {
  for (int64_t axis = 1; axis + 1 < weight.dim(); ++axis) weight = torch::stable::transpose(weight, axis, axis + 1);
  return weight;
}

}  // namespace

Tensor patch_embed_fwd(Tensor patches, Tensor weight, std::optional<Tensor> bias, std::optional<Tensor> norm_weight,
                       std::optional<Tensor> norm_bias, double norm_eps) {
  const Kernels& k = kernels();
  const DType dtype = dtype_of(patches);
  const int64_t N = weight.size(0), tokens = patches.numel() / (weight.numel() / N);
  // Pixels have their channels together, and weights their taps: the smaller one is put into the other's order.
  const bool taps_first = channels_last(weight).is_contiguous() || (patches.stride(1) == 1 && tokens > N);
  const Patches p(patches, taps_first);
  const int64_t K = p.taps() * p.C;
  std::vector<int64_t> shape{patches.size(0)};
  for (int64_t axis = 2; axis < 2 + (patches.dim() - 2) / 2; ++axis) shape.push_back(patches.size(axis));
  shape.push_back(N);
  const Tensor y = torch::stable::new_empty(patches, shape);
  if (tokens == 0) return y;

  weight = torch::stable::reshape(taps_first ? channels_last(weight) : weight, {N, K});
  char* const out = static_cast<char*>(y.mutable_data_ptr());
  const std::vector<float> sum_bias = floats_of(bias);
  const ResidualFloats norm = ResidualFloats::last_norm(norm_weight, norm_bias, norm_eps);
  const RowBlocks blocks(tokens);
  if (few_rows(tokens, N)) {
    const Buffer gathered(tokens * K * bytes_of(dtype));
    parallel(blocks.count, [&](int64_t i) {
      p.gather(blocks.begin(i), blocks.end(i),
               static_cast<char*>(gathered.data) + blocks.begin(i) * K * bytes_of(dtype));
    });
    const FewRows few(k, dtype, tokens);
    const Buffer operand = few.operand(dense_rows(gathered.data, tokens, K), Residual{}, K);
    FewRowsProduct product = few.product(operand, weight, nullptr, sum_bias, FewRowsProduct::Then::RESIDUAL);
    product.residual = norm.values();
    product.out = product.x = dense_rows(out, tokens, N);
    few.run_residual(product);
    return y;
  }
  const PackedMatrix matrix(k, weight);
  LinearForward linear{};
  linear.dtype = dtype;
  linear.weight = matrix.packed;
  linear.bias = data_or_null(sum_bias);
  linear.residual = norm.values();
  linear.out = dense_rows(out, tokens, N);
  const int64_t gathered = (blocks.size * K * bytes_of(dtype) + 63) / 64 * 64;
  for_blocks(blocks, gathered + k.linear_scratch(linear, blocks.size),
             [&](int64_t, int64_t row0, int64_t row1, void* scratch) {
               p.gather(row0, row1, scratch);
               LinearForward block = linear;
               block.in = dense_rows(scratch, row1 - row0, K);
               block.out = dense_rows(out + row0 * N * bytes_of(dtype), row1 - row0, N);
               k.linear_fwd(block, 0, row1 - row0, static_cast<char*>(scratch) + gathered);
             });
  return y;
}

}  // namespace focalnet::cpu

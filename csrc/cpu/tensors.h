// From torch's tensors to the plain descriptions of cpu/kernels.h, and torch's thread pool.
#pragma once

#include <algorithm>
#include <atomic>
#include <utility>
#include <vector>

#include "common/tensors.h"
#include "cpu/kernels.h"

namespace focalnet::cpu {

inline Rows rows_of(const MapView& v, const Geometry& g) {
  return {v.data, g.pixels(), v.b, v.c, v.t, v.m, v.w, g.M, g.W};
}

// Memory for as long as the object lives, on a cache line. It comes from pools, which keep what was returned: memory
// fresh from the system would have every page cleared first, which costs more than much of the work done in it.
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(int64_t bytes);
  Buffer(Buffer&& other) noexcept { *this = std::move(other); }
  Buffer& operator=(Buffer&& other) noexcept {
    std::swap(data, other.data);
    std::swap(size_, other.size_);
    return *this;
  }
  ~Buffer();
  float* floats() const { return static_cast<float*>(data); }

  void* data = nullptr;

 private:
  int64_t size_ = 0;
};

// f(i) for every i, on torch's threads. Whoever is free takes the next: tasks may be of any size, and cores busy.
template <class F>
void parallel(int64_t n, const F& f) {
  std::atomic<int64_t> next{0};
  const auto take = [&](int64_t begin, int64_t end) {
    for (int64_t thread = begin; thread < end; ++thread)
      for (int64_t i = next++; i < n; i = next++) f(i);
  };
  if (n > 0) torch::stable::parallel_for(0, std::min<int64_t>(n, torch::stable::get_num_threads()), 1, take);
}

// How tokens are cut where sums over them are made: by the shape alone, so that neither threads nor groups of images
// change a bit of a sum. A unit is as many whole images as make some 256 tokens; blocks of rows are parts of a unit.
struct Units {
  int64_t images, tokens, block;
  explicit Units(const Geometry& g) {
    const int64_t pixels = std::max<int64_t>(1, g.pixels()), all = g.B * pixels;
    images = std::max<int64_t>(1, std::min(g.B, 256 / pixels));
    tokens = images * pixels;
    const int64_t most = all >= 1024 ? 128 : std::max<int64_t>(32, (all + 7) / 8);  // few tokens: a block per thread
    const int64_t blocks = (tokens + most - 1) / most;
    block = ((tokens + blocks - 1) / blocks + 7) / 8 * 8;
  }
};

// Rows in blocks big enough to reuse a packed panel: a whole number of rounds for the threads, or the units' blocks.
struct RowBlocks {
  int64_t rows, size, unit, per_unit, count;
  explicit RowBlocks(int64_t n) : rows(n), unit(std::max<int64_t>(1, n)) {
    const int64_t threads = std::max<int64_t>(1, torch::stable::get_num_threads());
    int64_t blocks = (n + 127) / 128;
    blocks = (blocks + threads - 1) / threads * threads;
    size = std::max<int64_t>(8, ((n + blocks - 1) / std::max<int64_t>(1, blocks) + 7) / 8 * 8);
    per_unit = (unit + size - 1) / size;
    count = (n + size - 1) / size;
  }
  RowBlocks(int64_t n, const Units& units) : rows(n), size(units.block), unit(units.tokens) {
    per_unit = (unit + size - 1) / size;
    count = n / unit * per_unit + (n % unit + size - 1) / size;
  }
  int64_t begin(int64_t i) const { return i / per_unit * unit + i % per_unit * size; }
  int64_t end(int64_t i) const { return std::min({rows, (i / per_unit + 1) * unit, begin(i) + size}); }
};

// f(block, row0, row1, scratch) for every block, on torch's threads, each with `scratch_bytes` of its own.
template <class F>
void for_blocks(const RowBlocks& blocks, int64_t scratch_bytes, const F& f) {
  parallel(blocks.count, [&](int64_t i) {
    const Buffer scratch(scratch_bytes);
    f(i, blocks.begin(i), blocks.end(i), scratch.data);
  });
}

// A vector of parameters as float.
std::vector<float> floats_of(const std::optional<Tensor>& t);
inline const float* data_or_null(const std::vector<float>& v) { return v.empty() ? nullptr : v.data(); }

// The depthwise kernels of all levels, (C, 1, *k), or (C, 2, *k) with a bias at the centre of [:, 1], repacked.
struct PackedLevels {
  std::vector<Level> levels;
  std::vector<const float*> weights, biases;  // a level without a bias: null
  int64_t sums = 0;                           // taps and biases of all levels
  int64_t count() const { return int64_t(levels.size()); }
  // `flipped`: taps in reverse order, which turns the convolution into its transpose
  PackedLevels(const Kernels& k, const std::vector<Tensor>& tensors, int64_t C, bool flipped = false);

 private:
  Buffer buffer_;
};

// Weights' panels from before this call (pack_weight), in the order of the op's products: null where there are none, or
// where they are not the weight's any more.
class KeptPanels {
 public:
  KeptPanels() = default;
  KeptPanels(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& kept);
  const void* operator[](size_t i) const { return panels_.empty() ? nullptr : panels_[i]; }
  bool up_to_date() const { return up_to_date_; }

 private:
  std::vector<const void*> panels_;
  bool up_to_date_ = true;
};

// w (N, K), or its transpose, packed for Kernels::linear_fwd and the like; or of w rows n0..n1 alone. `kept`: panels of
// all of w, which are taken where rows n0..n1 are panels of their own.
struct PackedMatrix {
  Packed packed{};
  PackedMatrix() = default;
  PackedMatrix(const Kernels& k, const Tensor& w, bool transpose = false);
  PackedMatrix(const Kernels& k, const Tensor& w, int64_t n0, int64_t n1, const void* kept);

 private:
  void pack(const Kernels& k, DType dtype, const void* first, int64_t stride_n, int64_t stride_k);
  Buffer buffer_;
};

// Runs all of focal_context's forward, or backward: p.g.B images.
void run_context_fwd(const Kernels& k, ContextForward p);
void run_context_bwd(const Kernels& k, const ContextBackward& p);

// A gradient computed as float (contiguous, the parameter's shape), in its parameter's dtype and strides.
Tensor like_parameter(const Kernels& k, const Tensor& parameter, const float* gradient);
// The depthwise weights' gradients from the partial sums of B images (ContextBackward::grad_weights); an empty tensor
// where not wanted.
std::vector<Tensor> focal_weight_gradients(const Kernels& k, const PackedLevels& levels,
                                           const std::vector<Tensor>& weights, const std::vector<char>& wanted,
                                           const float* partial_sums, int64_t B);

}  // namespace focalnet::cpu

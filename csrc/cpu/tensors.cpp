#include "cpu/tensors.h"

#include <cstdlib>

namespace focalnet::cpu {

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t LARGEST_KEPT = int64_t(64) << 20;  // bytes; a larger block goes back to the system at once
#if defined(__SANITIZE_ADDRESS__)
constexpr size_t MOST_KEPT = 0;  // blocks; none, so that every block has its true size and nothing stale
#else
constexpr size_t MOST_KEPT = 24;  // blocks
#endif

struct Block {
  char* memory;
  int64_t size;
};

// The running thread's returned blocks.
struct Pool {
  std::vector<Block> blocks;
  ~Pool() {
    for (Block& block : blocks) std::free(block.memory);
  }
};
Pool& pool() {
  static thread_local Pool of_this_thread;
  return of_this_thread;
}

}  // namespace

Buffer::Buffer(int64_t bytes) {
  if (bytes <= 0) return;
  std::vector<Block>& blocks = pool().blocks;
  size_t best = blocks.size();  // the smallest that is large enough and no waste
  for (size_t i = 0; i < blocks.size(); ++i)
    if (blocks[i].size >= bytes && blocks[i].size <= 4 * bytes + 4096 &&
        (best == blocks.size() || blocks[i].size < blocks[best].size))
      best = i;
  if (best < blocks.size()) {
    data = blocks[best].memory;
    size_ = blocks[best].size;
    blocks.erase(blocks.begin() + best);
    return;
  }
  size_ = (bytes + LINE - 1) / LINE * LINE;
  data = std::aligned_alloc(LINE, size_);
  STD_TORCH_CHECK(data != nullptr, "out of memory");
}

Buffer::~Buffer() {
  if (data == nullptr) return;
  std::vector<Block>& blocks = pool().blocks;
  if (size_ > LARGEST_KEPT) {
    std::free(data);
    return;
  }
  blocks.push_back({static_cast<char*>(data), size_});
  if (blocks.size() > MOST_KEPT) {  // the one that has waited longest
    std::free(blocks.front().memory);
    blocks.erase(blocks.begin());
  }
}

std::vector<float> floats_of(const std::optional<Tensor>& t) {
  if (!t || !t->defined()) return {};
  Tensor f = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
  const float* p = static_cast<const float*>(f.data_ptr());
  return {p, p + f.numel()};
}

PackedLevels::PackedLevels(const Kernels& k, const std::vector<Tensor>& tensors, int64_t C, bool flipped) {
  const int64_t channels = (C + k.lanes - 1) / k.lanes * k.lanes;
  for (const Tensor& w : tensors) {
    Axes axes(w.dim() - 2, 2);
    levels.push_back({size_or_1(w, axes.tmw[0]), size_or_1(w, axes.tmw[1]), size_or_1(w, axes.tmw[2])});
    taps += levels.back().taps();
  }
  const bool paired = !flipped && !tensors.empty() && k.pairs(dtype_of(tensors[0]));
  const int64_t forms = paired ? 2 : 1;
  buffer_ = Buffer(channels * taps * forms * 4);
  float* to = buffer_.floats();
  struct Task {
    const void* first;
    int64_t strides[4];
    float* to;
  };
  std::vector<Task> tasks;
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor& w = tensors[l];
    const Axes axes(w.dim() - 2, 2);
    const Level& level = levels[l];
    Task task{w.data_ptr(),
              {w.stride(0), stride_or_0(w, axes.tmw[0]), stride_or_0(w, axes.tmw[1]), stride_or_0(w, axes.tmw[2])},
              to};
    int64_t* strides = task.strides;
    if (flipped) {  // from the last tap backwards
      const int64_t last = (level.kt - 1) * strides[1] + (level.km - 1) * strides[2] + (level.kw - 1) * strides[3];
      task.first = at_element(task.first, last, dtype_of(w));
      for (int axis = 1; axis < 4; ++axis) strides[axis] = -strides[axis];
    }
    tasks.push_back(task);
    weights.push_back(to);
    to += channels * level.taps() * forms;
  }
  const int64_t blocks = channels / k.lanes;
  parallel(int64_t(tasks.size()) * blocks, [&](int64_t i) {
    const Task& task = tasks[i / blocks];
    k.pack_taps(dtype_of(tensors[0]), task.first, C, levels[i / blocks], task.strides, paired, i % blocks, task.to);
  });
}

PackedMatrix::PackedMatrix(const Kernels& k, const Tensor& w, bool transpose) {
  const int n = transpose ? 1 : 0;
  packed = {w.size(n), w.size(1 - n), nullptr};
  pack(k, dtype_of(w), w.data_ptr(), w.stride(n), w.stride(1 - n));
}

PackedMatrix::PackedMatrix(const Kernels& k, const Tensor& w, int64_t n0, int64_t n1) {
  packed = {n1 - n0, w.size(1), nullptr};
  pack(k, dtype_of(w), at_element(w.data_ptr(), n0 * w.stride(0), dtype_of(w)), w.stride(0), w.stride(1));
}

void PackedMatrix::pack(const Kernels& k, DType dtype, const void* first, int64_t stride_n, int64_t stride_k) {
  buffer_ = Buffer(k.packed_bytes(dtype, packed.N, packed.K));
  packed.panels = buffer_.data;
  constexpr int64_t columns = 48;  // a multiple of every instruction set's panel
  parallel((packed.N + columns - 1) / columns, [&](int64_t i) {
    k.pack_matrix(dtype, first, stride_n, stride_k, packed.N, packed.K, i * columns,
                  std::min(packed.N, (i + 1) * columns), buffer_.data);
  });
}

Tensor like_parameter(const Kernels& k, const Tensor& parameter, const float* gradient) {
  Tensor out = torch::stable::empty_like(parameter);
  const int64_t rows = parameter.size(0), columns = rows ? parameter.numel() / rows : 0;
  const DType dtype = dtype_of(parameter);
  if (parameter.dim() <= 2) {
    const int64_t stride = parameter.dim() == 2 ? out.stride(1) : 1;
    parallel(rows, [&](int64_t row) {
      k.convert(dtype, gradient + row * columns, columns, at_element(out.data_ptr(), row * out.stride(0), dtype),
                stride);
    });
    return out;
  }
  const Axes axes(parameter.dim() - 2, 2);
  const int64_t nm = size_or_1(out, axes.tmw[1]), nw = size_or_1(out, axes.tmw[2]);
  parallel(rows, [&](int64_t row) {
    for (int64_t i = 0; i < columns / nw; ++i) {
      const int64_t at =
          row * out.stride(0) + i / nm * stride_or_0(out, axes.tmw[0]) + i % nm * stride_or_0(out, axes.tmw[1]);
      k.convert(dtype, gradient + row * columns + i * nw, nw, at_element(out.data_ptr(), at, dtype),
                stride_or_0(out, axes.tmw[2]));
    }
  });
  return out;
}

std::vector<Tensor> focal_weight_gradients(const Kernels& k, const PackedLevels& levels,
                                           const std::vector<Tensor>& weights, const float* shares, int64_t B,
                                           int64_t needed) {
  std::vector<Tensor> gradients;
  int64_t first = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    const int64_t C = weights[l].size(0), taps = levels.levels[l].taps(), blocks = (C + k.lanes - 1) / k.lanes;
    if (!(needed >> l & 1)) {
      gradients.push_back(torch::stable::new_empty(weights[l], {0}));
    } else {
      const Buffer sums(C * taps * 4);
      float* out = sums.floats();
      parallel(C, [&](int64_t c) {
        for (int64_t tap = 0; tap < taps; ++tap) {
          const float* share = shares + (c / k.lanes * levels.taps + first + tap) * k.lanes + c % k.lanes;
          double total = 0;
          for (int64_t b = 0; b < B; ++b) total += share[b * blocks * levels.taps * k.lanes];
          out[c * taps + tap] = float(total);
        }
      });
      gradients.push_back(like_parameter(k, weights[l], out));
    }
    first += taps;
  }
  return gradients;
}

}  // namespace focalnet::cpu

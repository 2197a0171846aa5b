#include "cpu/tensors.h"

#include <sys/mman.h>

#include <cstdlib>
#include <cstring>
#include <mutex>

namespace focalnet::cpu {

namespace {

constexpr int64_t LINE = 64;
constexpr int64_t LARGEST_KEPT = int64_t(64) << 20;  // bytes; a larger block goes back to the system at once
constexpr int64_t LARGEST_OF_THREAD = int64_t(1) << 20;

#if defined(__SANITIZE_ADDRESS__)
constexpr int64_t MOST = 0;  // nothing is kept, so that every block has its true size and nothing stale
constexpr bool MAPS = false;
#else
constexpr int64_t MOST = 1;
constexpr bool MAPS = true;
#endif

struct Block {
  char* memory = nullptr;
  int64_t size = 0;
};

// Large blocks come from the system itself: malloc would keep what is freed for the thread that asked for it.
void* allocate(int64_t size) {
  if (!MAPS || size <= LARGEST_OF_THREAD) return std::aligned_alloc(LINE, size);
  void* memory = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  return memory == MAP_FAILED ? nullptr : memory;
}
void release(const Block& block) {
  if (!MAPS || block.size <= LARGEST_OF_THREAD)
    std::free(block.memory);
  else
    munmap(block.memory, block.size);
}

// Returned blocks: at most so many, and so many bytes.
class Pool {
 public:
  Pool(size_t most_blocks, int64_t most_bytes) : most_blocks_(most_blocks), most_bytes_(most_bytes) {}
  ~Pool() {
    for (const Block& block : blocks_) release(block);
  }
  // The smallest block that is large enough but not far too large; an empty one if there is none.
  Block take(int64_t bytes) {
    size_t best = blocks_.size();
    for (size_t i = 0; i < blocks_.size(); ++i)
      if (blocks_[i].size >= bytes && blocks_[i].size <= 4 * bytes + 4096 &&
          (best == blocks_.size() || blocks_[i].size < blocks_[best].size))
        best = i;
    if (best == blocks_.size()) return {};
    const Block found = blocks_[best];
    blocks_.erase(blocks_.begin() + best);
    bytes_ -= found.size;
    return found;
  }
  void give(const Block& block) {
    blocks_.push_back(block);
    bytes_ += block.size;
    size_t first = 0;  // the oldest go
    for (; blocks_.size() - first > most_blocks_ || bytes_ > most_bytes_; ++first) {
      release(blocks_[first]);
      bytes_ -= blocks_[first].size;
    }
    blocks_.erase(blocks_.begin(), blocks_.begin() + first);
  }

 private:
  size_t most_blocks_;
  int64_t most_bytes_, bytes_ = 0;
  std::vector<Block> blocks_;
};

// Small blocks stay with the thread that returned them. Large ones are shared by all threads, so that an idle thread
// keeps none of them. No thread waits for the shared pool: one that finds it locked does without.
Pool& pool_of_thread() {
  static thread_local Pool pool(24, MOST * (int64_t(4) << 20));
  return pool;
}
struct Shared {
  std::mutex mutex;
  Pool pool{96, MOST * (int64_t(96) << 20)};
};
Shared& shared() {
  static Shared& of_process = *new Shared;  // never destroyed: a thread may return a block while the process ends
  return of_process;
}

Block take(int64_t bytes) {
  if (bytes <= LARGEST_OF_THREAD) return pool_of_thread().take(bytes);
  const std::unique_lock<std::mutex> lock(shared().mutex, std::try_to_lock);
  return lock ? shared().pool.take(bytes) : Block{};
}

void give(const Block& block) {
  if (block.size <= LARGEST_OF_THREAD) return pool_of_thread().give(block);
  if (block.size <= LARGEST_KEPT) {
    const std::unique_lock<std::mutex> lock(shared().mutex, std::try_to_lock);
    if (lock) return shared().pool.give(block);
  }
  release(block);
}

}  // namespace

Buffer::Buffer(int64_t bytes) {
  if (bytes <= 0) return;
  bytes = (bytes + LINE - 1) / LINE * LINE;
  const Block kept = take(bytes);
  data = kept.memory;
  size_ = kept.size;
  if (data != nullptr) return;
  size_ = bytes;
  data = allocate(size_);
  STD_TORCH_CHECK(data != nullptr, "out of memory: no ", bytes, " bytes for what a kernel works in");
}

Buffer::~Buffer() {
  if (data != nullptr) give({static_cast<char*>(data), size_});
}

std::vector<float> floats_of(const std::optional<Tensor>& t) {
  if (!t || !t->defined()) return {};
  if (t->scalar_type() == ScalarType::Float) {  // two calls of torch's take longer than a small layer's product
    const float* from = static_cast<const float*>(t->const_data_ptr());
    std::vector<float> values(size_t(t->numel()));
    for (size_t i = 0; i < values.size(); ++i) values[i] = from[int64_t(i) * t->stride(0)];
    return values;
  }
  Tensor f = torch::stable::contiguous(torch::stable::to(*t, ScalarType::Float));
  const float* p = static_cast<const float*>(f.const_data_ptr());
  return {p, p + f.numel()};
}

PackedLevels::PackedLevels(const Kernels& k, const std::vector<Tensor>& tensors, int64_t C, bool flipped) {
  const int64_t blocks = k.channel_blocks(C), channels = blocks * k.lanes;
  for (const Tensor& w : tensors) {
    Axes axes(w.dim() - 2, 2);
    levels.push_back({size_or_1(w, axes.tmw[0]), size_or_1(w, axes.tmw[1]), size_or_1(w, axes.tmw[2])});
    sums += levels.back().taps() + (w.size(1) == 2);
  }
  const bool paired = !flipped && !tensors.empty() && k.pairs(dtype_of(tensors[0]));
  const int64_t forms = paired ? 2 : 1;
  buffer_ = Buffer(channels * sums * forms * 4);
  float* to = buffer_.floats();
  struct Task {
    const void* first;
    int64_t strides[4];
    float* to;
    Level level;
    bool paired;
  };
  std::vector<Task> tasks;
  for (size_t l = 0; l < tensors.size(); ++l) {
    const Tensor& w = tensors[l];
    const Axes axes(w.dim() - 2, 2);
    const Level& level = levels[l];
    Task task{w.const_data_ptr(),
              {w.stride(0), stride_or_0(w, axes.tmw[0]), stride_or_0(w, axes.tmw[1]), stride_or_0(w, axes.tmw[2])},
              to,
              level,
              paired};
    const int64_t* const of_w = task.strides;
    const int64_t centre = w.stride(1) + level.rt() * of_w[1] + level.rm() * of_w[2] + level.rw() * of_w[3];
    const Task bias{at_element(task.first, centre, dtype_of(w)), {of_w[0], 0, 0, 0}, nullptr, Level{}, false};
    int64_t* strides = task.strides;
    if (flipped) {  // from the last tap backwards
      const int64_t last = (level.kt - 1) * strides[1] + (level.km - 1) * strides[2] + (level.kw - 1) * strides[3];
      task.first = at_element(task.first, last, dtype_of(w));
      for (int axis = 1; axis < 4; ++axis) strides[axis] = -strides[axis];
    }
    tasks.push_back(task);
    weights.push_back(to);
    to += channels * level.taps() * forms;
    biases.push_back(nullptr);
    if (w.size(1) == 2 && !flipped) {
      tasks.push_back(bias);
      tasks.back().to = to;
      biases.back() = to;
      to += channels;
    }
  }
  parallel(int64_t(tasks.size()) * blocks, [&](int64_t i) {
    const Task& task = tasks[i / blocks];
    k.pack_taps(dtype_of(tensors[0]), task.first, C, task.level, task.strides, task.paired, i % blocks, task.to);
  });
}

namespace {

constexpr int64_t WHOLE_PANELS = 48;  // columns: a multiple of every instruction set's panel

void pack_panels(const Kernels& k, DType dtype, const void* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K,
                 void* panels) {
  parallel((N + WHOLE_PANELS - 1) / WHOLE_PANELS, [&](int64_t i) {
    k.pack_matrix(dtype, w, stride_n, stride_k, N, K, i * WHOLE_PANELS, std::min(N, (i + 1) * WHOLE_PANELS), panels);
  });
}

}  // namespace

PackedMatrix::PackedMatrix(const Kernels& k, const Tensor& w, bool transpose) {
  const int n = transpose ? 1 : 0;
  packed = {w.size(n), w.size(1 - n), nullptr};
  pack(k, dtype_of(w), w.const_data_ptr(), w.stride(n), w.stride(1 - n));
}

PackedMatrix::PackedMatrix(const Kernels& k, const Tensor& w, int64_t n0, int64_t n1, const void* kept) {
  packed = {n1 - n0, w.size(1), nullptr};
  if (kept && n0 % WHOLE_PANELS == 0 && (n1 == w.size(0) || n1 % WHOLE_PANELS == 0))
    packed.panels = static_cast<const char*>(kept) + k.packed_bytes(dtype_of(w), n0, w.size(1));
  else
    pack(k, dtype_of(w), at_element(w.const_data_ptr(), n0 * w.stride(0), dtype_of(w)), w.stride(0), w.stride(1));
}

void PackedMatrix::pack(const Kernels& k, DType dtype, const void* first, int64_t stride_n, int64_t stride_k) {
  buffer_ = Buffer(k.packed_bytes(dtype, packed.N, packed.K));
  packed.panels = buffer_.data;
  pack_panels(k, dtype, first, stride_n, stride_k, packed.N, packed.K, buffer_.data);
}

// The panels, and after them whose they are: another instruction set's differ.
Tensor pack_weight(Tensor weight) {
  const Kernels* const k = &kernels();
  const DType dtype = dtype_of(weight);
  const int64_t N = weight.size(0), K = weight.size(1), bytes = k->packed_bytes(dtype, N, K);
  const Tensor packed = torch::stable::new_empty(weight, {bytes + int64_t(sizeof k)}, ScalarType::Byte);
  char* const panels = static_cast<char*>(packed.mutable_data_ptr());
  pack_panels(*k, dtype, weight.const_data_ptr(), weight.stride(0), weight.stride(1), N, K, panels);
  std::memcpy(panels + bytes, &k, sizeof k);
  return packed;
}

KeptPanels::KeptPanels(const std::vector<Tensor>& weights, const std::vector<std::optional<Tensor>>& kept) {
  const Kernels* const k = &kernels();
  STD_TORCH_CHECK(weights.size() == kept.size(), "packed: expected one for each of ", weights.size(), " products");
  for (size_t i = 0; i < weights.size(); ++i) {
    panels_.push_back(nullptr);
    if (!kept[i]) continue;
    const Tensor& w = weights[i];
    const DType dtype = dtype_of(w);
    const int64_t N = w.size(0), K = w.size(1), bytes = k->packed_bytes(dtype, N, K);
    const char* const panels = static_cast<const char*>(kept[i]->const_data_ptr());
    if (kept[i]->numel() == bytes + int64_t(sizeof k) && std::memcmp(panels + bytes, &k, sizeof k) == 0 &&
        k->panels_hold(dtype, panels, w.const_data_ptr(), w.stride(0), w.stride(1), N, K))
      panels_.back() = panels;
    else
      up_to_date_ = false;
  }
}

Tensor like_parameter(const Kernels& k, const Tensor& parameter, const float* gradient) {
  Tensor out = torch::stable::empty_like(parameter);
  const int64_t rows = parameter.size(0), columns = rows ? parameter.numel() / rows : 0;
  const DType dtype = dtype_of(parameter);
  if (parameter.dim() <= 2 || parameter.size(1) == columns) {  // a vector, a matrix, a 1x1 convolution's weight
    const int64_t stride = parameter.dim() >= 2 ? out.stride(1) : 1;
    parallel(rows, [&](int64_t row) {
      k.convert(dtype, gradient + row * columns, columns,
                at_element(out.mutable_data_ptr(), row * out.stride(0), dtype), stride);
    });
    return out;
  }
  const Axes axes(parameter.dim() - 2, 2);
  const int64_t nt = size_or_1(out, axes.tmw[0]), nm = size_or_1(out, axes.tmw[1]), nw = size_or_1(out, axes.tmw[2]);
  parallel(rows, [&](int64_t row) {
    for (int64_t i = 0; i < columns / nw; ++i) {
      const int64_t at = row * out.stride(0) + i / (nt * nm) * out.stride(1) +
                         i / nm % nt * stride_or_0(out, axes.tmw[0]) + i % nm * stride_or_0(out, axes.tmw[1]);
      k.convert(dtype, gradient + row * columns + i * nw, nw, at_element(out.mutable_data_ptr(), at, dtype),
                stride_or_0(out, axes.tmw[2]));
    }
  });
  return out;
}

std::vector<Tensor> focal_weight_gradients(const Kernels& k, const PackedLevels& levels,
                                           const std::vector<Tensor>& weights, const std::vector<char>& wanted,
                                           const float* partial_sums, int64_t B) {
  std::vector<Tensor> gradients;
  int64_t first = 0;
  for (size_t l = 0; l < weights.size(); ++l) {
    const int64_t C = weights[l].size(0), taps = levels.levels[l].taps(), blocks = k.channel_blocks(C);
    const bool bias = levels.biases[l] != nullptr;
    const int64_t columns = weights[l].size(1) * taps;
    if (!wanted[l]) {
      gradients.push_back(torch::stable::new_empty(weights[l], {0}));
    } else {
      const Buffer sums(C * columns * 4);
      float* out = sums.floats();
      parallel(C, [&](int64_t c) {
        std::fill(out + c * columns + taps, out + (c + 1) * columns, 0.0f);
        for (int64_t i = 0; i < taps + bias; ++i) {
          const float* partial = partial_sums + (c / k.lanes * levels.sums + first + i) * k.lanes + c % k.lanes;
          double total = 0;
          for (int64_t b = 0; b < B; ++b) total += partial[b * blocks * levels.sums * k.lanes];
          out[c * columns + (i < taps ? i : taps + taps / 2)] = float(total);
        }
      });
      gradients.push_back(like_parameter(k, weights[l], out));
    }
    first += taps + bias;
  }
  return gradients;
}

}  // namespace focalnet::cpu

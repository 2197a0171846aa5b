// What backwards have in common: sums of partial sums, and the gradients of matrices.
#pragma once

#include "cpu/tensors.h"

namespace focalnet::cpu {

// total[i] += the sum over blocks of partial[block * n + i], in double: there may be thousands, of one sign
inline void add_partial_sums(const float* partial, int64_t blocks, int64_t n, double* total) {
  for (int64_t block = 0; block < blocks; ++block)
    for (int64_t i = 0; i < n; ++i) total[i] += partial[block * n + i];
}

// What a group of tokens adds to the gradients of some matrices: tasks of some rows of one of them, each over all
// tokens.
class WeightGradients {
 public:
  // rows_of_all: of all matrices' gradients; add: to what earlier groups gave
  WeightGradients(const Kernels& k, DType dtype, int64_t rows_of_all, int64_t unit, bool add)
      : k_(k), dtype_(dtype), columns_(columns_of_task(rows_of_all)), unit_(unit), add_(add) {}

  // out (N, K) float: the sum over tokens of grad[n] * in[k]
  void of(int64_t N, int64_t K, const Rows& grad, const Rows& in, const Buffer& out) {
    const WeightGradient gradient{dtype_, N, K, grad, in, out.floats(), add_, unit_};
    for (int64_t n = 0; n < N; n += columns_) tasks_.push_back({gradient, n, std::min(N, n + columns_)});
  }
  void run(int64_t tokens) const {
    parallel(int64_t(tasks_.size()), [&](int64_t i) {
      const Task& task = tasks_[i];
      const Buffer scratch(k_.weight_gradient_scratch(task.gradient, columns_));
      k_.weight_gradient(task.gradient, task.n0, task.n1, 0, tokens, scratch.data);
    });
  }

 private:
  struct Task {
    WeightGradient gradient;
    int64_t n0, n1;
  };
  // A few tasks per thread, for each packs the tokens anew.
  static int64_t columns_of_task(int64_t rows_of_all) {
    const int64_t tasks = 8 * torch::stable::get_num_threads();
    return std::clamp<int64_t>((rows_of_all / tasks + 47) / 48 * 48, 48, 384);
  }

  const Kernels& k_;
  const DType dtype_;
  const int64_t columns_, unit_;
  const bool add_;
  std::vector<Task> tasks_;
};

}  // namespace focalnet::cpu

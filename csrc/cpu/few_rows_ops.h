// Products of few rows on torch's threads: see FewRowsProduct.
#pragma once

#include "cpu/residual.h"

namespace focalnet::cpu {

// Whether rows of C channels are few: packing the weights as a whole would take too large a part, and there is a task
// of columns for every thread that could have rows. The numbers are the same either way, bit for bit.
inline bool few_rows(int64_t rows, int64_t C) {
  constexpr int64_t MOST = 512;
  return rows <= MOST && (C + 47) / 48 >= std::min<int64_t>(torch::stable::get_num_threads(), (rows + 7) / 8);
}

class FewRows {
 public:
  FewRows(const Kernels& k, DType dtype, int64_t rows) : k_(k), dtype_(dtype), rows_(rows) {}

  // The operand form of rows of K channels, or of their pre-norm.
  Buffer operand(const Rows& x, const Residual& residual, int64_t K) const {
    Buffer memory(k_.operand_bytes(dtype_, rows_, K));
    each_rows([&](int64_t row0, int64_t row1) {
      const Buffer scratch((row1 - row0) * int64_t(sizeof(void*)) + 64);
      k_.few_rows_operand(dtype_, x, residual, K, row0, row1, memory.data, scratch.data);
    });
    return memory;
  }
  // By `weight` (N, K), or by its kept panels. What it is followed by is for the caller to fill in, and to run.
  FewRowsProduct product(const Buffer& operand, const Tensor& weight, const void* panels,
                         const std::vector<float>& bias, FewRowsProduct::Then then) const {
    FewRowsProduct p{};
    p.dtype = dtype_;
    p.rows = rows_;
    p.operand = operand.data;
    p.weight = weight.const_data_ptr();
    p.N = weight.size(0), p.K = weight.size(1), p.stride_n = weight.stride(0), p.stride_k = weight.stride(1);
    p.panels = panels;
    p.bias = data_or_null(bias);
    p.then = then;
    return p;
  }
  void run(FewRowsProduct p) const {
    constexpr int64_t columns = 48;  // a multiple of every instruction set's panel
    p.ahead = columns * std::max<int64_t>(1, torch::stable::get_num_threads());
    parallel((p.N + columns - 1) / columns, [&](int64_t i) {
      const Buffer scratch(k_.few_rows_scratch(p, rows_));
      k_.few_rows_product(p, i * columns, std::min(p.N, (i + 1) * columns), scratch.data);
    });
  }
  // With the last norm, where there is one.
  void run_residual(FewRowsProduct p) const {
    const Buffer u(p.residual.post_norm() ? rows_ * p.N * 4 : 0);
    p.u = u.floats();
    run(p);
    if (!u.data) return;
    each_rows([&](int64_t row0, int64_t row1) {
      const Buffer scratch(k_.few_rows_scratch(p, row1 - row0));
      k_.few_rows_post_norm(p, row0, row1, scratch.data);
    });
  }
  void norm(const Buffer& operand, int64_t K, const float* weight, const float* bias, float eps) const {
    each_rows(
        [&](int64_t row0, int64_t row1) { k_.few_rows_norm(dtype_, operand.data, K, row0, row1, weight, bias, eps); });
  }

 private:
  template <class F>
  void each_rows(const F& f) const {
    const RowBlocks blocks(rows_);
    parallel(blocks.count, [&](int64_t i) { f(blocks.begin(i), blocks.end(i)); });
  }

  const Kernels& k_;
  const DType dtype_;
  const int64_t rows_;
};

}  // namespace focalnet::cpu

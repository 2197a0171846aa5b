// A focal modulation layer's inputs by name, in the one order that everything has them in:
// x, f_weight, f_bias, focal_weights, h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias.
#pragma once

#include "common/tensors.h"

namespace focalnet {

// One T for each input.
template <class T>
struct LayerInputs {
  T x, f_weight, f_bias;
  std::vector<T> focal_weights;
  T h_weight, h_bias, proj_weight, proj_bias, ln_weight, ln_bias;

  // f(value) for each, in order
  template <class F>
  void each(F f) {
    f(x), f(f_weight), f(f_bias);
    for (T& weight : focal_weights) f(weight);
    f(h_weight), f(h_bias), f(proj_weight), f(proj_bias), f(ln_weight), f(ln_bias);
  }
};

// LayerParameters of ops/focal_modulation/parameters.py.
struct LayerParameters {
  Tensor f_weight;
  std::optional<Tensor> f_bias;
  std::vector<Tensor> focal_weights;
  Tensor h_weight;
  std::optional<Tensor> h_bias;
  Tensor proj_weight;
  std::optional<Tensor> proj_bias, ln_weight, ln_bias;

  explicit LayerParameters(const std::vector<std::optional<Tensor>>& list) {
    STD_TORCH_CHECK(list.size() >= 8, "parameters: expected 8 and a weight per focal level");
    const size_t L = list.size() - 8;
    const std::optional<Tensor>* next = list.data();
    f_weight = next++->value();
    f_bias = *next++;
    for (size_t l = 0; l < L; ++l) focal_weights.push_back(next++->value());
    h_weight = next++->value();
    h_bias = *next++;
    proj_weight = next++->value();
    proj_bias = *next++;
    ln_weight = *next++;
    ln_bias = *next++;
  }
  int64_t levels() const { return int64_t(focal_weights.size()); }
};

// Which gradients are asked for: bit i of `needed` for input i.
struct LayerNeeds : LayerInputs<char> {  // not bool: a vector of those has no references
  LayerNeeds(int64_t needed, int64_t levels) {
    focal_weights.resize(size_t(levels));
    each([&](char& one) { one = needed & 1, needed >>= 1; });
  }
  bool any_level() const {
    for (char one : focal_weights)
      if (one) return true;
    return false;
  }
  bool projected() const { return x || f_weight || f_bias; }
};

// The gradients; an empty tensor where none was asked for.
struct LayerGradients : LayerInputs<Tensor> {
  LayerGradients(const Tensor& like, int64_t levels) {
    focal_weights.resize(size_t(levels), like);
    each([&](Tensor& one) { one = torch::stable::new_empty(like, {0}); });
  }
  std::vector<Tensor> list() {
    std::vector<Tensor> all;
    each([&](Tensor& one) { all.push_back(one); });
    return all;
  }
};

}  // namespace focalnet

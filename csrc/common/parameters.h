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
  T norm_weight, norm_bias, gamma, drop_path;  // of a residual branch around it: the last four

  // f(value) for each, in order
  template <class F>
  void each(bool residual, F f) {
    f(x), f(f_weight), f(f_bias);
    for (T& weight : focal_weights) f(weight);
    f(h_weight), f(h_bias), f(proj_weight), f(proj_bias), f(ln_weight), f(ln_bias);
    if (residual) f(norm_weight), f(norm_bias), f(gamma), f(drop_path);
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

  // The first of the list; `others` follow.
  explicit LayerParameters(const std::vector<std::optional<Tensor>>& list, size_t others = 0) {
    STD_TORCH_CHECK(list.size() >= 8 + others, "parameters: expected 8 and a weight per focal level");
    const size_t L = list.size() - 8 - others;
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
  LayerNeeds(int64_t needed, int64_t levels, bool residual = false) : LayerInputs<char>{} {
    focal_weights.resize(size_t(levels));
    each(residual, [&](char& one) { one = needed & 1, needed >>= 1; });
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
  LayerGradients(const Tensor& like, int64_t levels, bool residual = false) : residual_(residual) {
    focal_weights.resize(size_t(levels), like);
    each(true, [&](Tensor& one) { one = torch::stable::new_empty(like, {0}); });
  }
  std::vector<Tensor> list() {
    std::vector<Tensor> all;
    each(residual_, [&](Tensor& one) { all.push_back(one); });
    return all;
  }

 private:
  bool residual_;
};

// What a residual branch has around its body, the last of its parameters: Residual of ops/residual.py.
struct ResidualParameters {
  std::optional<Tensor> norm_weight, norm_bias, gamma, drop_path;
  static constexpr size_t COUNT = 4;

  explicit ResidualParameters(const std::optional<Tensor>* list)
      : norm_weight(list[0]), norm_bias(list[1]), gamma(list[2]), drop_path(list[3]) {}
};

// FocalBranchParameters of ops/focal_branch/parameters.py.
struct FocalBranchParameters {
  LayerParameters layer;
  ResidualParameters residual;

  explicit FocalBranchParameters(const std::vector<std::optional<Tensor>>& list)
      : layer(list, ResidualParameters::COUNT), residual(list.data() + list.size() - ResidualParameters::COUNT) {}
};

// MlpBranchParameters of ops/mlp_branch/parameters.py.
struct MlpBranchParameters {
  Tensor fc1_weight;
  std::optional<Tensor> fc1_bias;
  Tensor fc2_weight;
  std::optional<Tensor> fc2_bias;
  ResidualParameters residual;

  explicit MlpBranchParameters(const std::vector<std::optional<Tensor>>& list)
      : fc1_weight(list.at(0).value()),
        fc1_bias(list.at(1)),
        fc2_weight(list.at(2).value()),
        fc2_bias(list.at(3)),
        residual(list.data() + 4) {
    STD_TORCH_CHECK(list.size() == 4 + ResidualParameters::COUNT, "parameters: expected 8");
  }
};

// One T for each input of an MLP branch, in order; drop_path has no gradient.
template <class T>
struct MlpBranchInputs {
  T x, fc1_weight, fc1_bias, fc2_weight, fc2_bias, norm_weight, norm_bias, gamma, drop_path;

  template <class F>
  void each(F f) {
    for (T* one : {&x, &fc1_weight, &fc1_bias, &fc2_weight, &fc2_bias, &norm_weight, &norm_bias, &gamma, &drop_path})
      f(*one);
  }
};

}  // namespace focalnet

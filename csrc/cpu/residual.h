// What a residual branch has around its body, as the kernels take it.
#pragma once

#include "common/parameters.h"
#include "cpu/tensors.h"

namespace focalnet::cpu {

class ResidualFloats {
 public:
  ResidualFloats() = default;  // no residual: the body alone
  // wide: x is float around a body of 16 bits
  ResidualFloats(const ResidualParameters& p, double norm_eps, bool post, bool wide = false)
      : add_(true),
        wide_(wide),
        norm_weight_(floats_of(p.norm_weight)),
        norm_bias_(floats_of(p.norm_bias)),
        gamma_(floats_of(p.gamma)),
        drop_path_(floats_of(p.drop_path)),
        norm_eps_(float(norm_eps)),
        post_(post) {}
  // A norm after a body to which nothing is added, or no norm.
  static ResidualFloats last_norm(const std::optional<Tensor>& weight, const std::optional<Tensor>& bias, double eps) {
    const std::optional<Tensor> list[] = {weight, bias, std::nullopt, std::nullopt};
    ResidualFloats found(ResidualParameters(list), eps, true);
    found.add_ = false;
    return found;
  }
  // For as long as this object lives; images count from `first` on.
  Residual values(int64_t first = 0) const {
    const float* drop_path = drop_path_.empty() ? nullptr : drop_path_.data() + first;
    return {add_,      wide_, data_or_null(norm_weight_), data_or_null(norm_bias_),
            norm_eps_, post_, data_or_null(gamma_),       drop_path};
  }

 private:
  bool add_ = false, wide_ = false;
  std::vector<float> norm_weight_, norm_bias_, gamma_, drop_path_;
  float norm_eps_ = 0;
  bool post_ = false;
};

// Dense rows of `width` channels.
inline Rows dense_rows(void* data, int64_t rows, int64_t width) {
  return {data, std::max<int64_t>(1, rows), rows * width, 1, 0, 0, width, 1, std::max<int64_t>(1, rows)};
}

}  // namespace focalnet::cpu

// What the whole layer's forward and backward have in common: both take the images a group at a time, so that what
// flows between the layer's parts stays in cache.
#pragma once

#include "cpu/residual.h"

namespace focalnet::cpu {

// Images per group: enough rows to feed the matrix products and the threads, few enough to stay in cache.
int64_t images_per_group(const Geometry& g, const Kernels& k);

// Images first..first + g.B of a call.
struct ImageGroup {
  Geometry g;
  DType dtype;
  int64_t first;

  ImageGroup(const Geometry& all, DType dtype, int64_t first, int64_t end) : g(all), dtype(dtype), first(first) {
    g.B = end - first;
  }
  int64_t tokens() const { return g.B * g.pixels(); }
  // The group's rows of a tensor (B, *spatial, channels).
  Rows rows(const Tensor& t) const {
    MapView v = map_of(t, 1, t.dim() - 1);
    v.data = at_element(v.data, first * v.b, dtype_of(t));
    return rows_of(v, g);
  }
  // Where the group's rows begin in a dense tensor (tokens of all images, channels).
  void* part(const Tensor& t) const { return at_element(t.const_data_ptr(), first * g.pixels() * t.size(1), dtype); }
  // The channels of a dense buffer (the group's tokens, width) from `channel` on.
  MapView map(void* data, int64_t width, int64_t channel = 0) const {
    return {at_element(data, channel, dtype), g.pixels() * width, 1, g.M * g.W * width, g.W * width, width};
  }
  Rows rows(void* data, int64_t width) const { return rows_of(map(data, width), g); }
};

}  // namespace focalnet::cpu

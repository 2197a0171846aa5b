// Plain descriptions of the work: no torch, no instruction set. Shared by every backend.
#pragma once

#include <cstdint>

namespace focalnet {

enum class DType : int { f32, bf16, f16 };

// A map of B images, C channels and up to three spatial axes, wherever its elements lie.
// Axes are named by how kernels walk them: T is streamed, W is the innermost row, M lies between.
//   1-D: (T, M, W) = (1, 1, N)     2-D: (H, 1, W)     3-D: (D, H, W)
// Strides count elements and may be 0 (expanded) or negative.
struct MapView {
  void* data = nullptr;
  int64_t b = 0, c = 0, t = 0, m = 0, w = 0;
};

struct Geometry {
  int64_t B = 0, C = 0, T = 1, M = 1, W = 1;
  constexpr int64_t pixels() const { return T * M * W; }
};

// The size of one focal level's depthwise kernel along (T, M, W), all odd.
struct Level {
  int64_t kt = 1, km = 1, kw = 1;
  constexpr int64_t rt() const { return kt / 2; }
  constexpr int64_t rm() const { return km / 2; }
  constexpr int64_t rw() const { return kw / 2; }
  constexpr int64_t taps() const { return kt * km * kw; }
};

}  // namespace focalnet

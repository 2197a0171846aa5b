// What one instruction set offers: tasks that a thread runs to the end. The ops (focal_context.cpp, ...) cut
// the work into tasks, own the memory and run the tasks on torch's thread pool; nothing below knows torch.
#pragma once

#include "common/geometry.h"

namespace focalnet::cpu {

// focal_context, forward: one image and one block of channels at a time.
struct ContextForward {
  Geometry g;
  DType dtype;
  int64_t L;
  const Level* levels;
  const float* const* weights;  // per level, see Kernels::pack_taps
  MapView ctx, gates, out;      // gates: axis c is the level, L+1 of them
  bool normalize;
  float* mean;  // (B, C): mean of the last level over all pixels, or null
};

// A matrix packed for `rows_*` below: out[m, n] = sum_k a[m, k] * w[n, k].
struct Packed {
  int64_t N, K;
  const void* panels;  // Kernels::pack_matrix
};

// Rows of tokens in memory: element (row, channel) at data + row * stride + channel * channel_stride, where
// a row index counts (image, pixel) and images may lie apart.
struct Rows {
  void* data = nullptr;
  int64_t pixels = 1;  // rows per image
  int64_t image = 0, channel = 1;
  int64_t t = 0, m = 0, w = 0;  // strides of the pixel axes
  int64_t M = 1, W = 1;
};

struct LinearForward {
  DType dtype;
  Packed weight;
  const float* bias;  // N, or null
  Rows in, out;
};

struct ModulateForward {
  DType dtype;
  Packed weight;      // h
  const float* bias;  // h's, or null
  Rows ctx_all, q, out;
  Rows modulator;  // written when data is not null
  // the rest of the layer, when proj.panels is not null: out = proj(LN?(q * modulator))
  Packed proj;
  const float* proj_bias;
  const float *ln_weight, *ln_bias;  // null: no LayerNorm
  float ln_eps;
};

struct Kernels {
  const char* name;
  int lanes;

  // Depthwise weights (C, 1, *k), any strides, to float [channel block][tap][lane]; `lanes` x ceil(C / lanes)
  // channels.
  void (*pack_taps)(DType, const void* w, int64_t C, const Level&, const int64_t strides[4], float* packed);

  int64_t (*context_fwd_scratch)(const ContextForward&);  // floats, for one task
  // Levels of rows t0..t1 into `plane` (float, pixels x lanes) and the sum of the last level into `sum`
  // (lanes).
  void (*context_fwd_levels)(const ContextForward&, int64_t b, int64_t block, int64_t t0, int64_t t1, float* plane,
                             float* sum, float* scratch);
  // Adds the global context to rows t0..t1 of `plane` and writes them out. `sum`: over the whole map.
  void (*context_fwd_finish)(const ContextForward&, int64_t b, int64_t block, int64_t t0, int64_t t1,
                             const float* plane, const float* sum);

  int64_t (*packed_bytes)(DType, int64_t N, int64_t K);
  // Rows n0..n1 of w (N, K), any strides; n0 a multiple of 48.
  void (*pack_matrix)(DType, const void* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, int64_t n0,
                      int64_t n1, void* panels);
  int64_t (*linear_scratch)(const LinearForward&, int64_t rows);  // bytes
  void (*linear_fwd)(const LinearForward&, int64_t row0, int64_t row1, void* scratch);
  int64_t (*modulate_scratch)(const ModulateForward&, int64_t rows);  // bytes
  void (*modulate_fwd)(const ModulateForward&, int64_t row0, int64_t row1, void* scratch);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

// The best set that this machine has, or the one that FOCALNET_KERNELS_CPU_ISA names (an unknown or missing
// one throws std::runtime_error).
const Kernels& kernels();

}  // namespace focalnet::cpu

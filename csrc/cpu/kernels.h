// What one instruction set offers: tasks that a thread runs to the end. The ops (focal_context.cpp, ...) cut
// the work into tasks, own the memory and run the tasks on torch's thread pool; nothing below knows torch.
//
// Sizes of memory are in bytes everywhere.
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
  const float* const* biases;   // per level [channel block][lane], or null; null: no level has one
  MapView ctx, gates, out;      // gates: axis c is the level, L+1 of them
  bool normalize;
  float* mean;         // (B, C): mean of the last level over all pixels, or null
  int64_t summed = 1;  // rows (along T) of the last level in one of the sums behind the mean
  int64_t sums() const { return (g.T + summed - 1) / summed; }
};

// focal_context, backward, of the same tasks: the levels are computed again, nothing of them was kept.
struct ContextBackward {
  ContextForward forward;       // as it was; `out` is written where its data is not null
  const float* const* flipped;  // the weights, taps in reverse order, packed alike
  const float* mean;            // (B, C): what the forward found
  MapView grad_out;
  MapView grad_ctx;   // written where data is not null
  float* grad_gates;  // [image][channel block][level][pixel]: partial sums, each over its block; or null
  // [image][channel block][each level's taps, and its bias][lane]: partial sums, each over its image; or null
  float* grad_weights;
};

// A matrix packed for products with rows of tokens: out[m, n] = sum_k a[m, k] * w[n, k].
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

// y = x + drop_path * gamma * post_norm?(body(pre_norm?(x))): what a residual branch has around its body.
struct Residual {
  bool add;                              // false: the body alone
  bool wide;                             // x, y and their gradients are float, whatever the body is
  const float *norm_weight, *norm_bias;  // null: no norm
  float norm_eps;
  bool post;
  const float* gamma;      // (C,), or null
  const float* drop_path;  // a factor per image, or null
  bool pre_norm() const { return norm_weight && !post; }
  bool post_norm() const { return norm_weight && post; }
};

struct LinearForward {
  DType dtype;
  Packed weight;
  const float* bias;  // N, or null
  Rows in, out;
  Residual residual;  // its norm comes before or after the product; nothing else of it
};

struct ModulateForward {
  DType dtype;
  Packed weight;      // h
  const float* bias;  // h's, or null
  Rows ctx_all, q, out;
  Rows modulator;  // written when data is not null
  // where q.data is null: q = f_q(x), made a block of rows at a time and never written to memory
  Packed f_q;
  const float* f_q_bias;
  Rows x;
  // the rest of the layer, when proj.panels is not null: u = proj(LN?(q * modulator)), and the residual around it
  Packed proj;
  const float* proj_bias;
  const float *ln_weight, *ln_bias;  // null: no LayerNorm
  float ln_eps;
  Residual residual;
};

// Backward of ModulateForward with proj, up to the gradient of ctx_all.
struct ModulateBackward {
  DType dtype;
  Packed proj_t, h_t;  // both transposed
  const float *ln_weight, *ln_bias;
  float ln_eps;
  Residual residual;
  Packed proj;  // where u has to be made again: for a last norm, and for gamma's gradient
  const float* proj_bias;
  Rows grad_out, q, modulator;
  Rows grad_u;          // written where data is not null: where it is not grad_out as it is
  Rows grad_q;          // written
  Rows grad_modulator;  // written
  Rows z;               // written: proj's input, LN?(q * modulator)
  Rows grad_ctx_all;    // written where data is not null
  float* sums;          // per block of rows [SUMS][C]: proj's bias, h's bias, LN's, the residual's norm's and gamma
  static constexpr int64_t SUMS = 7;
};

// The last step back to x: sums the gates' gradients over channel blocks, then grad_x = grad_projected @ f.
struct ProjectBackward {
  DType dtype;
  Geometry g;
  int64_t gates, channel_blocks;
  const float* grad_gates;  // ContextBackward::grad_gates
  Packed f_t;
  Rows grad_projected;  // F channels; the gates' are written here
  Residual residual;    // its pre-norm is f's input
  Rows x, grad_y;       // of the branch
  Rows z;               // written where data is not null: f's input again, where it is not x as it is
  Rows grad_x;          // written where data is not null
  float* sums;          // per block of rows [F + 2 C]: f's bias, the pre-norm's weight and bias
  int64_t all_sums() const { return f_t.K + 2 * f_t.N; }
};

// A branch whose body is fc2(GELU(fc1(z))).
struct MlpForward {
  DType dtype;
  Packed fc1, fc2;
  const float *fc1_bias, *fc2_bias;  // or null
  Residual residual;
  Rows x, y;
  Rows u;    // fc2's result; written when data is not null
  Rows pre;  // fc1's result, before GELU: likewise
};

// Its backward, of a group of tokens from row `first` on, up to the weights' gradients. Rows of one width are dense
// and count from `first`; x, grad_y, u and grad_x are all tokens'.
struct MlpBackward {
  DType dtype;
  Packed fc1, fc1_t, fc2_t;
  const float* fc1_bias;
  Residual residual;
  int64_t first;
  Rows x, grad_y;
  Rows u;              // what the forward kept, where the norm is last
  Rows pre;            // fc1's result, where the forward kept it
  Rows grad_x;         // written where data is not null
  Rows z;              // written: fc1's input
  Rows grad_u;         // written: the gradient of fc2's result; without a last norm before gamma is multiplied in
  Rows hidden;         // written: fc2's input
  Rows grad_hidden;    // written: the gradient of fc1's result
  float* sums;         // per block of rows [SUMS][C]: grad_u, norm's weight and bias; gamma where the norm is last
  float* hidden_sums;  // per block of rows [fc1.N]: grad_hidden
  static constexpr int64_t SUMS = 4;
};

// A product of few rows, cut by columns: each task packs its own panels, uses one while it is in cache, and reads the
// weight but once. (With many rows the weight is packed as a whole and the product cut by rows.)
struct FewRowsProduct {
  enum class Then { STORE, GELU, MODULATE, RESIDUAL };
  DType dtype;
  int64_t rows;
  const void* operand;  // Kernels::few_rows_operand
  const void* weight;   // (N, K)
  int64_t N, K, stride_n, stride_k;
  const void* panels;  // the weight as it was packed before; or null
  int64_t ahead;       // so many columns after those of a task others are soon wanted, and are fetched meanwhile
  const float* bias;   // or null
  Then then;
  Rows out;    // STORE, RESIDUAL: in the storage dtype
  void* next;  // GELU, MODULATE: the operand of the next product
  Rows q;      // MODULATE: times the sums
  Residual residual;
  Rows x;    // RESIDUAL
  float* u;  // RESIDUAL with a last norm: (rows, N), then Kernels::few_rows_post_norm makes `out` of it
};

// grad_weight[n, k] += sum over rows of grad[row, n] * in[row, k].
struct WeightGradient {
  DType dtype;
  int64_t N, K;
  Rows grad, in;
  float* grad_weight;  // (N, K)
  bool add;            // to what is there; false: overwrite
  int64_t unit;        // rows: a product sums rows of one unit only
};

// A task's scratch memory, on a cache line, has the size that the kernel's `*_scratch` gives: for a task of at most as
// many rows (or columns) as it is asked for.
struct Kernels {
  const char* name;
  int lanes;
  int64_t channel_blocks(int64_t C) const { return (C + lanes - 1) / lanes; }

  // Whether the forward of this dtype takes taps `paired`: each kernel row beside the next, for vdpbf16ps.
  bool (*pairs)(DType);
  // Depthwise weights (C, 1, *k), any strides, to float [channel block][tap][lane], `lanes` x channel_blocks(C)
  // channels; or paired to bfloat16 [channel block][single, pair][tap][lane][2].
  // Packs one channel block; `packed` is the level's whole buffer.
  void (*pack_taps)(DType, const void* w, int64_t C, const Level&, const int64_t strides[4], bool paired, int64_t block,
                    float* packed);

  int64_t (*context_fwd_scratch)(const ContextForward&);
  // Levels of rows t0..t1 into `plane` (float, pixels x lanes) and the sums of the last level into their places in
  // `sums` (ContextForward::sums x lanes); t0 and t1 do not cut the rows of a sum apart.
  void (*context_fwd_levels)(const ContextForward&, int64_t b, int64_t block, int64_t t0, int64_t t1, float* plane,
                             float* sums, void* scratch);
  // Adds the global context to rows t0..t1 of `plane` and writes them out. `sums`: of the whole map.
  void (*context_fwd_finish)(const ContextForward&, int64_t b, int64_t block, int64_t t0, int64_t t1,
                             const float* plane, const float* sums);

  int64_t (*context_bwd_scratch)(const ContextBackward&);
  void (*context_bwd)(const ContextBackward&, int64_t b, int64_t block, void* scratch);

  // n floats as the storage dtype, `stride` elements apart.
  void (*convert)(DType, const float* from, int64_t n, void* to, int64_t stride);
  int64_t (*packed_bytes)(DType, int64_t N, int64_t K);
  // Rows n0..n1 of w (N, K), any strides; n0 a multiple of 48.
  void (*pack_matrix)(DType, const void* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K, int64_t n0,
                      int64_t n1, void* panels);
  // Whether the panels are still w's, as far as samples show.
  bool (*panels_hold)(DType, const void* panels, const void* w, int64_t stride_n, int64_t stride_k, int64_t N,
                      int64_t K);
  int64_t (*linear_scratch)(const LinearForward&, int64_t rows);
  void (*linear_fwd)(const LinearForward&, int64_t row0, int64_t row1, void* scratch);
  int64_t (*modulate_scratch)(const ModulateForward&, int64_t rows);
  void (*modulate_fwd)(const ModulateForward&, int64_t row0, int64_t row1, void* scratch);

  // block: the number of the block of rows, for its partial sums
  int64_t (*modulate_bwd_scratch)(const ModulateBackward&, int64_t rows);
  void (*modulate_bwd)(const ModulateBackward&, int64_t block, int64_t row0, int64_t row1, void* scratch);
  int64_t (*project_bwd_scratch)(const ProjectBackward&, int64_t rows);
  void (*project_bwd)(const ProjectBackward&, int64_t block, int64_t row0, int64_t row1, void* scratch);
  int64_t (*operand_bytes)(DType, int64_t rows, int64_t K);
  int64_t (*few_rows_scratch)(const FewRowsProduct&, int64_t rows);
  // Rows row0..row1 of `x`, or of the residual's pre-norm of it, into their places in the operand.
  void (*few_rows_operand)(DType, const Rows& x, const Residual&, int64_t K, int64_t row0, int64_t row1, void* operand,
                           void* scratch);
  // Columns n0..n1; n0 a multiple of 48.
  void (*few_rows_product)(const FewRowsProduct&, int64_t n0, int64_t n1, void* scratch);
  // LayerNorm of rows row0..row1 of an operand, in place.
  void (*few_rows_norm)(DType, void* operand, int64_t K, int64_t row0, int64_t row1, const float* weight,
                        const float* bias, float eps);
  void (*few_rows_post_norm)(const FewRowsProduct&, int64_t row0, int64_t row1, void* scratch);
  int64_t (*mlp_scratch)(const MlpForward&, int64_t rows);
  void (*mlp_fwd)(const MlpForward&, int64_t row0, int64_t row1, void* scratch);
  int64_t (*mlp_bwd_scratch)(const MlpBackward&, int64_t rows);
  void (*mlp_bwd)(const MlpBackward&, int64_t block, int64_t row0, int64_t row1, void* scratch);
  int64_t (*weight_gradient_scratch)(const WeightGradient&, int64_t columns);
  void (*weight_gradient)(const WeightGradient&, int64_t n0, int64_t n1, int64_t row0, int64_t row1, void* scratch);
};

extern const Kernels portable_kernels, avx2_kernels, avx512_kernels, avx512_bf16_kernels;

// The best set that this machine has, or the one that FOCALNET_KERNELS_CPU_ISA names (an unknown or missing
// one throws std::runtime_error).
const Kernels& kernels();

}  // namespace focalnet::cpu

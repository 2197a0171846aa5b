// Turns the kernel headers into one instruction set's table of tasks, see kernels.h. Included by isa_*.cpp, each of
// which first sets FK_ISA (a name), FK_LANES (floats in a vector) and the compiler's target. Neither this nor what it
// includes has an include guard: there is no second copy.

namespace focalnet::cpu {
namespace FK_ISA {

// a lambda has to be inlined too: it could otherwise be emitted for the wrong target
#define FK_LAMBDA __attribute__((always_inline))

#include "cpu/vec.h"
//
#include "cpu/arena.h"
#include "cpu/dispatch.h"
//
#include "cpu/products.h"
//
#include "cpu/packing.h"
#include "cpu/rows.h"
//
#include "cpu/epilogues.h"
#include "cpu/layer_norm.h"
//
#include "cpu/residual_rows.h"
//
#include "cpu/focal_context_fwd.h"
#include "cpu/linear_fwd.h"
#include "cpu/modulate_fwd.h"
//
#include "cpu/focal_context_bwd.h"
#include "cpu/focal_modulation_bwd.h"
//
#include "cpu/mlp_branch.h"
//
#include "cpu/few_rows.h"

// What a scratch struct takes from an arena, for a task of at most n rows.
template <template <class> class Scratch, class Task>
static int64_t scratch_bytes(const Task& p, int64_t n) {
  Arena counted(nullptr);
  with_dtype(p.dtype, [&](auto v) { Scratch<decltype(v)>(counted, p, 0, n); });
  return counted.bytes;
}
static int64_t weight_gradient_scratch(const WeightGradient& p, int64_t columns) {
  Arena counted(nullptr);
  with_dtype(p.dtype, [&](auto v) { WeightGradientScratch<decltype(v)>(counted, p, columns); });
  return counted.bytes;
}
template <class Scratch, class Task>
static int64_t context_scratch_bytes(const Task& p) {
  Arena counted(nullptr);
  Scratch(counted, p);
  return counted.bytes;
}

static bool pairs(DType dtype) {
  bool result = false;
  with_dtype(dtype, [&](auto v) { result = PAIRS<decltype(v)>; });
  return result;
}
static void pack_taps(DType dtype, const void* w, int64_t C, const Level& level, const int64_t strides[4], bool paired,
                      int64_t block, float* packed) {
  with_dtype(dtype, [&](auto v) {
    pack_taps_of(static_cast<const decltype(v)*>(w), C, level, strides, paired, block, packed);
  });
}
static void context_fwd_levels(const ContextForward& p, int64_t b, int64_t block, int64_t t0, int64_t t1, float* plane,
                               float* sum, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { context_fwd_levels_of<decltype(v)>(p, b, block, t0, t1, plane, sum, scratch); });
}
static void context_fwd_finish(const ContextForward& p, int64_t b, int64_t block, int64_t t0, int64_t t1,
                               const float* plane, const float* sum) {
  with_dtype(p.dtype, [&](auto v) { context_fwd_finish_of<decltype(v)>(p, b, block, t0, t1, plane, sum); });
}
static void context_bwd(const ContextBackward& p, int64_t b, int64_t block, void* scratch) {
  with_dtype(p.forward.dtype, [&](auto v) { context_bwd_of<decltype(v)>(p, b, block, scratch); });
}
static void convert_all(DType dtype, const float* from, int64_t n, void* to, int64_t stride) {
  with_dtype(dtype, [&](auto v) {
    for (int64_t i = 0; i < n; i += VL) {
      const int lanes = int(n - i < VL ? n - i : VL);
      store_lanes(static_cast<decltype(v)*>(to) + i * stride, lanes, stride, load_lanes(from + i, lanes, 1));
    }
  });
}
static int64_t packed_bytes(DType dtype, int64_t N, int64_t K) {
  int64_t bytes = 0;
  with_dtype(dtype, [&](auto v) {
    using CT = operand_t<decltype(v)>;
    bytes = panels_elements<CT>(N, K) * int64_t(sizeof(CT));
  });
  return bytes;
}
static void pack_matrix(DType dtype, const void* w, int64_t stride_n, int64_t stride_k, int64_t N, int64_t K,
                        int64_t n0, int64_t n1, void* panels) {
  with_dtype(dtype, [&](auto v) {
    pack_matrix_of(static_cast<const decltype(v)*>(w), stride_n, stride_k, N, K, n0, n1, panels);
  });
}
static bool panels_still_hold(DType dtype, const void* panels, const void* w, int64_t stride_n, int64_t stride_k,
                              int64_t N, int64_t K) {
  bool result = false;
  with_dtype(dtype, [&](auto v) {
    result = panels_hold(panels, static_cast<const decltype(v)*>(w), stride_n, stride_k, N, K);
  });
  return result;
}
static void linear_fwd(const LinearForward& p, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { linear_fwd_of<decltype(v)>(p, row0, row1, scratch); });
}
static void modulate_fwd(const ModulateForward& p, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { modulate_fwd_of<decltype(v)>(p, row0, row1, scratch); });
}
static void modulate_bwd(const ModulateBackward& p, int64_t block, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { modulate_bwd_of<decltype(v)>(p, block, row0, row1, scratch); });
}
static void project_bwd(const ProjectBackward& p, int64_t block, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { project_bwd_of<decltype(v)>(p, block, row0, row1, scratch); });
}
static int64_t operand_bytes(DType dtype, int64_t rows, int64_t K) {
  Arena counted(nullptr);
  with_dtype(dtype, [&](auto v) { operand_memory<decltype(v)>(counted, rows, K); });
  return counted.bytes;
}
static void few_rows_operand(DType dtype, const Rows& x, const Residual& r, int64_t K, int64_t row0, int64_t row1,
                             void* operand, void* scratch) {
  with_dtype(dtype, [&](auto v) { few_rows_operand_of<decltype(v)>(x, r, K, row0, row1, operand, scratch); });
}
static void few_rows_product(const FewRowsProduct& p, int64_t n0, int64_t n1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { few_rows_product_of<decltype(v)>(p, n0, n1, scratch); });
}
static void few_rows_norm(DType dtype, void* operand, int64_t K, int64_t row0, int64_t row1, const float* weight,
                          const float* bias, float eps) {
  with_dtype(dtype, [&](auto v) {
    using CT = operand_t<decltype(v)>;
    const int64_t stride = padded_k<CT>(K);
    layer_norm_rows(static_cast<CT*>(operand) + row0 * stride, stride, row1 - row0, K, weight, bias, eps);
  });
}
static void few_rows_post_norm(const FewRowsProduct& p, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { few_rows_post_norm_of<decltype(v)>(p, row0, row1, scratch); });
}
static void mlp_fwd(const MlpForward& p, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { mlp_fwd_of<decltype(v)>(p, row0, row1, scratch); });
}
static void mlp_bwd(const MlpBackward& p, int64_t block, int64_t row0, int64_t row1, void* scratch) {
  with_dtype(p.dtype, [&](auto v) { mlp_bwd_of<decltype(v)>(p, block, row0, row1, scratch); });
}
static void weight_gradient(const WeightGradient& p, int64_t n0, int64_t n1, int64_t row0, int64_t row1,
                            void* scratch) {
  with_dtype(p.dtype, [&](auto v) { weight_gradient_of<decltype(v)>(p, n0, n1, row0, row1, scratch); });
}

}  // namespace FK_ISA

#define FK_NAME_(isa) #isa
#define FK_NAME(isa) FK_NAME_(isa)
#define FK_TABLE_(isa) isa##_kernels
#define FK_TABLE(isa) FK_TABLE_(isa)

const Kernels FK_TABLE(FK_ISA) = {
    FK_NAME(FK_ISA),
    FK_ISA::VL,
    FK_ISA::pairs,
    FK_ISA::pack_taps,
    FK_ISA::context_scratch_bytes<FK_ISA::ContextScratch>,
    FK_ISA::context_fwd_levels,
    FK_ISA::context_fwd_finish,
    FK_ISA::context_scratch_bytes<FK_ISA::ContextBackScratch>,
    FK_ISA::context_bwd,
    FK_ISA::convert_all,
    FK_ISA::packed_bytes,
    FK_ISA::pack_matrix,
    FK_ISA::panels_still_hold,
    FK_ISA::scratch_bytes<FK_ISA::LinearScratch>,
    FK_ISA::linear_fwd,
    FK_ISA::scratch_bytes<FK_ISA::ModulateScratch>,
    FK_ISA::modulate_fwd,
    FK_ISA::scratch_bytes<FK_ISA::ModulateBackScratch>,
    FK_ISA::modulate_bwd,
    FK_ISA::scratch_bytes<FK_ISA::ProjectBackScratch>,
    FK_ISA::project_bwd,
    FK_ISA::operand_bytes,
    FK_ISA::scratch_bytes<FK_ISA::FewRowsScratch>,
    FK_ISA::few_rows_operand,
    FK_ISA::few_rows_product,
    FK_ISA::few_rows_norm,
    FK_ISA::few_rows_post_norm,
    FK_ISA::scratch_bytes<FK_ISA::MlpScratch>,
    FK_ISA::mlp_fwd,
    FK_ISA::scratch_bytes<FK_ISA::MlpBackScratch>,
    FK_ISA::mlp_bwd,
    FK_ISA::weight_gradient_scratch,
    FK_ISA::weight_gradient,
};

}  // namespace focalnet::cpu

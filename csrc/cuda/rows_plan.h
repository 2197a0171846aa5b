// How a call is cut into rows, strips and tasks, and what lies where in shared memory. See rows.h.
#pragma once

#include <algorithm>

#include "cuda/device.h"
#include "cuda/pairs.h"

namespace focalnet::cuda {

constexpr int BLOCK_WARPS = 4;  // of maps that a warp has alone

// Takes the next n elements of the shared memory of the rows' owner.
inline int take(RowsShared& shared, int n) {
  const int first = shared.elements;
  shared.elements += (n + 7) / 8 * 8;
  return first;
}
// A ring of `rows` rows at least, `row` elements each; `ahead`: how far a group's first row is from a multiple of STEP.
inline Ring take_ring(RowsShared& shared, int rows, int row, int ahead) {
  rows = (rows + STEP - 1) / STEP * STEP;
  const uint32_t inverse = uint32_t(((int64_t(1) << 32) + rows - 1) / rows);
  return {take(shared, rows * row), row, rows, 64 * rows - ahead, inverse};
}

// How a map's rows lie in a warp; nothing where this form cannot take them.
inline std::optional<RowsLayout> lay_out_rows(const Chain& chain) {
  constexpr int64_t LARGEST_TAPS = 13;
  const Geometry& g = chain.g;
  RowsLayout layout{};
  int64_t widest = 1, tallest = 1;
  for (int l = 0; l < chain.L; ++l) {
    const Level& k = chain.levels[l].size;
    widest = std::max(widest, k.kw), tallest = std::max(tallest, k.kt);
    layout.reach[l + 1] = layout.reach[l] + int(k.rt());
    if (k.km != 1) return std::nullopt;
  }
  layout.segments = int(std::min<int64_t>((g.W + 7) / 8, 1 << 20));
  if (chain.dtype == DType::f32 || chain.L == 0 || g.M != 1 || std::max(widest, tallest) > LARGEST_TAPS ||
      layout.segments > 16 * MOST_WARPS || g.T > 1 << 20)
    return std::nullopt;
  layout.window = std::max(widest, tallest) <= 9 ? 16 : 32;
  layout.warps = (layout.segments + 15) / 16;
  layout.images = layout.warps > 1 ? 1 : int(std::min<int64_t>(16 / layout.segments, std::max<int64_t>(1, g.B)));
  layout.image_row = 8 * layout.segments + layout.window - 8;
  layout.row = layout.images * layout.image_row;
  layout.image_groups = (g.B + layout.images - 1) / layout.images;
  return layout;
}

// The memory of stream_rows. `to_the_end`: what enters a level stays until the last one has reached that row.
inline RowsShared lay_out_rings(const Chain& chain, const RowsLayout& layout, bool to_the_end) {
  RowsShared shared{};
  for (int l = 0; l < chain.L; ++l) {
    const int lag = l > 0 && to_the_end ? layout.reach[chain.L] - layout.reach[l] : 0;
    const int needed = STEP + std::max(lag, 2 * int(chain.levels[l].size.rt()));
    shared.inputs.set(l, take_ring(shared, needed, layout.row, layout.reach[chain.L] - layout.reach[l]));
  }
  shared.rings = shared.elements;
  for (int l = 0; l < chain.L; ++l)
    shared.bands[l] = take(shared, int(chain.levels[l].size.kt) * (layout.window / 16) * 32 * 4);
  shared.sums = take(shared, 2 * 16 * layout.warps);
  return shared;
}

// Strips of rows and runs of images: enough tasks to keep the device busy, and no more. `groups`: in memory at once.
inline void cut_into_tasks(const Chain& chain, const RowsLayout& layout, int64_t groups, RowsSchedule& schedule) {
  const Geometry& g = chain.g;
  const int64_t enough = 16 * current_device().processors;  // warps that a device wants
  const int64_t planes = std::max<int64_t>(1, groups * g.C * layout.warps), halo = layout.reach[chain.L];
  // a strip computes `halo` rows again on both sides: none shorter than that
  schedule.strips =
      planes < enough / 2 ? std::max<int64_t>(1, std::min(enough / planes, g.T / std::max<int64_t>(8, 4 * halo))) : 1;
  schedule.strip_rows = ((g.T + schedule.strips - 1) / schedule.strips + STEP - 1) / STEP * STEP;
  schedule.strips = (g.T + schedule.strip_rows - 1) / schedule.strip_rows;
  schedule.run = std::max<int64_t>(1, std::min<int64_t>(groups, planes / (4 * enough)));
  schedule.runs = (layout.image_groups + schedule.run - 1) / schedule.run;
}

// Owners to a block, as many as its shared memory holds; false where that is none.
inline bool fill_blocks(RowsPlan& plan, int64_t tasks) {
  const RowsLayout& layout = plan.layout;
  RowsSchedule& schedule = plan.schedule;
  const int64_t fitting = current_device().shared_per_block / (2 * plan.shared.elements);
  schedule.owners = int(std::min<int64_t>(layout.warps > 1 ? 1 : BLOCK_WARPS, fitting));
  if (schedule.owners == 0) return false;
  schedule.tasks = tasks;
  schedule.blocks = std::min<int64_t>((tasks + schedule.owners - 1) / schedule.owners, 1 << 20);
  schedule.threads = 32 * layout.warps * schedule.owners;
  schedule.shared_bytes = int64_t(plan.shared.elements) * 2 * schedule.owners;
  return true;
}

}  // namespace focalnet::cuda

// How a call is cut into blocks of whole images, and what lies where in their shared memory. See images.h.
#pragma once

#include <algorithm>
#include <initializer_list>

#include "cuda/images.h"

namespace focalnet::cuda {

// Shared memory, dealt out in whole pieces of 16 bytes.
struct SharedBytes {
  int64_t taken = 0;
  // where so many elements, of so many bytes, begin
  int take(int64_t elements, int64_t bytes) {
    const int64_t first = taken;
    taken += (elements * bytes + 15) / 16 * 16;
    return int(first);
  }
};

constexpr int64_t RESERVED = 1024;  // bytes of shared memory that the system takes for each block

// A call's layout, where it fits: `bytes(layout)` of shared memory, `reach` rows of zeros between images, blocks of
// `tile` channels, `channels` at a time, of which `warps` share one if `together(pitch)` such blocks do not fit a
// multiprocessor.
template <class TOGETHER, class BYTES>
bool lay_out(const Geometry& g, int reach, int channels, int tile, int warps, const TOGETHER& together,
             const BYTES& bytes, ImagesLayout& layout) {
  const Device device = current_device();
  const int H = int(g.T), W = int(g.W), pixels = H * W;
  layout.segments = (W + EIGHT - 1) / EIGHT, layout.reach = reach;
  layout.pitch = W > EIGHT ? (layout.segments + 1 | 1) * EIGHT : EIGHT;  // odd: ldmatrix finds rows in different banks,
  layout.image_pitch = H * layout.pitch + (reach * layout.pitch + 63) / 64 * 64;  // of two images too
  while (first_row(layout.pitch, layout.stretches) < H) ++layout.stretches;
  layout.tight_pitch = W + W % 2, layout.pixels = pixels;
  layout.neighbours = W % 4 == 0 ? 4 : 2 - W % 2;
  layout.channels = channels, layout.channel_tiles = g.C / tile;
  layout.tiles = Divisor(layout.channel_tiles), layout.rows = Divisor(H),
  layout.row_parts = Divisor(W / layout.neighbours);
  const auto with = [&](int images, int warps) {
    ImagesLayout next = layout;
    next.images = images, next.warps = warps;
    next.units = (next.listed() * next.segments + EIGHT - 1) / EIGHT;
    // rows that stretches of the last image have, of the image or beyond it
    const int rows = first_row(next.pitch, next.stretches - 1) + stretch_rows(next.pitch);
    next.plane = (images - 1) * next.image_pitch + (rows + 2 * reach + window_rows(next.pitch) - 1) * next.pitch;
    next.tight_plane = (((images - 1) * H + rows) * next.tight_pitch + 2 * EIGHT - 1) / EIGHT * EIGHT;
    next.places = images * pixels / next.neighbours;
    next.image_blocks = (g.B + images - 1) / images;
    return next;
  };
  const auto fits = [&](const ImagesLayout& next, int64_t most) {
    return next.plane <= Place::MOST_PADDED && next.tight_plane <= Place::MOST_TIGHT && bytes(next) <= most;
  };
  const int64_t most = device.shared_per_block;
  layout = with(1, warps);
  if (!fits(layout, most)) return false;
  // With several blocks on a multiprocessor, each warp with eight rows of stretches at most: what takes the fewest
  // steps, and lets four pixels be read at once.
  const int least = EIGHT / channels, whole = pixels % 4 == 0 ? 1 : 4 / (2 - pixels % 2);
  const int blocks = together(layout.pitch);
  const int64_t of_each = (most + RESERVED) / blocks - RESERVED;
  int64_t best = 0;
  for (int images = 1; images <= std::min<int64_t>(g.B, MOST_IMAGES); ++images) {
    const ImagesLayout next = with(images, least);
    const int64_t steps = (next.units + 2 * least - 1) / (2 * least);
    if (!fits(next, of_each) || (images > 1 && steps * stretch_rows(next.pitch) > EIGHT)) break;
    const int64_t all_steps = steps * next.image_blocks;
    if ((best > 0 && all_steps > best) || (images > whole && images % whole != 0)) continue;
    layout = next, best = all_steps;
  }
  const int64_t at_once = (best > 0 ? blocks : 1) * device.processors;
  const int64_t all = std::max<int64_t>(1, layout.image_blocks);
  layout.runs = std::min(all, std::max<int64_t>(1, at_once / layout.channel_tiles));
  const int64_t longest = (all + layout.runs - 1) / layout.runs;
  layout.runs = (all + longest - 1) / longest;
  return true;
}

// f(pitch, whole) with a layout's, as constants. The widest rows are of whole segments; elsewhere a few selections are
// not worth as many kernels again.
template <class F>
void with_layout(const ImagesLayout& layout, const F& f) {
  with_constant<8, 24, 40, 56, WIDEST>(layout.pitch,
                                       [&](auto pitch) { f(pitch, std::integral_constant<int, pitch == WIDEST>()); });
}

int reach_of(const Chain& chain);  // rows, of the largest kernel
// How pixels of all of the maps, where there is one, are read, so many images at a time; nothing where their rows do
// not lie in a row.
std::optional<Vectors> vectors_of(const Geometry& g, std::initializer_list<int> images,
                                  std::initializer_list<MapView> maps);

}  // namespace focalnet::cuda

// How a call is cut into blocks of whole images, and what lies where in their shared memory. See images.h.
#pragma once

#include <algorithm>
#include <initializer_list>
#include <optional>

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

// From a row of a plane with zeros to the next: an odd number of 16 bytes, so that ldmatrix finds rows in different
// banks.
inline int pitch_of(const Geometry& g) {
  const int segments = (int(g.W) + EIGHT - 1) / EIGHT;
  return segments > 1 ? (segments + 1 | 1) * EIGHT : EIGHT;
}

// From an image to the next: no less than its rows and zeros take, and so that as few stretches of a unit as can be lie
// in the same banks.
inline int image_pitch_of(const ImagesLayout& layout, int H) {
  const int row = layout.pitch / EIGHT, least = (H + layout.reach) * row;
  int best = least, most = 0;
  for (int pitch = least; pitch < least + EIGHT; ++pitch) {
    int banks = 0;
    for (int first = 0; first < EIGHT * layout.stretches; first += EIGHT) {  // then all begins again
      bool taken[EIGHT] = {};
      for (int i = first; i < first + EIGHT; ++i)
        taken[(first_row(layout.stretch_rows, i % layout.stretches) * row + i / layout.stretches * pitch) % EIGHT] =
            true;
      banks += int(std::count(taken, taken + EIGHT, true));
    }
    if (banks > most) best = pitch, most = banks;
  }
  return best * EIGHT;
}

// What a kernel's blocks are: `tile` channels, `channels` at a time, of which `warps` share one where `together` such
// blocks do not fit a multiprocessor; and its stretches.
struct BlockForm {
  int channels, tile, warps, together, stretch_rows;
};

// A call's layout, where it fits: `bytes(layout)` of shared memory, `reach` rows of zeros between images.
template <class BYTES>
bool lay_out(const Geometry& g, int reach, const BlockForm& form, const BYTES& bytes, ImagesLayout& layout) {
  const Device device = current_device();
  const int H = int(g.T), W = int(g.W), pixels = H * W, channels = form.channels;
  layout.segments = (W + EIGHT - 1) / EIGHT, layout.reach = reach;
  layout.pitch = pitch_of(g), layout.stretch_rows = form.stretch_rows;
  while (first_row(form.stretch_rows, layout.stretches) < H) ++layout.stretches;
  layout.image_pitch = image_pitch_of(layout, H);
  layout.tight_pitch = W + W % 2, layout.tight_image = H * layout.tight_pitch, layout.pixels = pixels;
  layout.neighbours = W % 4 == 0 ? 4 : 2 - W % 2;
  layout.channels = channels, layout.channel_tiles = g.C / form.tile;
  layout.tiles = Divisor(layout.channel_tiles), layout.rows = Divisor(H),
  layout.row_parts = Divisor(W / layout.neighbours);
  const int whole = pixels % 4 == 0 ? 1 : 4 / (2 - pixels % 2);  // images whose pixels are whole fours
  const auto with = [&](int images, int warps, int64_t most) -> std::optional<ImagesLayout> {
    ImagesLayout next = layout;
    next.images = images, next.warps = warps;
    next.units = (next.listed() * next.segments + EIGHT - 1) / EIGHT;
    // rows that stretches of the last image have, of the image or beyond it
    const int rows = first_row(form.stretch_rows, next.stretches - 1) + form.stretch_rows;
    next.plane = (images - 1) * next.image_pitch + (rows + 2 * reach + window_rows(next.pitch) - 1) * next.pitch;
    next.tight_plane = ((images - 1) * next.tight_image + rows * next.tight_pitch + 2 * EIGHT - 1) / EIGHT * EIGHT;
    next.image_blocks = (g.B + images - 1) / images;
    if (next.plane > Place::MOST_PADDED || next.tight_plane > Place::MOST_TIGHT) return std::nullopt;
    for (int period : {images, whole}) {  // all images' places cost fewer instructions, a period's less memory
      next.period = images % period == 0 ? period : images;
      next.places = next.period * pixels / next.neighbours;
      if (bytes(next) <= most) return next;
    }
    return std::nullopt;
  };
  const int64_t most = device.shared_per_block;
  const auto alone = with(1, form.warps, most);
  if (!alone) return false;
  layout = *alone;
  // With several blocks on a multiprocessor, each warp with eight rows of stretches at most: what takes the fewest
  // steps of as many blocks side by side, and lets four pixels be read at once.
  const int least = EIGHT / channels;
  int together = 1;
  int64_t best = 0;
  for (int blocks = form.together; blocks > 1; --blocks) {
    for (int images = 1; images <= std::min<int64_t>(g.B, MOST_IMAGES); ++images) {
      if (images > whole && images % whole != 0) continue;
      const auto next = with(images, least, (most + RESERVED) / blocks - RESERVED);
      if (!next) break;
      const int64_t steps = (next->units + 2 * least - 1) / (2 * least), all_steps = steps * next->image_blocks;
      if (images > 1 && steps * form.stretch_rows > EIGHT) break;
      if (best > 0 && all_steps * together > best * blocks) continue;
      layout = *next, best = all_steps, together = blocks;
    }
  }
  const int64_t at_once = together * device.processors;
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
// How pixels of all of the maps, where there is one, are read; nothing where their rows do not lie in a row.
std::optional<Vectors> vectors_of(const Geometry& g, const ImagesLayout& layout, std::initializer_list<MapView> maps);

}  // namespace focalnet::cuda

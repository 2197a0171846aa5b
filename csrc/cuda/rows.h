// The depthwise chain on tensor cores, a few rows of a map at a time. ops/focal_context/README.md has the drawing.
//
// A warp owns a channel of 16 segments of 8 columns: of one image, or of several narrow ones. Along a row, a level is a
// product of the segments' windows (16 x WINDOW inputs, each window starting WINDOW / 4 columns left of its segment)
// with a banded matrix of the kernel row's taps (WINDOW x 8). Levels follow each other down the map, four rows at a
// time; what they read of each other lies in rings of rows in shared memory, so no level recomputes what a neighbour
// has.
#pragma once

#include <algorithm>

#include "cuda/device.h"
#include "cuda/mma.h"

namespace focalnet::cuda {

constexpr int STEP = 4;         // rows that a level advances at once
constexpr int BLOCK_WARPS = 4;  // of maps that a warp has alone

// The two pairs of columns of a row that a lane holds of a 16 x 8 product: of segments `lane / 4` and 8 further.
struct Pairs {
  int64_t image[2];
  int column[2], columns[2];  // the first of two, and how many are inside the map
  int at[2];                  // in a ring's row

  __device__ Pairs(const RowsLayout& layout, const Geometry& g, int64_t group) {
    const int lane = threadIdx.x % 32, warp = layout.warps > 1 ? threadIdx.x / 32 : 0;
    for (int i = 0; i < 2; ++i) {
      const int segment = warp * 16 + lane / 4 + 8 * i, nth = segment / layout.segments;
      image[i] = group * layout.images + nth;
      column[i] = segment % layout.segments * 8 + lane % 4 * 2;
      const bool inside = nth < layout.images && image[i] < g.B;
      columns[i] = inside ? int(std::min<int64_t>(2, std::max<int64_t>(0, g.W - column[i]))) : 0;
      at[i] = (nth < layout.images ? nth : 0) * layout.image_row + layout.window / 4 + column[i];
      if (nth >= layout.images) at[i] = -1;
    }
  }
};

// f(r, i) for pair i of each of the STEP rows that a lane holds.
template <class F>
__device__ __forceinline__ void for_pairs(const F& f) {
#pragma unroll
  for (int r = 0; r < STEP; ++r)
#pragma unroll
    for (int i = 0; i < 2; ++i) f(r, i);
}

// This lane's pairs in a map, a plane at a time: addresses are expensive to compute, so what does not change is kept.
template <class T>
struct Lines {
  const MapView& v;
  const int (&columns)[2];
  T* first[2];  // of the plane, row 0
  bool whole;   // a pair is one aligned access, wherever it lies

  __device__ Lines(const MapView& v, const Pairs& pairs, int64_t channel) : v(v), columns(pairs.columns) {
    for (int i = 0; i < 2; ++i) first[i] = element<T>(v, pairs.image[i], channel, 0, 0, pairs.column[i]);
    whole = v.w == 1 && (v.b | v.c | v.t) % 2 == 0 && reinterpret_cast<uintptr_t>(v.data) % 4 == 0;
  }
  // Where pair i of rows t + r lies, of `planes` further: the first argument of load_from and store_to.
  struct At {
    T* first[2];
    int64_t step;
    __device__ T* operator()(int r, int i) const { return first[i] + r * step; }
  };
  __device__ At rows(int64_t t, int64_t planes = 0) const {
    const int64_t further = t * v.t + planes * v.c;
    return {{first[0] + further, first[1] + further}, v.t};
  }
  // Zeros outside of the map.
  __device__ Two<std::remove_const_t<T>> load_from(const T* from, int i, bool inside) const {
    if (inside && whole && columns[i] == 2) return *reinterpret_cast<const Two<std::remove_const_t<T>>*>(from);
    const auto zero = from_float<std::remove_const_t<T>>(0.0f);
    return {inside && columns[i] > 0 ? from[0] : zero, inside && columns[i] > 1 ? from[v.w] : zero};
  }
  __device__ void store_to(T* to, int i, float a, float b) const {
    const Two<T> two = two_of<T>(a, b);
    if (whole && columns[i] == 2) {
      *reinterpret_cast<Two<T>*>(to) = two;
      return;
    }
    if (columns[i] > 0) to[0] = two.values[0];
    if (columns[i] > 1) to[v.w] = two.values[1];
  }
  __device__ void store(int i, int64_t t, float a, float b) const { store_to(rows(t)(0, i), i, a, b); }
};

template <class T>
__device__ Two<T> with_bias(Two<T> two, float bias, int n) {
  return two_of<T>(n > 0 ? to_float(two.values[0]) + bias : 0.0f, n > 1 ? to_float(two.values[1]) + bias : 0.0f);
}

// Rows first .. first + STEP - 1 of a map as this lane holds them; zeros outside.
template <class T>
__device__ void fetch(const Lines<const T>& lines, int map_rows, int first, Two<T> (&to)[STEP][2], int64_t planes = 0) {
  const auto at = lines.rows(first, planes);
  for_pairs([&](int r, int i) { to[r][i] = lines.load_from(at(r, i), i, unsigned(first + r) < unsigned(map_rows)); });
}
// The same of ctx, with its bias.
template <class T>
__device__ void fetch_ctx(const Lines<const T>& lines, const Vector& biases, float bias, int map_rows, int first,
                          Two<T> (&to)[STEP][2]) {
  fetch(lines, map_rows, first, to);
  if (!biases.data) return;
  for_pairs([&](int r, int i) {
    to[r][i] = with_bias(to[r][i], bias, first + r >= 0 && first + r < map_rows ? lines.columns[i] : 0);
  });
}

// Which of a ring's rows is row t of the map. A remainder by a product: a division takes 20 instructions.
__device__ inline int ring_slot(int t, Ring ring) {
  const uint32_t n = uint32_t(t + 64 * ring.rows);  // below 2^21, for which the product is exact
  return int(n - __umulhi(n, ring.inverse) * ring.rows);
}

// What rows' owners do one after the other: a channel, rows begin .. end - 1 of it, in some groups of images.
struct Task {
  int64_t channel, strip, run;
  int begin, end;
  int64_t first_group, last_group;  // this one is not among them

  __device__ bool has(int t) const { return t >= begin && t < end; }
};

// f(std::integral_constant<int, K>()) with a kernel's height; only windows of 32 are for ones as tall as 11 and 13.
// Tallest first: in order of size context_weights_kernel would take four registers more.
template <int WINDOW, class F>
__device__ void with_height(int kt, const F& f) {
  if constexpr (WINDOW == 32)
    with_constant<13, 11, 9, 7, 5, 3, 1>(kt, f);
  else
    with_constant<9, 7, 5, 3, 1>(kt, f);
}

// The rows of their owner: of a warp, or of a block where a map is too wide for one.
template <class T>
struct Rows {
  const RowsPlan& plan;
  int owner, thread;  // which rows of the block, and which of their threads
  T* memory;
  int map_rows;   // along T
  int window_at;  // of the row that this lane passes to ldmatrix

  __device__ Rows(const RowsPlan& plan, const Geometry& g)
      : plan(plan),
        owner(plan.layout.warps > 1 ? 0 : threadIdx.x / 32),
        thread(plan.layout.warps > 1 ? threadIdx.x : threadIdx.x % 32),
        memory(shared_memory<T>() + owner * plan.shared.elements),
        map_rows(int(g.T)) {
    const RowsLayout& layout = plan.layout;
    const int lane = threadIdx.x % 32, warp = layout.warps > 1 ? threadIdx.x / 32 : 0;
    const int until = plan.shared.zeros + layout.row;
    for (int i = thread; i < until; i += 32 * layout.warps) memory[i] = from_float<T>(0.0f);
    int segment = warp * 16 + lane % 16;
    if (segment >= layout.images * layout.segments) segment = 0;  // its products are not used
    window_at = segment / layout.segments * layout.image_row + segment % layout.segments * 8 + lane / 16 * 8;
    sync();
  }

  // f(task) for all tasks of these rows' owner.
  template <class F>
  __device__ void for_tasks(const Geometry& g, const F& f) const {
    const RowsSchedule& schedule = plan.schedule;
    const int64_t step = int64_t(gridDim.x) * schedule.owners;
    for (int64_t i = int64_t(blockIdx.x) * schedule.owners + owner; i < schedule.tasks; i += step) {
      const int64_t strip = i / g.C % schedule.strips, run = schedule.first_run + i / g.C / schedule.strips;
      const int begin = int(strip * schedule.strip_rows);
      const int end = int(std::min<int64_t>(g.T, begin + schedule.strip_rows));
      f(Task{i % g.C, strip, run, begin, end, run * schedule.run,
             std::min(plan.layout.image_groups, (run + 1) * schedule.run)});
    }
  }

  // f(group, pairs) for a task's groups of images, one after the other.
  template <class F>
  __device__ void for_groups(const Geometry& g, const Task& task, const F& f) const {
    for (int64_t group = task.first_group; group < task.last_group; ++group) f(group, Pairs(plan.layout, g, group));
  }

  // A barrier of the rows' owner.
  __device__ void sync() const {
    if (plan.layout.warps > 1)
      __syncthreads();
    else
      __syncwarp();
  }

  __device__ T* row_of(Ring ring, int t) const { return memory + ring.first + ring_slot(t, ring) * plan.layout.row; }
  // Pair i of row t as it lies in a ring.
  __device__ Two<T> pair_of(Ring ring, int t, const Pairs& pairs, int i) const {
    return *reinterpret_cast<const Two<T>*>(row_of(ring, t) + pairs.at[i]);
  }

  // Puts this lane's pairs of row t into a ring, if that is a row of the map.
  __device__ void put(Ring ring, int t, const Pairs& pairs, const Two<T> (&row)[2]) const {
    if (t < 0 || t >= map_rows) return;
    T* const to = row_of(ring, t);
#pragma unroll
    for (int i = 0; i < 2; ++i)
      if (pairs.at[i] >= 0) *reinterpret_cast<Two<T>*>(to + pairs.at[i]) = row[i];
  }

  // A sum over each image, of what this lane has of the images of its pairs. Not reentrant before sync().
  __device__ void sum_over_images(const Pairs& pairs, int64_t group, float (&sum)[2]) const {
    const int lane = threadIdx.x % 32;
    float* const segments = reinterpret_cast<float*>(memory + plan.shared.sums);
    for (int i = 0; i < 2; ++i) {
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 1);
      sum[i] += __shfl_xor_sync(0xffffffffu, sum[i], 2);
      if (lane % 4 == 0) segments[thread / 32 * 16 + lane / 4 + 8 * i] = sum[i];
    }
    sync();
    for (int i = 0; i < 2; ++i) {
      const int first =
          pairs.columns[i] > 0 ? int(pairs.image[i] - group * plan.layout.images) * plan.layout.segments : 0;
      sum[i] = 0;
      for (int j = 0; j < plan.layout.segments; ++j) sum[i] += segments[first + j];
    }
  }

  // This lane's part of the bands of a level's kernel rows: element (i, n) is the tap that takes input i of a window
  // to output n. Only the same lane of each warp reads it again; where a block's warps share the bands, stream_rows
  // synchronizes before that and after. `flipped`: taps in reverse order, for the transpose.
  __device__ void make_bands(const LevelWeights& level, int64_t channel, int at, bool flipped) const {
    const int lane = threadIdx.x % 32, kt = int(level.size.kt), kw = int(level.size.kw);
    const int halves = plan.layout.window / 16, shift = plan.layout.window / 4 - kw / 2;
    for (int i = 0; i < kt * halves; ++i) {
      const int dt = i / halves, first = i % halves * 16 + lane % 4 * 2, n = lane / 4;
      T taps[4];
      for (int j = 0; j < 4; ++j) {
        const int tap = first + j % 2 + j / 2 * 8 - n - shift;
        const bool inside = tap >= 0 && tap < kw;
        const int row = flipped ? kt - 1 - dt : dt, column = flipped ? kw - 1 - tap : tap;
        taps[j] = inside ? *element<const T>(level.weights, 0, channel, row, 0, column) : from_float<T>(0.0f);
      }
      *reinterpret_cast<Quad<T>*>(memory + at + (i * 32 + lane) * 4) = {taps[0], taps[1], taps[2], taps[3]};
    }
  }
  // Those of all levels of a chain, by the first warp of the rows' owner.
  __device__ void make_all_bands(const Chain& chain, int64_t channel, bool flipped) const {
    for (int l = 0; l < chain.L && thread < 32; ++l)
      make_bands(chain.levels[l], channel, plan.shared.bands[l], flipped);
  }

  // This lane's rows for ldmatrix, one after the other, of a ring from row t on; zeros outside of the map.
  struct WindowRows {
    SharedRow at, begin, end, zeros;
    int t, map_rows, bytes;
    __device__ WindowRows(const Rows& rows, Ring ring, int t) : t(t), map_rows(rows.map_rows) {
      const SharedRow memory = shared_row(rows.memory + rows.window_at);
      bytes = 2 * rows.plan.layout.row;
      begin = memory + 2 * ring.first, end = begin + ring.rows * bytes, at = begin + ring_slot(t, ring) * bytes;
      zeros = memory + 2 * rows.plan.shared.zeros;
    }
    __device__ SharedRow next() {
      const SharedRow row = unsigned(t) < unsigned(map_rows) ? at : zeros;
      ++t, at += bytes;
      if (at == end) at = begin;
      return row;
    }
  };

  // acc[r] = row first + r of the convolution of a ring's rows, for this lane's pairs of columns.
  template <int K, int WINDOW>
  __device__ void convolve_rows(float (&acc)[STEP][4], Ring ring, int bands, int first) const {
    constexpr int HALVES = WINDOW / 16;
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int r = 0; r < STEP; ++r)
#pragma unroll
      for (int j = 0; j < 4; ++j) acc[r][j] = 0;
    uint2 band[K * HALVES];
#pragma unroll
    for (int i = 0; i < K * HALVES; ++i)
      band[i] = *reinterpret_cast<const uint2*>(memory + bands + (i * 32 + lane) * 4);
    WindowRows window(*this, ring, first - K / 2);
#pragma unroll
    for (int i = 0; i < K + STEP - 1; ++i) {
      const SharedRow row = window.next();
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        uint32_t windows[4];
        half == 0 ? load_matrices<0>(windows, row) : load_matrices<32>(windows, row);
#pragma unroll
        for (int r = 0; r < STEP; ++r)
          if (i >= r && i - r < K) multiply_add<T>(acc[r], windows, band[(i - r) * HALVES + half]);
      }
    }
  }

  template <int WINDOW>
  __device__ void convolve(float (&acc)[STEP][4], int kt, Ring ring, int bands, int first) const {
    with_height<WINDOW>(kt, [&](auto k) { convolve_rows<k, WINDOW>(acc, ring, bands, first); });
  }

  // sums[OFFSET + dt] += the products of a level's inputs, moved by kernel row dt, with the gradients of four rows of
  // its outputs: element (j, i) of input j of a window (16 to a half) and output i. Taps are its diagonals.
  template <int K, int OFFSET, int ALL, int HALVES>
  __device__ void add_products(float (&sums)[ALL][HALVES][4], Ring ring, int first,
                               const uint32_t (&grad)[STEP][2]) const {
    uint2 columns[STEP];
#pragma unroll
    for (int r = 0; r < STEP; ++r) columns[r] = {transpose(grad[r][0]), transpose(grad[r][1])};
    WindowRows window(*this, ring, first - K / 2);
#pragma unroll
    for (int i = 0; i < K + STEP - 1; ++i) {
      const SharedRow row = window.next();
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        uint32_t windows[4];
        half == 0 ? load_transposed<0>(windows, row) : load_transposed<32>(windows, row);
        const uint32_t turned[4] = {windows[0], windows[2], windows[1], windows[3]};
#pragma unroll
        for (int r = 0; r < STEP; ++r)
          if (i >= r && i - r < K) multiply_add<T>(sums[OFFSET + i - r][half], turned, columns[r]);
      }
    }
  }

  // The gradient of tap `lane` of a kernel row of kw taps: its diagonal of one of the above. `area`: the warp's, for
  // 16 * HALVES x 8 floats.
  template <int HALVES>
  __device__ static float diagonal(const float (&product)[HALVES][4], int kw, float* area) {
    const int lane = threadIdx.x % 32;
    __syncwarp();
#pragma unroll
    for (int half = 0; half < HALVES; ++half)
#pragma unroll
      for (int j = 0; j < 4; ++j)
        area[(half * 16 + lane / 4 + j / 2 * 8) * 8 + lane % 4 * 2 + j % 2] = product[half][j];
    __syncwarp();
    float sum = 0;
    for (int i = 0; i < 8 && lane < kw; ++i) sum += area[(i + lane + HALVES * 4 - kw / 2) * 8 + i];
    return sum;
  }
};

// A task's rows of a chain's last level, and with them what all levels need: `enter(t, rows)` gives rows t .. t
// + STEP - 1 of what enters the first, `leave(l, t, rows)` takes those of what leaves level l's convolution and turns
// them into what enters the next.
template <int WINDOW, class T, class ENTER, class LEAVE>
__device__ void stream_rows(const Rows<T>& rows, const Chain& chain, const Task& task, const Pairs& pairs,
                            const ENTER& enter, const LEAVE& leave) {
  const RowsLayout& layout = rows.plan.layout;
  const RowsShared& shared = rows.plan.shared;
  const int L = chain.L, all = layout.reach[L];
  Two<T> next[STEP][2];
  // the last level's rows begin at `t`, level l's all - reach[l] further down, what enters the first at t + all
  int t = task.begin - (all + 1) / 2 * STEP;
  enter(t + all, next);
  for (; t < task.end; t += STEP) {
#pragma unroll
    for (int r = 0; r < STEP; ++r) rows.put(shared.inputs[0], t + all + r, pairs, next[r]);
    rows.sync();
    if (t + STEP < task.end) enter(t + STEP + all, next);
    for (int l = 0; l < L; ++l) {
      const int first = t + all - layout.reach[l + 1], kt = int(chain.levels[l].size.kt);
      if (first + STEP > 0 && first < rows.map_rows && (l + 1 < L || first + STEP > task.begin)) {
        float acc[STEP][4];
        rows.template convolve<WINDOW>(acc, kt, shared.inputs[l], shared.bands[l], first);
        leave(l, first, acc);
        if (l + 1 < L)
#pragma unroll
          for (int r = 0; r < STEP; ++r)
            rows.put(shared.inputs[l + 1], first + r, pairs,
                     {two_of<T>(acc[r][0], acc[r][1]), two_of<T>(acc[r][2], acc[r][3])});
      }
      rows.sync();
    }
  }
}

// Takes the next n elements of the shared memory of the rows' owner.
inline int take(RowsShared& shared, int n) {
  const int first = shared.elements;
  shared.elements += (n + 7) / 8 * 8;
  return first;
}
inline Ring take_ring(RowsShared& shared, int rows, int row) {
  rows = std::max(rows, 2);
  return {take(shared, rows * row), rows, uint32_t(((int64_t(1) << 32) + rows - 1) / rows)};
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
    const int rows = int(std::min<int64_t>(needed, chain.g.T));  // a ring of the whole map needs no more
    shared.inputs.set(l, take_ring(shared, rows, layout.row));
  }
  shared.zeros = take(shared, layout.row);
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

// The depthwise chain on tensor cores, a few rows of a map at a time. ops/focal_context/README.md has the drawing.
//
// A warp owns a channel of 16 segments of 8 columns: of one image, or of several narrow ones. Along a row, a level is a
// product of the segments' windows (16 x WINDOW inputs, each window starting WINDOW / 4 columns left of its segment)
// with a banded matrix of the kernel row's taps (WINDOW x 8). Levels follow each other down the map, four rows at a
// time; what they read of each other lies in rings of rows in shared memory, so no level recomputes what a neighbour
// has.
#pragma once

#include <algorithm>

#include "cuda/mma.h"
#include "cuda/pairs.h"

namespace focalnet::cuda {

// Rows first .. first + STEP - 1 of ctx as this lane holds them, with its bias; zeros outside of the map.
template <class T>
__device__ __forceinline__ void load_ctx(const Lines<const T>& lines, const Vector& biases, float bias,
                                         const RowRange& map, int first, PairRows& to) {
  lines.load(to, first, map);
  if (!biases.data) return;
  for_pairs([&](int r, int i) { to[r][i] = pack<T>(unpack<T>(to[r][i], 0) + bias, unpack<T>(to[r][i], 1) + bias); });
  clear_outside(to, first, map);
}

// Which of a ring's rows is row t of the map. A remainder by a product: a division takes 20 instructions.
__device__ inline int ring_slot(int t, Ring ring) {
  const uint32_t n = uint32_t(t + ring.shift);  // below 2^21, for which the product is exact
  return int(n - __umulhi(n, ring.inverse) * ring.rows);
}

// What rows' owners do one after the other: a channel, some rows of it, in some groups of images.
struct Task {
  int64_t channel, strip, run;
  RowRange rows;
  int64_t first_group, last_group;  // this one is not among them
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
  RowRange map;
  int window_at;  // of the row that this lane passes to ldmatrix

  __device__ Rows(const RowsPlan& plan, const Geometry& g)
      : plan(plan),
        owner(plan.layout.warps > 1 ? 0 : threadIdx.x / 32),
        thread(plan.layout.warps > 1 ? threadIdx.x : threadIdx.x % 32),
        memory(shared_memory<T>() + owner * plan.shared.elements),
        map{0, int(g.T)} {
    const RowsLayout& layout = plan.layout;
    const int lane = threadIdx.x % 32, warp = layout.warps > 1 ? threadIdx.x / 32 : 0;
    for (int i = thread * 8; i < plan.shared.rings; i += 8 * 32 * layout.warps)  // borders stay zeros
      *reinterpret_cast<uint4*>(memory + i) = {};
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
      f(Task{i % g.C,
             strip,
             run,
             {begin, end},
             run * schedule.run,
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

  __device__ T* row_of(Ring ring, int t) const { return memory + ring.first + ring_slot(t, ring) * ring.row; }
  // f(r, where row t + r of a ring lies) for STEP rows, wherever they begin.
  template <class F>
  __device__ __forceinline__ void each_row(Ring ring, int t, const F& f) const {
    T *const begin = memory + ring.first, *const end = begin + ring.rows * ring.row;
    T* row = row_of(ring, t);
#pragma unroll
    for (int r = 0; r < STEP; ++r) {
      f(r, row);
      row += ring.row;
      if (row == end) row = begin;
    }
  }
  // Puts rows first .. first + STEP - 1 into a ring; zeros outside of the map's columns.
  __device__ __forceinline__ void put(Ring ring, int first, const Pairs& pairs, const PairRows& rows) const {
    T* const to = row_of(ring, first);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (!pairs.in_row[i]) continue;
      T* const column = to + pairs.at[i];
#pragma unroll
      for (int r = 0; r < STEP; ++r) store_word(column + r * ring.row, rows[r][i] & pairs.inside[i]);
    }
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
    const MapView& v = level.weights;
    for (int half = 0; half < halves; ++half) {
      const T* from = element<const T>(v, 0, channel, flipped ? kt - 1 : 0, 0, 0);
      const int first = half * 16 + lane % 4 * 2 - lane / 4 - shift;  // tap; others are 1, 8 and 9 further
      bool inside[4];
      int64_t column[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int tap = first + j % 2 + j / 2 * 8;
        inside[j] = tap >= 0 && tap < kw;
        column[j] = (flipped ? kw - 1 - tap : tap) * v.w;
      }
      Quad<T>* to = reinterpret_cast<Quad<T>*>(memory + at) + half * 32 + lane;
      for (int dt = 0; dt < kt; ++dt, to += halves * 32, from += flipped ? -v.t : v.t) {
        Quad<T> taps = {};
#pragma unroll
        for (int j = 0; j < 4; ++j)
          if (inside[j]) taps.values[j] = from[column[j]];
        *to = taps;
      }
    }
  }
  // Those of all levels of a chain, by the first warp of the rows' owner.
  __device__ void make_all_bands(const Chain& chain, int64_t channel, bool flipped) const {
    for (int l = 0; l < chain.L && thread < 32; ++l)
      make_bands(chain.levels[l], channel, plan.shared.bands[l], flipped);
  }

  // This lane's rows for ldmatrix, one after the other, of a ring from row t on: a window of a kernel K rows tall whose
  // last rows are the last that were put. Only before STEP rows that were put together the ring may begin again.
  template <int K>
  struct WindowRows {
    static constexpr int START = K / 2 % 2 * 2;  // row t, of those it was put with
    SharedRow at, begin, end;
    int bytes;
    __device__ WindowRows(const Rows& rows, Ring ring, int t) : bytes(2 * ring.row) {
      begin = shared_row(rows.memory + rows.window_at) + 2 * ring.first, end = begin + ring.rows * bytes;
      at = begin + ring_slot(t, ring) * bytes;
    }
    // The i-th; to be called with i = 0, 1, ...
    __device__ SharedRow operator()(int i) {
      if (i > 0) at += bytes;
      if (i > 0 && (START + i) % STEP == 0 && at == end) at = begin;
      return at;
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
    WindowRows<K> window(*this, ring, first - K / 2);
#pragma unroll
    for (int i = 0; i < K + STEP - 1; ++i) {
      const SharedRow row = window(i);
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

  // sums[dt] += the products of a level's inputs, moved by kernel row dt, with the gradients of four rows of its
  // outputs: element (j, i) of input j of a window (16 to a half) and output i. Taps are its diagonals.
  template <int K, int HALVES>
  __device__ __forceinline__ void add_products(float (&sums)[K][HALVES][4], Ring ring, int first, const Pairs& pairs,
                                               const PairRows& grad) const {
    uint2 columns[STEP];
#pragma unroll
    for (int r = 0; r < STEP; ++r)
      columns[r] = {transpose(grad[r][0] & pairs.inside[0]), transpose(grad[r][1] & pairs.inside[1])};
    WindowRows<K> window(*this, ring, first - K / 2);
#pragma unroll
    for (int i = 0; i < K + STEP - 1; ++i) {
      const SharedRow row = window(i);
#pragma unroll
      for (int half = 0; half < HALVES; ++half) {
        uint32_t windows[4];
        half == 0 ? load_transposed<0>(windows, row) : load_transposed<32>(windows, row);
        const uint32_t turned[4] = {windows[0], windows[2], windows[1], windows[3]};
#pragma unroll
        for (int r = 0; r < STEP; ++r)
          if (i >= r && i - r < K) multiply_add<T>(sums[i - r][half], turned, columns[r]);
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
    if (lane >= kw) return 0;
    const float* const first = area + (lane + HALVES * 4 - kw / 2) * 8;
    float sum = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) sum += first[i * 9];
    return sum;
  }
};

// A task's rows of a chain's last level, and with them what all levels need: `enter(t, rows)` gives rows t .. t
// + STEP - 1 of what enters the first, `leave(l, t, acc, rows)` takes those of what leaves level l's convolution and
// turns them into what enters the next.
template <int WINDOW, class T, class ENTER, class LEAVE>
__device__ __forceinline__ void stream_rows(const Rows<T>& rows, const Chain& chain, const Task& task,
                                            const Pairs& pairs, const ENTER& enter, const LEAVE& leave) {
  const RowsLayout& layout = rows.plan.layout;
  const RowsShared& shared = rows.plan.shared;
  const int L = chain.L, all = layout.reach[L];
  PairRows next;
  // the last level's rows begin at `t`, level l's all - reach[l] further down, what enters the first at t + all
  int t = task.rows.begin - (all + 1) / 2 * STEP;
  enter(t + all, next);
  for (; t < task.rows.end; t += STEP) {
    rows.put(shared.inputs[0], t + all, pairs, next);
    rows.sync();
    if (t + STEP < task.rows.end) enter(t + STEP + all, next);
    for (int l = 0; l < L; ++l) {
      const int first = t + all - layout.reach[l + 1], kt = int(chain.levels[l].size.kt);
      PairRows values = {};
      if (rows.map.has_any(first) && (l + 1 < L || first + STEP > task.rows.begin)) {
        float acc[STEP][4];
        rows.template convolve<WINDOW>(acc, kt, shared.inputs[l], shared.bands[l], first);
        leave(l, first, acc, values);
        clear_outside(values, first, rows.map);
      }
      if (l + 1 < L) rows.put(shared.inputs[l + 1], first, pairs, values);
      rows.sync();
    }
  }
}

}  // namespace focalnet::cuda

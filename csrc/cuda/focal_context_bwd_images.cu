// focal_context, backward, of whole images in shared memory, in one launch: a block runs the levels again, each into
// planes of its own, and follows the gradient down through them. ops/focal_context/README.md derives the gradients.
#include "cuda/images.h"
#include "cuda/images_plan.h"

namespace focalnet::cuda {

namespace {

// A block's channels, AT_ONCE of which have planes at a time: as many as shared memory has room for.
constexpr int CHANNELS = 8, WIDE = 56;  // WIDE: a pitch from which on that may be 2, not 4
constexpr int PRODUCT = 16 * EIGHT;     // elements
template <int AT_ONCE>
using Block = ImagesBlock<AT_ONCE, CHANNELS>;

struct Arguments;

// Where things begin in shared memory, in bytes.
struct Offsets {
  int grads, gates, taps, stretches, pixels, area, means, biases, tap_sums, end;
  Offsets() = default;
  Offsets(const Arguments& p, const ImagesLayout& layout);
};

struct Arguments {
  ContextBackward call;
  ImagesLayout layout;
  Vectors vectors;
  Offsets offsets;
  int taps_stride, all_taps;            // elements from a channel's taps to the next one's; all levels' taps
  OfLevels size, first_row, first_tap;  // of a level's kernel; of all levels' kernel rows, and taps
  Divisor parts;                        // of the mean's sums of an image,
  int part_pairs;                       // and pairs of pixels in each
};

// As many rows as registers allow and images fill.
__host__ __device__ constexpr int stretch_rows(int pitch) { return pitch == WIDEST || pitch == EIGHT ? SPACING : HALF; }

// Products for a kernel's taps that a warp sums at once: two kernel rows, but one where shared memory is full.
__host__ __device__ constexpr int products_at_once(int pitch) { return pitch > WIDE ? 1 : 2 / window_rows(pitch); }

// LANES threads sum what reaches the mean of a part of an image; and floats that all threads leave.
constexpr int LANES = 4;
__host__ __device__ constexpr int parts_of(const ImagesLayout& layout) {
  return std::max(1, layout.warps * 32 / LANES / layout.images);
}
__host__ __device__ constexpr int area_of(const ImagesLayout& layout) {
  return std::max(layout.threads() / 32 * products_at_once(layout.pitch) * PRODUCT,
                  layout.images * parts_of(layout) * layout.channels);
}

// Things in shared memory.
template <class T, int AT_ONCE>
struct Shared {
  T* planes;         // of channels: what enters the first level, and what leaves each; later what reaches that, and dz
  T *grads, *gates;  // without zeros around: the result's gradient of each channel; all gates
  T* taps;           // [CHANNELS][kernel rows][TAPS_ROW]
  Stretch* stretches;
  Place* pixels;
  float* area;      // [warps][products at once][PRODUCT]; also [images][parts][AT_ONCE] sums for means
  float2* means;    // [images][AT_ONCE]: the mean's scaled GELU, and what reaches pixels through the mean
  float* biases;    // of the tile's channels, and of the gates
  float* tap_sums;  // [warps of a channel][CHANNELS][taps]
  int plane, tight_plane;
  __device__ explicit Shared(const Arguments& p)
      : planes(shared_memory<T>()), plane(p.layout.plane), tight_plane(p.layout.tight_plane) {
    const auto at = [&](auto*& pointer, int bytes) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(further(planes, bytes));
    };
    const Offsets& o = p.offsets;
    at(grads, o.grads), at(gates, o.gates), at(taps, o.taps), at(stretches, o.stretches);
    at(pixels, o.pixels), at(area, o.area), at(means, o.means), at(biases, o.biases), at(tap_sums, o.tap_sums);
  }
  // What leaves level l - 1, of one of the channels.
  __device__ T* at(int l, int channel) const { return planes + (l * AT_ONCE + channel) * plane; }
  __device__ T* gate(int l) const { return gates + l * tight_plane; }
  // What images that are not there would be: nothing, which adds nothing.
  __device__ void clear() const { fill_zeros(planes, taps - planes); }
};

Offsets::Offsets(const Arguments& p, const ImagesLayout& layout) {
  const int at_once = layout.channels, L = p.call.chain.L;
  SharedBytes bytes;
  bytes.take((L + 1) * at_once * layout.plane, 2);
  grads = bytes.take(at_once * layout.tight_plane, 2);
  gates = bytes.take((L + 1) * layout.tight_plane, 2);
  taps = bytes.take(CHANNELS * p.taps_stride, 2);
  stretches = bytes.take(layout.all_listed(), sizeof(Stretch));
  pixels = bytes.take(layout.places, sizeof(Place));
  area = bytes.take(area_of(layout), 4);
  means = bytes.take(at_once * layout.images, sizeof(float2));
  biases = bytes.take(CHANNELS + LEVELS + 1, 4);
  tap_sums = bytes.take(layout.warps * CHANNELS * p.all_taps, 4);
  end = int(bytes.taken);
}

// What enters the first level, the result's gradient and, before a tile's first channels, the gates, into planes; their
// biases are added where the product left them to us.
template <class T, int N, int GROUP, int AT_ONCE>
__device__ void load_images(const Arguments& p, const Shared<T, AT_ONCE>& shared, const Block<AT_ONCE>& block,
                            int first) {
  const Chain& chain = p.call.chain;
  const T* const ctx = block.template in<const T>(chain.ctx, block.channel + first);
  const T* const grads = block.template in<const T>(p.call.grad_out, block.channel + first);
  const T* const gates = block.template in<const T>(chain.gates, 0);
  each_access(p.layout, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    const T *const ctx_here = at.in(ctx, chain.ctx), *const grads_here = at.in(grads, p.call.grad_out);
    Pixels<T, N> entering[AT_ONCE], gradient[AT_ONCE];
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c) {
      entering[c] = load_pixels<T, N>(ctx_here + c * chain.ctx.c);
      gradient[c] = load_pixels<T, N>(grads_here + c * p.call.grad_out.c);
    }
    if (first == 0) {
      const T* const gates_here = at.in(gates, chain.gates);
#pragma unroll
      for (int l = 0; l <= LEVELS; ++l) {
        if (l > chain.L) break;
        Pixels<T, N> gate = load_pixels<T, N>(gates_here + l * chain.gates.c);
        if (chain.gates_bias.data) gate.set([&](int j) { return gate[j] + shared.biases[CHANNELS + l]; });
        at.store_tight(shared.gate(l), gate);
      }
    }
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c) {
      if (chain.ctx_bias.data) entering[c].set([&](int j) { return entering[c][j] + shared.biases[first + c]; });
      at.store(shared.at(0, c), entering[c]);
      at.store_tight(shared.grads + c * shared.tight_plane, gradient[c]);
    }
  });
}

// What reaches the mean of each channel and image, gradients times its gate, in parts.
template <class T, int AT_ONCE>
__device__ void sum_for_mean(const Arguments& p, const Shared<T, AT_ONCE>& shared, int images) {
  constexpr int OF_PART = LANES * AT_ONCE, OF_WARP = 32 / OF_PART;
  const int pairs = int(p.call.chain.g.T) * p.layout.tight_pitch / 2, sums = images * int(p.parts.divisor);
  const int lane = threadIdx.x % LANES, channel = threadIdx.x / LANES % AT_ONCE;
  const T *const grads = shared.grads + channel * shared.tight_plane, *const gates = shared.gate(p.call.chain.L);
  for (int i = threadIdx.x / OF_PART; i - i % OF_WARP < sums; i += int(blockDim.x) / OF_PART) {  // by whole warps
    const int image = p.parts.divide(i), first = (i - image * int(p.parts.divisor)) * p.part_pairs;
    const int of_part = pairs - first < p.part_pairs ? pairs - first : p.part_pairs;
    const int begin = image * pairs + first, end = i < sums ? begin + of_part : 0;
    float sum = 0;
#pragma unroll 4
    for (int pair = begin + lane; pair < end; pair += LANES) {
      const uint32_t grad = load_word(grads + 2 * pair), gate = load_word(gates + 2 * pair);
      sum += unpack<T>(grad, 0) * unpack<T>(gate, 0) + unpack<T>(grad, 1) * unpack<T>(gate, 1);
    }
#pragma unroll
    for (int offset = LANES / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (lane == 0 && i < sums) shared.area[i * AT_ONCE + channel] = sum;
  }
}
template <class T, int AT_ONCE>
__device__ void mean_gradient(const Arguments& p, const Shared<T, AT_ONCE>& shared, const Block<AT_ONCE>& block,
                              int first) {
  const Geometry& g = p.call.chain.g;
  for (int i = threadIdx.x; i < AT_ONCE * block.images; i += blockDim.x) {
    const int channel = i % AT_ONCE, image = i / AT_ONCE;
    float sum = 0;
    const int parts = int(p.parts.divisor);
    for (int part = 0; part < parts; ++part) sum += shared.area[(image * parts + part) * AT_ONCE + channel];
    const float mean = p.call.mean[(block.first_image + image) * g.C + block.channel + first + channel];
    shared.means[i].y = sum * p.call.chain.scale / float(p.layout.pixels) * gelu_slope<float>(mean);
  }
}

// With all levels in their planes, of the last what enters its GELU: partial sums of the gates' gradients, to which a
// tile's later channels add; the forward's result again; and dz of the last level, over z.
template <class T, int N, int GROUP, int AT_ONCE>
__device__ void last_gradient(const Arguments& p, const Shared<T, AT_ONCE>& shared, const Block<AT_ONCE>& block,
                              int first) {
  const Chain& chain = p.call.chain;
  const int L = chain.L, pixels = p.layout.pixels;
  const int64_t of_gate = chain.g.B * pixels;
  float* const sums_here = p.call.gate_sums + block.tile * (L + 1) * of_gate + block.first_image * pixels;
  const MapView& result = p.call.ctx_all;
  T* const out = result.data ? block.template in<T>(result, block.channel + first) : nullptr;
  each_access(p.layout, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    T* const out_here = at.in(out, result);
    const auto gradient_of = [&](int c) { return at.load_tight(shared.grads + c * shared.tight_plane); };
    const auto add = [&](int gate, float (&sums)[N], float scale) {
      if (!p.call.gate_sums) return;
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] *= scale;
      add_floats<N>(sums_here + gate * of_gate + at.first, sums, first > 0);
    };
    for (int l = 0; l + 1 < L; ++l) {
      float sums[N] = {};
#pragma unroll
      for (int c = 0; c < AT_ONCE; ++c) {
        const Pixels<T, N> gradient = gradient_of(c), level = at.load(shared.at(l + 1, c));
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += gradient[j] * level[j];
      }
      add(l, sums, chain.scale);
    }
    const Pixels<T, N> gate = at.load_tight(shared.gate(L - 1));
    float sums[N] = {}, of_mean[N] = {};
#pragma unroll 1  // side by side they take more registers than there are
    for (int c = 0; c < AT_ONCE; ++c) {
      T* const plane = shared.at(L, c);
      const Pixels<T, N> gradient = gradient_of(c), z = at.load(plane);
      float slopes[N], levels[N];
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const Gelu level = gelu_and_slope<T>(z[j]);
        slopes[j] = level.slope, levels[j] = gate[j] * level.value;
        sums[j] += gradient[j] * level.value;
      }
      float2 means[N / GROUP];  // of each few neighbours' image
#pragma unroll
      for (int j = 0; j < N / GROUP; ++j) means[j] = shared.means[at.places[j].image() * AT_ONCE + c];
#pragma unroll
      for (int j = 0; j < N; ++j) of_mean[j] += gradient[j] * means[j / GROUP].x;
      Pixels<T, N> dz;
      dz.set([&](int j) { return (gate[j] * chain.scale * gradient[j] + means[j / GROUP].y) * slopes[j]; });
      at.store(plane, dz);
      if (result.data) {
        for (int l = 0; l + 1 < L; ++l) {
          const Pixels<T, N> of_level = at.load_tight(shared.gate(l)), level = at.load(shared.at(l + 1, c));
#pragma unroll
          for (int j = 0; j < N; ++j) levels[j] += of_level[j] * level[j];
        }
        const Pixels<T, N> mean_gate = at.load_tight(shared.gate(L));
        Pixels<T, N> sum;
        sum.set([&](int j) { return levels[j] * chain.scale + mean_gate[j] * means[j / GROUP].x; });
        store_pixels(out_here + c * result.c, sum);
      }
    }
    add(L - 1, sums, chain.scale);
    add(L, of_mean, 1);
  });
}

// Adds a warp's products to its part of a level's taps' gradients: of each kernel row, the sums along diagonals of a
// matrix of 16 x 8, or of either half of it, of which lane 4 g + q has columns 2 q and 2 q + 1 of rows g and g + 8.
template <int PITCH, int K>
__device__ void add_taps(const float (&products)[WINDOWS<PITCH, K>][4], float* area, float* taps) {
  constexpr int AT_ONCE = products_at_once(PITCH), HALVES = window_rows(PITCH), ROWS = AT_ONCE * HALVES;
  constexpr int LANES = 32 / ROWS, PARTS = K > EIGHT ? LANES / 16 : LANES / EIGHT;  // lanes of a kernel row, of a tap
  constexpr int COLUMNS = EIGHT / PARTS, MATRIX = PRODUCT / HALVES;                 // of a lane; of a kernel row
  const int lane = threadIdx.x % 32, at = lane / 4 * EIGHT + lane % 4 * 2;
  const int here = lane / LANES, tap = lane % LANES / PARTS, first = lane % PARTS * COLUMNS;
  const int first_row = first + tap + border(PITCH) - K / 2;
  const float* const diagonal = area + here * MATRIX + first_row * EIGHT + first;
#pragma unroll
  for (int product = 0; product < WINDOWS<PITCH, K>; product += AT_ONCE) {
#pragma unroll
    for (int i = 0; i < AT_ONCE; ++i)
      if (product + i < WINDOWS<PITCH, K>) {
        const float (&m)[4] = products[product + i];
        float2* const to = reinterpret_cast<float2*>(area + i * PRODUCT + at);
        to[0] = float2{m[0], m[1]}, to[PRODUCT / 4] = float2{m[2], m[3]};
      }
    __syncwarp();
    const int row = product * HALVES + here;
    const bool is_there = tap < K && row < K;
    float sum = 0;
    if (is_there)
#pragma unroll
      for (int j = 0; j < COLUMNS; ++j)  // only half a product's matrix ends before its diagonals do
        if (HALVES == 1 || unsigned(first_row + j) < EIGHT) sum += diagonal[j * (EIGHT + 1)];
#pragma unroll
    for (int offset = PARTS / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
    if (is_there && first == 0) taps[row * K + tap] += sum;
    __syncwarp();
  }
}

// A step's part of a level's taps' gradients, as products over pixels: what enters, transposed, times dz gives a matrix
// (16 elements of the window) x (8 columns) whose diagonals add up to a kernel row's taps.
template <class T, class FORM, int K>
__device__ void add_step(SharedRow windows, const uint2 (&dz)[FORM::ROWS], float* area, float* taps) {
  constexpr int PITCH = FORM::PITCH;
  float products[WINDOWS<PITCH, K>][4] = {};
  each_constant<WINDOW_ROWS<FORM, K>>([&](auto row) {
    uint32_t a[4];
    load_transposed<2 * PITCH*(row - K / 2)>(a, windows);
#pragma unroll
    for (int e = 0; e < FORM::ROWS; ++e) {
      const int i = window_of<PITCH, K>(row, e);
      if (i >= 0) multiply_add<T>(products[i], a, dz[e]);
    }
  });
  add_taps<PITCH, K>(products, area, taps);
}

// dz of a level, over what reaches it from above, but for the last level, which has it; and what a step adds to the
// level's taps' gradients.
template <class T, class FORM, int AT_ONCE>
__device__ void level_gradient(const Arguments& p, const Shared<T, AT_ONCE>& shared, const Block<AT_ONCE>& block, int l,
                               const T* taps, int diagonals, float* tap_sums) {
  constexpr int PITCH = FORM::PITCH, ROWS = FORM::ROWS;
  const Chain& chain = p.call.chain;
  const int c = block.channel_here, tight_bytes = 2 * p.layout.tight_pitch;
  const T* const from = shared.at(l, c);
  T* const to = shared.at(l + 1, c);
  const T *const grads = shared.grads + c * shared.tight_plane, *const gates = shared.gate(l);
  float* const area = shared.area + threadIdx.x / 32 * products_at_once(PITCH) * PRODUCT;
  block.each_step(p.layout, [&](int first) {
    const Stretch* const units = shared.stretches + first;
    uint32_t dz[ROWS][2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
      const Part<FORM> part(units + u * EIGHT);
      const SharedRow here = shared_row(part.in(to));
      each_constant<ROWS>([&](auto e) { dz[e][u] = load_shared_row<2 * PITCH * e, e>(here, part.rows()); });
    }
    if (l + 1 < chain.L) {
      float z[ROWS][4];
      convolve<FORM>(p.size[l], taps, diagonals, false, from, units, z);
#pragma unroll
      for (int u = 0; u < 2; ++u) {
        const Part<FORM> part(units + u * EIGHT);
        const SharedRow here = shared_row(part.in(to));
        const T *grads_here = part.in_tight(grads), *gates_here = part.in_tight(gates);
        each_constant<ROWS>([&](auto e) {
          const uint32_t grad = load_word(grads_here), gate = load_word(gates_here);
          float both[2];
#pragma unroll
          for (int i = 0; i < 2; ++i)
            both[i] = (unpack<T>(gate, i) * chain.scale * unpack<T>(grad, i) + unpack<T>(dz[e][u], i)) *
                      gelu_slope<T>(z[e][2 * u + i]);
          const uint32_t word = part.template masked<T>(both);
          store_shared_row<2 * PITCH * e, e>(here, part.rows(), word);
          dz[e][u] = e < part.rows() ? word : 0;
          grads_here = further(grads_here, tight_bytes), gates_here = further(gates_here, tight_bytes);
        });
      }
    }
    if (!p.call.weight_sums) return;
    uint2 columns[ROWS];
#pragma unroll
    for (int e = 0; e < ROWS; ++e) columns[e] = uint2{transpose(dz[e][0]), transpose(dz[e][1])};
    const SharedRow windows = window_in<true>(from, units);
    with_size(p.size[l], [&](auto K) { add_step<T, FORM, K>(windows, columns, area, tap_sums); });
  });
}

// Out of the planes: the gradient of what entered the first level.
template <class T, int N, int GROUP, int AT_ONCE>
__device__ void store_images(const Arguments& p, const Shared<T, AT_ONCE>& shared, const Block<AT_ONCE>& block,
                             int first) {
  const MapView& map = p.call.grad_ctx;
  T* const out = block.template in<T>(map, block.channel + first);
  each_access(p.layout, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    T* const to = at.in(out, map);
#pragma unroll
    for (int c = 0; c < AT_ONCE; ++c) store_pixels(to + c * map.c, at.load(shared.at(0, c)));
  });
}

// What some of a tile's channels do to some images' gradients. (Inlined: its arguments would lie in memory.)
template <class T, class FORM, int AT_ONCE>
__device__ __forceinline__ void run_images(const Arguments& p, const Shared<T, AT_ONCE>& shared,
                                           const Block<AT_ONCE>& block, int first) {
  const Chain& chain = p.call.chain;
  const Geometry& g = chain.g;
  const ImagesLayout& layout = p.layout;
  const int L = chain.L, c = block.channel_here;
  const auto vectors = [&](const auto& f) { with_vectors<FORM::WHOLE>(p.vectors, layout, f); };
  const auto taps = [&](int l) { return shared.taps + ((first + c) * p.taps_stride + p.first_row[l] * TAPS_ROW); };

  for (int i = threadIdx.x; i < AT_ONCE * block.images; i += blockDim.x) {
    const int64_t channel = block.channel + first + i % AT_ONCE;
    shared.means[i].x = gelu<float>(p.call.mean[(block.first_image + i / AT_ONCE) * g.C + channel]) * chain.scale;
  }
  vectors([&](auto n, auto group) { load_images<T, n, group>(p, shared, block, first); });
  __syncthreads();
  sum_for_mean(p, shared, block.images);
  // the levels again, turns 0 to L - 1, and back, turns -L to -1, in one loop: so there is one convolution in the code
  const int diagonals = of_diagonals();
  int turn = 0;
  do {
    const bool back = turn < 0;
    const int l = back ? ~turn : turn;
    if (back) {
      const int tap_sums = (block.part * CHANNELS + first + c) * p.all_taps + p.first_tap[l];
      level_gradient<T, FORM>(p, shared, block, l, taps(l), diagonals, shared.tap_sums + tap_sums);
      __syncthreads();
      if (l == 0 && !p.call.grad_ctx.data) return;
    }
    const T* const from = shared.at(back ? l + 1 : l, c);
    T* const to = shared.at(back ? l : l + 1, c);
    block.each_step(layout, [&](int first) {
      const Stretch* const units = shared.stretches + first;
      float acc[FORM::ROWS][4];
      convolve<FORM>(p.size[l], taps(l), diagonals, back, from, units, acc);
      if (!back && l + 1 < L) apply_gelu<T>(acc);
      store_step<FORM>(units, acc, to);
    });
    if (!back) {  // the next level back takes only what this lane has written
      __syncthreads();
      if (l == 0) mean_gradient(p, shared, block, first);
    }
    if (++turn == L) {
      if (L == 1) __syncthreads();  // for the mean's gradient
      vectors([&](auto n, auto group) { last_gradient<T, n, group>(p, shared, block, first); });
      __syncthreads();
      if (!p.call.grad_ctx.data && !p.call.weight_sums) return;
      turn = -L;
    }
  } while (turn != 0);
  __syncthreads();
  // no barrier after it: a thread has the same pixels when the next images are loaded
  vectors([&](auto n, auto group) { store_images<T, n, group>(p, shared, block, first); });
}

template <class T, int PITCH, bool WHOLE, int AT_ONCE>
__global__ void __launch_bounds__(512, 1) images_bwd_kernel(Arguments p) {
  const Chain& chain = p.call.chain;
  const Geometry& g = chain.g;
  const ImagesLayout& layout = p.layout;
  const Shared<T, AT_ONCE> shared(p);
  const int all_taps = CHANNELS * p.all_taps;

  shared.clear();
  fill_zeros(shared.taps, CHANNELS * p.taps_stride);
  list_places(g, layout, shared.stretches, shared.pixels);
  const int channel = Block<AT_ONCE>(layout, 0, g).channel;
  for (int i = threadIdx.x; i < CHANNELS + LEVELS + 1; i += blockDim.x)
    shared.biases[i] = i < CHANNELS              ? of_vector<T>(chain.ctx_bias, channel + i)
                       : i - CHANNELS <= chain.L ? of_vector<T>(chain.gates_bias, i - CHANNELS)
                                                 : 0.0f;
  for (int i = threadIdx.x; i < layout.warps * all_taps; i += blockDim.x) shared.tap_sums[i] = 0;
  __syncthreads();
  for (int l = 0; l < chain.L; ++l)
    load_taps<CHANNELS>(chain.levels[l], channel, shared.taps + p.first_row[l] * TAPS_ROW, p.taps_stride);
  constexpr int PASSES = CHANNELS / AT_ONCE;
  const int run = Block<AT_ONCE>::run_of(layout);
  for (int pass = 0;; ++pass) {  // what is made anew of one counter takes no registers meanwhile
    const int item = Block<AT_ONCE>::run_of(layout) + pass / PASSES * int(layout.runs);
    const int first = pass % PASSES * AT_ONCE;
    if (item >= layout.image_blocks) break;
    const Block<AT_ONCE> block(layout, item, g);
    if (first == 0 && block.images != layout.images) {  // the last ones
      __syncthreads();
      shared.clear();
      __syncthreads();
    }
    run_images<T, Form<PITCH, stretch_rows(PITCH), WHOLE>>(p, shared, block, first);
  }
  if (!p.call.weight_sums) return;  // which the last barrier came after
  for (int i = threadIdx.x; i < all_taps; i += blockDim.x) {
    float sum = 0;
    for (int warp = 0; warp < layout.warps; ++warp) sum += shared.tap_sums[warp * all_taps + i];
    p.call.weight_sums[(int64_t(run) * g.C + channel) * p.all_taps + i] = sum;
  }
}

Arguments arguments_of(const ContextBackward& call) {
  Arguments p{call};
  int rows = 0;
  for (int l = 0; l < call.chain.L; ++l) {
    const Level& size = call.chain.levels[l].size;
    p.size.set(l, int(size.kw)), p.first_row.set(l, rows), p.first_tap.set(l, p.all_taps);
    rows += int(size.kt), p.all_taps += int(size.taps());
  }
  p.taps_stride = rows * TAPS_ROW;
  return p;
}

}  // namespace

std::optional<ImagesBackwardPlan> plan_images_bwd(const ContextBackward& call) {
  const Chain& chain = call.chain;
  const Geometry& g = chain.g;
  if (!takes_images(chain)) return std::nullopt;
  const Arguments p = arguments_of(call);
  const auto bytes = [&](const ImagesLayout& l) { return Offsets(p, l).end; };
  for (int at_once : {4, 2}) {
    ImagesLayout layout{};
    const BlockForm form{at_once, CHANNELS, 16 / at_once, 2, stretch_rows(pitch_of(g))};
    if (!lay_out(g, reach_of(chain), form, bytes, layout)) continue;
    if (at_once < 4 && layout.pitch < WIDE) break;
    const auto vectors = vectors_of(g, layout, {chain.ctx, chain.gates, call.grad_out, call.grad_ctx, call.ctx_all});
    if (!vectors) return std::nullopt;
    return ImagesBackwardPlan{layout, *vectors};
  }
  return std::nullopt;
}

void run_context_bwd(const ContextBackward& call, const ImagesBackwardPlan& plan, void* stream) {
  Arguments p = arguments_of(call);
  p.layout = plan.layout, p.vectors = plan.vectors, p.offsets = Offsets(p, plan.layout);
  const int parts = parts_of(plan.layout);
  p.parts = Divisor(parts);
  p.part_pairs = (int(call.chain.g.T) * plan.layout.tight_pitch / 2 + parts - 1) / parts;
  const auto run = [&](auto zero) {
    with_layout(p.layout, [&](auto pitch, auto whole) {
      const auto run_at_once = [&](auto at_once) {
        launch(images_bwd_kernel<decltype(zero), pitch, whole, at_once>, p.layout.runs * p.layout.channel_tiles,
               p.layout.threads(), p.offsets.end, stream, p);
      };
      if constexpr (pitch < WIDE)
        run_at_once(std::integral_constant<int, 4>());
      else
        with_constant<4, 2>(p.layout.channels, run_at_once);
    });
  };
  call.chain.dtype == DType::bf16 ? run(__nv_bfloat16()) : run(__half());
}

}  // namespace focalnet::cuda

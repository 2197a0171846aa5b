// focal_context, forward, of whole images in shared memory: all levels, the mean, and what gates make of them in one
// launch.
#include "cuda/images.h"
#include "cuda/images_plan.h"

namespace focalnet::cuda {

namespace {

constexpr int CHANNELS = 4, THREADS = 256, ROWS = SPACING;  // of a block; of a stretch
// On a multiprocessor; more have no room for their accumulators (and float16's erf), or in shared memory.
constexpr int blocks_together(int pitch, bool float16) { return pitch == WIDEST || float16 ? 2 : 3; }
using Block = ImagesBlock<CHANNELS>;

int kernel_rows(const Chain& chain) {
  int rows = 0;
  for (int l = 0; l < chain.L; ++l) rows += int(chain.levels[l].size.kt);
  return rows;
}

// Which of a channel's planes has what leaves level l - 1. What entered a level is not needed once it has left the
// next, but every level's result is, to the end.
__host__ __device__ constexpr int plane_of(int l) { return l < 3 ? l % 2 : l - 1; }
constexpr int planes_for(int L) { return L < 4 ? 2 : L - 1; }
// Which has what gates make of the levels: not the one that the last level reads around each pixel.
__host__ __device__ constexpr int sum_plane(int L) { return 1 - plane_of(L - 1) % 2; }

// Where things begin in shared memory, in bytes.
struct Offsets {
  int gates, mean_gate, taps, stretches, pixels, sums, global, biases, end;
  Offsets() = default;
  Offsets(const Chain& chain, const ImagesLayout& layout);
};

struct Arguments {
  ContextForward call;
  ImagesLayout layout;
  Vectors vectors;
  Offsets offsets;
  float per_pixel;             // 1 / pixels of an image
  int mean_step, taps_stride;  // elements from one pixel of the mean's gate to the next; from a channel's taps
  int size[LEVELS];            // of a level's kernel
  int first_tap[LEVELS], from[LEVELS], to[LEVELS];  // elements: a level's taps; the planes that it reads and writes
};

// Things in shared memory.
template <class T>
struct Shared {
  T* planes;
  T *gates, *mean_gate;  // [pixels][four gates]; the mean's, in there or, as a fifth, behind
  T* taps;
  Stretch* stretches;
  Place* pixels;
  float *sums, *global;  // [stretches][CHANNELS] of the last level; [images][CHANNELS]: GELU of its mean
  float* biases;         // of the channels and of the gates, which the products left to us
  int plane;
  __device__ explicit Shared(const Arguments& p) : planes(shared_memory<T>()), plane(p.layout.plane) {
    const auto at = [&](auto*& pointer, int bytes) {
      pointer = reinterpret_cast<std::remove_reference_t<decltype(pointer)>>(further(planes, bytes));
    };
    const Offsets& o = p.offsets;
    at(gates, o.gates), at(mean_gate, o.mean_gate), at(taps, o.taps), at(stretches, o.stretches);
    at(pixels, o.pixels), at(sums, o.sums), at(global, o.global), at(biases, o.biases);
  }
  __device__ T* at(int plane_index, int channel) const { return planes + (plane_index * CHANNELS + channel) * plane; }
};

Offsets::Offsets(const Chain& chain, const ImagesLayout& layout) {
  SharedBytes bytes;
  bytes.take(layout.planes * CHANNELS * layout.plane, 2);
  gates = bytes.take(4 * layout.tight_plane, 2);
  mean_gate = chain.L < 4 ? gates + 2 * chain.L : bytes.take(layout.tight_plane, 2);
  taps = bytes.take(CHANNELS * kernel_rows(chain) * TAPS_ROW, 2);
  stretches = bytes.take(layout.all_listed(), sizeof(Stretch));
  pixels = bytes.take(layout.places, sizeof(Place));
  sums = bytes.take(CHANNELS * layout.all_listed(), 4);
  global = bytes.take(CHANNELS * layout.images, 4);
  biases = bytes.take(CHANNELS + LEVELS + 1, 4);
  end = int(bytes.taken);
}

template <class T, int N, int GROUP>
__device__ void store_gates(const Shared<T>& shared, const PixelsAt<N, GROUP>& at,
                            const Pixels<T, N> (&gate)[LEVELS + 1]) {
  constexpr int TOGETHER = GROUP > 1 ? 2 : 1;  // pixels that follow one another
  struct alignas(8 * TOGETHER) Gates {
    uint2 of[TOGETHER];
  };
#pragma unroll
  for (int j = 0; j < N; j += TOGETHER) {
    Gates gates;
#pragma unroll
    for (int i = 0; i < TOGETHER; ++i) {
      const auto two = [&](int l) { return halves(gate[l].words[j / 2], gate[l + 1].words[j / 2], (j + i) % 2); };
      gates.of[i] = uint2{two(0), two(2)};
    }
    *reinterpret_cast<Gates*>(shared.gates + 4 * at.tight(j)) = gates;
  }
}

// What enters the first level, and the gates, into planes; their biases are added where the product left them to us.
template <class T, int N, int GROUP>
__device__ void load_images(const Arguments& p, const Shared<T>& shared, const Block& block) {
  const Chain& chain = p.call.chain;
  const T* const ctx = block.in<const T>(chain.ctx, block.channel);
  const T* const gates = block.in<const T>(chain.gates, 0);
  each_access(p.layout, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    const T *const ctx_here = at.in(ctx, chain.ctx), *const gates_here = at.in(gates, chain.gates);
    Pixels<T, N> channels[CHANNELS], gate[LEVELS + 1] = {};
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) channels[c] = load_pixels<T, N>(ctx_here + c * chain.ctx.c);
#pragma unroll
    for (int l = 0; l <= LEVELS; ++l)
      if (l <= chain.L) gate[l] = load_pixels<T, N>(gates_here + l * chain.gates.c);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      if (chain.ctx_bias.data) channels[c].set([&](int j) { return channels[c][j] + shared.biases[c]; });
      at.store(shared.at(0, c), channels[c]);
    }
    if (chain.gates_bias.data)
#pragma unroll
      for (int l = 0; l <= LEVELS; ++l) gate[l].set([&](int j) { return gate[l][j] + shared.biases[CHANNELS + l]; });
    store_gates(shared, at, gate);
    if (chain.L == LEVELS) at.store_tight(shared.mean_gate, gate[LEVELS]);
  });
}

// Level L, the last, as it leaves GELU: its sums over stretches, and what gates make of all levels, into one of their
// planes.
template <class FORM, int L, class T>
__device__ void finish_levels(const Arguments& p, const Shared<T>& shared, const Block& block, int first,
                              const float (&acc)[FORM::ROWS][4]) {
  constexpr int PITCH = FORM::PITCH;
  const float scale = p.call.chain.scale;
  T* const planes = shared.at(0, block.channel_here);
  const int next = CHANNELS * shared.plane;  // from one of the channel's to its next
  const uint4* const gates = reinterpret_cast<const uint4*>(shared.gates);
  const int gates_pitch = p.layout.tight_pitch / 2;  // pairs of pixels
  float sums[2] = {};
#pragma unroll
  for (int u = 0; u < 2; ++u) {
    const Part<FORM> part(shared.stretches + first + u * EIGHT);
    const uint4* gates_here = gates + part.pair();
    T* const here = part.in(planes);
#pragma unroll
    for (int e = 0; e < FORM::ROWS; ++e) {
      const uint4 quad = *gates_here;
      gates_here += gates_pitch;
      const uint32_t gates_of[2][2] = {{quad.x, quad.y}, {quad.z, quad.w}};  // a pixel's, two and two
      const auto gate = [&](int l, int i) { return unpack<T>(gates_of[i][l / 2], l % 2); };
      float pair[2] = {acc[e][2 * u], acc[e][2 * u + 1]};
      part.mask(pair);
      const float sum = pair[0] + pair[1];
#pragma unroll
      for (int i = 0; i < 2; ++i) pair[i] *= gate(L - 1, i);
#pragma unroll
      for (int l = 0; l < L - 1; ++l) {
        const uint32_t level = e < part.rows() ? load_word(here + plane_of(l + 1) * next + e * PITCH) : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) pair[i] += gate(l, i) * unpack<T>(level, i);
      }
      pair[0] *= scale, pair[1] *= scale;
      const uint32_t word = part.template masked<T>(pair);  // gates have no zeros around
      if (e < part.rows()) sums[u] += sum, store_word(here + sum_plane(L) * next + e * PITCH, word);
    }
  }
  sum_stretches<CHANNELS>(sums, shared.sums + first * CHANNELS + block.channel_here);
}

// Level l, into a plane, or the last.
template <class T, class FORM>
__device__ void run_level(const Arguments& p, const Shared<T>& shared, const Block& block, int l) {
  const int c = block.channel_here, L = p.call.chain.L;
  const T* const taps = shared.taps + c * p.taps_stride + p.first_tap[l];
  const T* const from = shared.planes + c * shared.plane + p.from[l];
  T* const to = shared.planes + c * shared.plane + p.to[l];
  block.each_step(p.layout, [&](int first) {
    float acc[FORM::ROWS][4];
    convolve<FORM>(p.size[l], taps, of_diagonals(), false, from, shared.stretches + first, acc);
    apply_gelu<T>(acc);
    if (l + 1 < L) {
      store_step<FORM>(shared.stretches + first, acc, to);
    } else {
      with_constant<1, 2, 3, 4>(L, [&](auto levels) { finish_levels<FORM, levels>(p, shared, block, first, acc); });
    }
  });
}

// Out of its plane: the result, to which the mean's part is added.
template <class T, int N, int GROUP>
__device__ void store_images(const Arguments& p, const Shared<T>& shared, const Block& block) {
  const MapView& map = p.call.out;
  const int plane = sum_plane(p.call.chain.L);
  T* const out = block.in<T>(map, block.channel);
  each_access(p.layout, block.images, N, [&](int i) {
    const PixelsAt<N, GROUP> at(shared.pixels, i, p.layout, p.vectors);
    const Pixels<T, N> gate = at.load_tight(shared.mean_gate, p.mean_step);
    float4 global[N / GROUP];
#pragma unroll
    for (int j = 0; j < N / GROUP; ++j)
      global[j] = reinterpret_cast<const float4*>(shared.global)[at.places[j].image()];
    T* const to = at.in(out, map);
#pragma unroll
    for (int c = 0; c < CHANNELS; ++c) {
      Pixels<T, N> pixels = at.load(shared.at(plane, c));
      pixels.set([&](int j) { return pixels[j] + gate[j] * (&global[j / GROUP].x)[c]; });
      store_pixels(to + c * map.c, pixels);
    }
  });
}

template <class T, int PITCH, bool WHOLE>
__global__ void __launch_bounds__(THREADS, blocks_together(PITCH, std::is_same_v<T, __half>))
    images_fwd_kernel(Arguments p) {
  const Chain& chain = p.call.chain;
  const Geometry& g = chain.g;
  const ImagesLayout& layout = p.layout;
  const Shared<T> shared(p);
  const int L = chain.L;

  fill_zeros(shared.planes, layout.planes * CHANNELS * shared.plane);
  fill_zeros(shared.taps, CHANNELS * p.taps_stride);
  list_places(g, layout, shared.stretches, shared.pixels);
  const int channel = Block(layout, 0, g).channel;
  for (int i = threadIdx.x; i < CHANNELS + LEVELS + 1; i += blockDim.x)
    shared.biases[i] = i < CHANNELS              ? of_vector<T>(chain.ctx_bias, channel + i)
                       : i - CHANNELS <= chain.L ? of_vector<T>(chain.gates_bias, i - CHANNELS)
                                                 : 0.0f;
  __syncthreads();
  for (int l = 0; l < L; ++l)
    load_taps<CHANNELS>(chain.levels[l], channel, shared.taps + p.first_tap[l], p.taps_stride);
  const int runs = int(layout.runs), items = int(layout.image_blocks);
  for (int item = Block::run_of(layout); item < items; item += runs) {
    const Block block(layout, item, g);
    with_vectors<WHOLE>(p.vectors, layout, [&](auto n, auto group) { load_images<T, n, group>(p, shared, block); });
    __syncthreads();
    for (int l = 0; l < L; ++l) {
      run_level<T, Form<PITCH, ROWS, WHOLE>>(p, shared, block, l);
      __syncthreads();
    }
    each_sum<CHANNELS>(layout, block.images, shared.sums, [&](int channel, int image, float sum) {
      const float mean = sum * p.per_pixel;
      p.call.mean[(block.first_image + image) * g.C + block.channel + channel] = mean;
      shared.global[image * CHANNELS + channel] = gelu<float>(mean) * chain.scale;
    });
    __syncthreads();
    // no barrier after it: a thread has the same pixels when the next images are loaded
    with_vectors<WHOLE>(p.vectors, layout, [&](auto n, auto group) { store_images<T, n, group>(p, shared, block); });
  }
}

}  // namespace

std::optional<Vectors> vectors_of(const Geometry& g, const ImagesLayout& layout, std::initializer_list<MapView> maps) {
  const int64_t pixels = g.pixels();
  const auto in_runs = [&](int n, bool one_run) {
    const auto whole = [&](int64_t many) { return many * pixels % n == 0; };
    const auto fits = [&](const MapView& v) {
      const bool aligned = reinterpret_cast<uintptr_t>(v.data) % (2 * n) == 0 && v.c % n == 0;
      const bool next = one_run ? v.b == pixels : g.B == 1 || v.b % n == 0;
      return !v.data || (v.w == 1 && (v.t == g.W || g.T == 1) && aligned && next);
    };
    const bool blocks = layout.images >= g.B || whole(layout.images);
    return std::all_of(maps.begin(), maps.end(), fits) && (one_run ? blocks && whole(g.B) : whole(1));
  };
  for (int n : {4, 1})
    for (bool one_run : {true, false})
      if (in_runs(n, one_run))
        return Vectors{n, Divisor(one_run ? 1 << 16 : pixels / n), one_run, Divisor(layout.period * pixels / n)};
  return std::nullopt;
}

int reach_of(const Chain& chain) {
  int reach = 0;
  for (int l = 0; l < chain.L; ++l) reach = std::max(reach, int(chain.levels[l].size.rt()));
  return reach;
}

bool takes_images(const Chain& chain) {
  const Geometry& g = chain.g;
  const auto square = [](const LevelWeights& level) {
    const Level& k = level.size;
    return k.kt == k.kw && k.km == 1 && k.kw >= 3 && k.kw <= 9;
  };
  const LevelWeights *const first = chain.levels, *const end = first + chain.L;
  return chain.dtype != DType::f32 && chain.L >= 1 && chain.L <= LEVELS && g.C % EIGHT == 0 && g.M == 1 &&
         (g.W <= 6 * EIGHT || g.W == 7 * EIGHT) && g.pixels() <= 49 * EIGHT * EIGHT && std::all_of(first, end, square);
}

std::optional<ImagesPlan> plan_images_fwd(const ContextForward& p) {
  const Chain& chain = p.chain;
  ImagesLayout layout{};
  layout.planes = planes_for(chain.L);
  const auto bytes = [&](const ImagesLayout& l) { return Offsets(chain, l).end; };
  const int together = blocks_together(pitch_of(chain.g), chain.dtype == DType::f16);
  const BlockForm form{CHANNELS, CHANNELS, THREADS / 32 / CHANNELS, together, ROWS};
  if (!takes_images(chain) || !lay_out(chain.g, reach_of(chain), form, bytes, layout)) return std::nullopt;
  const auto vectors = vectors_of(chain.g, layout, {chain.ctx, chain.gates, p.out});
  if (!vectors) return std::nullopt;
  return ImagesPlan{layout, *vectors};
}

void run_context_fwd(const ContextForward& p, const ImagesPlan& plan, void* stream) {
  Arguments arguments{p, plan.layout, plan.vectors, Offsets(p.chain, plan.layout), 1 / float(plan.layout.pixels)};
  arguments.mean_step = p.chain.L < 4 ? 4 : 1;
  const int plane = CHANNELS * plan.layout.plane;
  for (int l = 0; l < p.chain.L; ++l) {
    arguments.size[l] = int(p.chain.levels[l].size.kw);
    arguments.first_tap[l] = arguments.taps_stride;
    arguments.taps_stride += int(p.chain.levels[l].size.kt) * TAPS_ROW;
    arguments.from[l] = plane_of(l) * plane;
    arguments.to[l] = plane_of(l + 1) * plane;  // but for the last, which leaves its sums alone
  }
  const auto run = [&](auto zero) {
    with_layout(plan.layout, [&](auto pitch, auto whole) {
      launch(images_fwd_kernel<decltype(zero), pitch, whole>, plan.layout.runs * plan.layout.channel_tiles,
             plan.layout.threads(), arguments.offsets.end, stream, arguments);
    });
  };
  p.chain.dtype == DType::bf16 ? run(__nv_bfloat16()) : run(__half());
}

}  // namespace focalnet::cuda

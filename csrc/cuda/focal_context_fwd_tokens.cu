// focal_context, forward, over tokens: a pass per level, one for the means, one that gates and sums the levels.
#include "cuda/tokens.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

template <class T, int KW>
__global__ void __launch_bounds__(THREADS, KW > 7 ? 1 : 2) tokens_level_fwd_kernel(LevelForward p) {
  const PassBlock at(p.g, p.plan);
  float* const taps = shared_memory<float>();
  load_tile_taps<T>(p.level, at.first_channel, p.g.C, false, taps);
  __syncthreads();
  float total[4] = {};
  if (at.valid) {
    const SegmentAt s(p.g, at.segment);
    float acc[SEGMENT][4] = {};
    convolve_tokens<T, KW>(element<const T>(p.from, at.image, at.channel, 0, 0, 0), p.from, p.g, p.level.size, s,
                           taps + 4 * at.group, acc);
    T* const z = p.z.data ? element<T>(p.z, at.image, at.channel, s.t, s.m, s.w) : nullptr;
    T* const to = p.to.data ? element<T>(p.to, at.image, at.channel, s.t, s.m, s.w) : nullptr;
#pragma unroll
    for (int i = 0; i < SEGMENT; ++i) {
      if (s.w + i >= p.g.W) break;
      if (z) store_channels(z + i * p.z.w, acc[i]);
      if (!to && !p.sums) continue;
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        acc[i][c] = gelu<T>(acc[i][c]);
        total[c] += acc[i][c];
      }
      if (to) store_channels(to + i * p.to.w, acc[i]);
    }
  }
  if (p.sums) {
    float* const area = taps + p.level.size.taps() * TILE;
    float* const sums = p.sums + (at.image * p.plan.image_blocks + at.block) * p.g.C + at.first_channel;
    sum_lanes(total, area, at.channels(p.g), sums);
  }
}

__global__ void __launch_bounds__(THREADS) tokens_means_kernel(Means p) {
  const int64_t i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= p.B * p.C) return;
  const int64_t b = i / p.C, c = i % p.C;
  double sum = 0;  // few and of one sign, perhaps
  for (int64_t part = 0; part < p.count; ++part) sum += p.parts[(b * p.count + part) * p.C + c];
  const float value = float(sum / p.divisor), mean = p.mean ? p.mean[i] : value;
  p.out[i] = p.mean ? value * gelu_slope<float>(mean) : value;
  p.gelu[i] = gelu<float>(mean);
}

struct Combine {
  Chain chain;
  TokensPlan plan;
  MapView levels[MAX_LEVELS], out;
  const float* global;  // GELU of the mean, (B, C)
};

// A thread has four channels of a token.
template <class T>
__global__ void __launch_bounds__(THREADS) tokens_combine_kernel(Combine p) {
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int64_t quads = g.C / 4, i = int64_t(blockIdx.x) * THREADS + threadIdx.x;
  if (i >= quads * g.B * g.pixels()) return;
  int64_t channel = i % quads * 4, token = i / quads;
  const int w = int(token % g.W), m = int(token / g.W % g.M), t = int(token / (g.W * g.M) % g.T);
  const int64_t b = token / g.pixels();
  const T* gate = element<const T>(chain.gates, b, 0, t, m, w);
  float total[4];
  const float4 global = *reinterpret_cast<const float4*>(p.global + b * g.C + channel);
  const float of_mean = to_float(gate[chain.L * chain.gates.c]);
  total[0] = of_mean * global.x, total[1] = of_mean * global.y;
  total[2] = of_mean * global.z, total[3] = of_mean * global.w;
#pragma unroll
  for (int l = 0; l < MAX_LEVELS; ++l) {
    if (l >= chain.L) break;
    float level[4];
    load_channels(element<const T>(p.levels[l], b, channel, t, m, w), level);
    const float factor = to_float(gate[l * chain.gates.c]);
#pragma unroll
    for (int c = 0; c < 4; ++c) total[c] += factor * level[c];
  }
#pragma unroll
  for (int c = 0; c < 4; ++c) total[c] *= chain.scale;
  store_channels(element<T>(p.out, b, channel, t, m, w), total);
}

TokensPlan plan_of(const Chain& chain, std::initializer_list<MapView> maps, int64_t levels) {
  const Geometry& g = chain.g;
  TokensPlan plan{};
  plan.fits = takes_tokens(chain) && !chain.ctx_bias.data && !chain.gates_bias.data && in_quads(maps, chain.dtype);
  if (!plan.fits) return plan;
  plan.segments = g.T * g.M * ((g.W + SEGMENT - 1) / SEGMENT);
  plan.lanes = THREADS / GROUPS;
  const auto blocks = [&](int lanes) { return (plan.segments + lanes - 1) / lanes; };
  for (int lanes = plan.lanes / 2; lanes >= 8; lanes /= 2)  // of small maps, whatever leaves fewer lanes idle
    if (blocks(lanes) * lanes < blocks(plan.lanes) * plan.lanes) plan.lanes = lanes;
  plan.image_blocks = blocks(plan.lanes);
  plan.channel_tiles = (g.C + TILE - 1) / TILE;
  plan.pitch = (g.C + 7) / 8 * 8;
  const int64_t image = g.pixels() * plan.pitch, bytes = chain.dtype == DType::f32 ? 4 : 2;
  const int64_t room = current_device().scratch / 4 / bytes;
  const int64_t most =
      std::min(room / (levels * image), (int64_t(1) << 31) / (plan.image_blocks * plan.channel_tiles + 1));
  plan.chunk = std::max<int64_t>(1, std::min(g.B, most));
  plan.map = plan.chunk * image;
  plan.elements = levels * plan.map;
  plan.floats = plan.chunk * (std::max<int64_t>(plan.image_blocks, SUM_PARTS) + 2) * g.C;
  return plan;
}

}  // namespace

bool takes_tokens(const Chain& chain) {
  for (int l = 0; l < chain.L; ++l) {
    const Level& k = chain.levels[l].size;
    if (k.kw < 3 || k.kw > 13 || k.taps() > 343) return false;  // 343 taps: 43 KiB of shared memory
  }
  return chain.L > 0 && chain.g.C % 4 == 0;
}

TokensPlan plan_tokens(const ContextForward& p) { return plan_of(p.chain, {p.chain.ctx, p.out}, p.chain.L); }

// Kept by the backward: GELU(z) of all levels but the last, and every z, which turns into its gradient.
TokensPlan plan_tokens(const ContextBackward& p) {
  const Geometry& g = p.chain.g;
  TokensPlan plan = plan_of(p.chain, {p.chain.ctx, p.grad_out, p.grad_ctx, p.ctx_all}, std::max(1, 2 * p.chain.L - 1));
  if (!plan.fits) return plan;
  const int64_t rows = p.chain.levels[p.chain.L - 1].size.kt, units = plan.chunk * plan.image_blocks;
  const int64_t enough = 8 * current_device().processors;  // blocks that a launch should have
  plan.weights_parts = std::max<int64_t>(1, std::min(units, enough / std::max<int64_t>(1, rows * plan.channel_tiles)));
  plan.all_weights_parts = plan.weights_parts * ((g.B + plan.chunk - 1) / plan.chunk);
  return plan;
}

void run_level_fwd(const LevelForward& p, DType dtype, void* stream) {
  const int threads = p.plan.lanes * GROUPS;
  const int64_t shared = p.level.size.taps() * TILE * 4 + (p.sums ? threads * 16 : 0);
  with_type(dtype, [&](auto zero) {
    with_width(p.level.size.kw, [&](auto width) {
      launch(tokens_level_fwd_kernel<decltype(zero), decltype(width)::value>,
             p.g.B * p.plan.image_blocks * p.plan.channel_tiles, threads, shared, stream, p);
    });
  });
}

void run_means(const Means& p, void* stream) {
  launch(tokens_means_kernel, (p.B * p.C + THREADS - 1) / THREADS, THREADS, 0, stream, p);
}

void run_tokens_fwd(const ContextForward& whole, const TokensPlan& plan, void* scratch, float* floats, void* stream) {
  const DType dtype = whole.chain.dtype;
  for (int64_t first = 0; first < whole.chain.g.B; first += plan.chunk) {
    Combine combine{whole.chain, plan, {}, images_from(whole.out, first, dtype), nullptr};
    Chain& chain = combine.chain;
    Geometry& g = chain.g;
    g.B = std::min(plan.chunk, g.B - first);
    chain.ctx = images_from(chain.ctx, first, dtype), chain.gates = images_from(chain.gates, first, dtype);
    float *const sums = floats, *const global = sums + plan.chunk * plan.image_blocks * g.C;
    MapView from = chain.ctx;
    for (int l = 0; l < chain.L; ++l) {
      const MapView to = combine.levels[l] = scratch_map(scratch, l, plan, g, dtype);
      run_level_fwd(LevelForward{g, plan, chain.levels[l], from, {}, to, l + 1 == chain.L ? sums : nullptr}, dtype,
                    stream);
      from = to;
    }
    run_means(Means{g.B, g.C, plan.image_blocks, sums, double(g.pixels()), nullptr, whole.mean + first * g.C, global},
              stream);
    combine.global = global;
    with_type(dtype, [&](auto zero) {
      const int64_t quads = g.B * g.pixels() * (g.C / 4);
      launch(tokens_combine_kernel<decltype(zero)>, (quads + THREADS - 1) / THREADS, THREADS, 0, stream, combine);
    });
  }
}

}  // namespace focalnet::cuda

// focal_context, forward, over tokens: a pass per level, one for the means, one that gates and sums the levels.
#include "cuda/tokens.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

template <class T, int KW>
__global__ void __launch_bounds__(THREADS, KW > 7 ? 1 : 2) tokens_level_fwd_kernel(LevelForward p) {
  const PassBlock at(p.g, p.tiling);
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
    float* const sums = p.sums + (at.image * p.tiling.image_blocks + at.block) * p.g.C + at.first_channel;
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

TokensTiling tiling_of(const Geometry& g) {
  TokensTiling tiling{};
  tiling.segments = g.T * g.M * ((g.W + SEGMENT - 1) / SEGMENT);
  tiling.lanes = THREADS / GROUPS;
  const auto blocks = [&](int lanes) { return (tiling.segments + lanes - 1) / lanes; };
  for (int lanes = tiling.lanes / 2; lanes >= 8; lanes /= 2)  // of small maps, whatever leaves fewer lanes idle
    if (blocks(lanes) * lanes < blocks(tiling.lanes) * tiling.lanes) tiling.lanes = lanes;
  tiling.image_blocks = blocks(tiling.lanes);
  tiling.channel_tiles = (g.C + TILE - 1) / TILE;
  return tiling;
}

// Scratch memory for that many maps.
TokensScratch scratch_of(const Geometry& g, DType dtype, const TokensTiling& tiling, int64_t maps) {
  TokensScratch scratch{};
  scratch.pitch = (g.C + 7) / 8 * 8;
  const int64_t image = g.pixels() * scratch.pitch, bytes = dtype == DType::f32 ? 4 : 2;
  const int64_t available = current_device().scratch / 4 / bytes;
  const int64_t most =
      std::min(available / (maps * image), (int64_t(1) << 31) / (tiling.image_blocks * tiling.channel_tiles + 1));
  scratch.images = std::max<int64_t>(1, std::min(g.B, most));
  scratch.map = scratch.images * image;
  scratch.floats_at = maps * scratch.map * bytes;
  const int64_t floats = scratch.images * (std::max<int64_t>(tiling.image_blocks, SUM_PARTS) + 2) * g.C;
  scratch.bytes = scratch.floats_at + 4 * floats;
  return scratch;
}

std::optional<TokensPlan> plan_tokens(const Chain& chain, std::initializer_list<MapView> maps, int64_t scratch_maps) {
  if (!takes_tokens(chain) || chain.ctx_bias.data || chain.gates_bias.data || !in_quads(maps, chain.dtype))
    return std::nullopt;
  const TokensTiling tiling = tiling_of(chain.g);
  return TokensPlan{tiling, scratch_of(chain.g, chain.dtype, tiling, scratch_maps)};
}

}  // namespace

bool takes_tokens(const Chain& chain) {
  for (int l = 0; l < chain.L; ++l) {
    const Level& k = chain.levels[l].size;
    if (k.kw < 3 || k.kw > 13 || k.taps() > 343) return false;  // 343 taps: 43 KiB of shared memory
  }
  return chain.L > 0 && chain.g.C % 4 == 0;
}

std::optional<TokensPlan> plan_tokens_fwd(const ContextForward& p) {
  return plan_tokens(p.chain, {p.chain.ctx, p.out}, p.chain.L);
}

std::optional<TokensBackwardPlan> plan_tokens_bwd(const ContextBackward& p) {
  const Chain& chain = p.chain;
  // kept: GELU(z) of all levels but the last, and every z, which turns into its gradient
  const std::optional<TokensPlan> tokens =
      plan_tokens(chain, {chain.ctx, p.grad_out, p.grad_ctx, p.ctx_all}, std::max(1, 2 * chain.L - 1));
  if (!tokens) return std::nullopt;
  const TokensTiling& tiling = tokens->tiling;
  const int64_t images = tokens->scratch.images, units = images * tiling.image_blocks;
  const int64_t rows = chain.levels[chain.L - 1].size.kt;
  const int64_t enough = 8 * current_device().processors;  // blocks that a launch should have
  TokensBackwardPlan plan{*tokens, (chain.g.B + images - 1) / images, 0};
  plan.chunk_weight_parts =
      std::max<int64_t>(1, std::min(units, enough / std::max<int64_t>(1, rows * tiling.channel_tiles)));
  return plan;
}

void run_level_fwd(const LevelForward& p, DType dtype, void* stream) {
  const int threads = p.tiling.lanes * GROUPS;
  const int64_t shared = p.level.size.taps() * TILE * 4 + (p.sums ? threads * 16 : 0);
  with_type(dtype, [&](auto zero) {
    with_width(p.level.size.kw, [&](auto width) {
      launch(tokens_level_fwd_kernel<decltype(zero), width>, p.g.B * p.tiling.image_blocks * p.tiling.channel_tiles,
             threads, shared, stream, p);
    });
  });
}

void run_means(const Means& p, void* stream) {
  launch(tokens_means_kernel, (p.B * p.C + THREADS - 1) / THREADS, THREADS, 0, stream, p);
}

void run_context_fwd(const ContextForward& whole, const TokensPlan& plan, void* stream) {
  const DType dtype = whole.chain.dtype;
  const TokensTiling& tiling = plan.tiling;
  const TokensScratch& scratch = plan.scratch;
  float* const sums = reinterpret_cast<float*>(static_cast<char*>(whole.scratch) + scratch.floats_at);
  float* const global = sums + scratch.images * tiling.image_blocks * whole.chain.g.C;
  for (int64_t first = 0; first < whole.chain.g.B; first += scratch.images) {
    Combine combine{whole.chain, {}, images_from(whole.out, first, dtype), global};
    Chain& chain = combine.chain;
    Geometry& g = chain.g;
    g.B = std::min(scratch.images, g.B - first);
    chain.ctx = images_from(chain.ctx, first, dtype), chain.gates = images_from(chain.gates, first, dtype);
    MapView from = chain.ctx;
    for (int l = 0; l < chain.L; ++l) {
      const MapView to = combine.levels[l] = scratch_map(whole.scratch, l, scratch, g, dtype);
      run_level_fwd(LevelForward{g, tiling, chain.levels[l], from, {}, to, l + 1 == chain.L ? sums : nullptr}, dtype,
                    stream);
      from = to;
    }
    run_means(Means{g.B, g.C, tiling.image_blocks, sums, double(g.pixels()), nullptr, whole.mean + first * g.C, global},
              stream);
    with_type(dtype, [&](auto zero) {
      const int64_t quads = g.B * g.pixels() * (g.C / 4);
      launch(tokens_combine_kernel<decltype(zero)>, (quads + THREADS - 1) / THREADS, THREADS, 0, stream, combine);
    });
  }
}

}  // namespace focalnet::cuda

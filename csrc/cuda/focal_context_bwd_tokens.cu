// focal_context, backward, over tokens: the levels are computed again, pass by pass, then followed back.
// ops/focal_context/README.md derives the gradients.
#include "cuda/tokens.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

// The sum over pixels of the last gate times the result's gradient, in SUM_PARTS parts: what reaches the mean.
struct MeanGradient {
  Geometry g;
  int64_t channel_tiles;
  MapView grad, gate;
  float* parts;  // [B][SUM_PARTS][C]
};

template <class T>
__global__ void __launch_bounds__(THREADS) tokens_mean_gradient_kernel(MeanGradient p) {
  const ChannelTile tile(p.channel_tiles);
  const int64_t part = tile.rest % SUM_PARTS, b = tile.rest / SUM_PARTS;
  constexpr int LANES = THREADS / GROUPS;
  const int W = int(p.g.W), M = int(p.g.M), pixels = int(p.g.pixels());
  float sum[4] = {};
  if (tile.channel < p.g.C)
    for (int pixel = int(part) * LANES + int(threadIdx.x) / GROUPS; pixel < pixels; pixel += SUM_PARTS * LANES) {
      const int w = pixel % W, m = pixel / W % M, t = pixel / W / M;
      const float factor = to_float(*element<const T>(p.gate, b, 0, t, m, w));
      float grad[4];
      load_channels(element<const T>(p.grad, b, tile.channel, t, m, w), grad);
#pragma unroll
      for (int c = 0; c < 4; ++c) sum[c] += factor * grad[c];
    }
  sum_lanes(sum, shared_memory<float>(), tile.channels(p.g), p.parts + (b * SUM_PARTS + part) * p.g.C + tile.first);
}

// At every token: the gates' gradients, ctx_all again, and dz of the last level over its z.
struct Gradients {
  Chain chain;
  int lanes;  // that share a token
  MapView grad_out, z[MAX_LEVELS], grad_gates, ctx_all;
  const float *global, *mean_grad;  // (B, C)
  bool want_last;                   // dz of the last level
};

template <class T>
__global__ void __launch_bounds__(THREADS) tokens_gradients_kernel(Gradients p) {
  const Chain& chain = p.chain;
  const Geometry& g = chain.g;
  const int64_t token = (int64_t(blockIdx.x) * THREADS + threadIdx.x) / p.lanes;
  const int lane = threadIdx.x % p.lanes, L = chain.L;
  const bool valid = token < g.B * g.pixels();
  const int64_t i = valid ? token : 0, b = i / g.pixels();
  const int w = int(i % g.W), m = int(i / g.W % g.M), t = int(i / (g.W * g.M) % g.T);
  const T* gates = element<const T>(chain.gates, b, 0, t, m, w);
  float dots[MAX_LEVELS + 1] = {};
  for (int64_t channel = 4 * lane; channel < g.C && valid; channel += 4 * p.lanes) {
    float grad[4], all[4] = {};
    load_channels(element<const T>(p.grad_out, b, channel, t, m, w), grad);
#pragma unroll
    for (int l = 0; l < MAX_LEVELS; ++l) {
      if (l >= L) break;
      float z[4];
      T* const at = element<T>(p.z[l], b, channel, t, m, w);
      load_channels(at, z);
      const float gate = to_float(gates[l * chain.gates.c]);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float level = gelu<T>(z[c]);
        dots[l] += grad[c] * level;
        all[c] += gate * level;
      }
      if (l + 1 == L && p.want_last) {
        const float4 mean = *reinterpret_cast<const float4*>(p.mean_grad + b * g.C + channel);
        const float e[4] = {mean.x, mean.y, mean.z, mean.w};
#pragma unroll
        for (int c = 0; c < 4; ++c) z[c] = (gate * chain.scale * grad[c] + e[c]) * gelu_slope<T>(z[c]);
        store_channels(at, z);
      }
    }
    const float4 mean = *reinterpret_cast<const float4*>(p.global + b * g.C + channel);
    const float global[4] = {mean.x, mean.y, mean.z, mean.w}, gate = to_float(gates[L * chain.gates.c]);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      dots[MAX_LEVELS] += grad[c] * global[c];
      all[c] = (all[c] + gate * global[c]) * chain.scale;
    }
    if (p.ctx_all.data) store_channels(element<T>(p.ctx_all, b, channel, t, m, w), all);
  }
  if (!p.grad_gates.data) return;
#pragma unroll
  for (int l = 0; l <= MAX_LEVELS; ++l) {
    if (l >= L && l < MAX_LEVELS) continue;
    const float sum = warp_sum(dots[l], p.lanes);
    if (valid && lane == 0) *element<T>(p.grad_gates, b, l < L ? l : L, t, m, w) = from_float<T>(sum * chain.scale);
  }
}

// e = conv^T(dz above); into `to` goes e, or where there is a level's own z: dz = (gate G + e) GELU'(z).
struct LevelBackward {
  Geometry g;
  TokensTiling tiling;
  LevelWeights above;
  MapView from, grad_out, gate, z, to;
  float scale;
};

template <class T, int KW>
__global__ void __launch_bounds__(THREADS, KW > 7 ? 1 : 2) tokens_level_bwd_kernel(LevelBackward p) {
  const PassBlock at(p.g, p.tiling);
  float* const taps = shared_memory<float>();
  load_tile_taps<T>(p.above, at.first_channel, p.g.C, true, taps);
  __syncthreads();
  if (!at.valid) return;
  const SegmentAt s(p.g, at.segment);
  float acc[SEGMENT][4] = {};
  convolve_tokens<T, KW>(element<const T>(p.from, at.image, at.channel, 0, 0, 0), p.from, p.g, p.above.size, s,
                         taps + 4 * at.group, acc);
  T* const to = element<T>(p.to, at.image, at.channel, s.t, s.m, s.w);
  const T* const z_at = p.z.data ? element<const T>(p.z, at.image, at.channel, s.t, s.m, s.w) : nullptr;
  const T* const grad_at = element<const T>(p.grad_out, at.image, at.channel, s.t, s.m, s.w);
  const T* const gate_at = p.z.data ? element<const T>(p.gate, at.image, 0, s.t, s.m, s.w) : nullptr;
#pragma unroll
  for (int i = 0; i < SEGMENT; ++i) {
    if (s.w + i >= p.g.W) break;
    if (z_at) {
      float z[4], grad[4];
      load_channels(z_at + i * p.z.w, z);
      load_channels(grad_at + i * p.grad_out.w, grad);
      const float factor = to_float(gate_at[i * p.gate.w]) * p.scale;
#pragma unroll
      for (int c = 0; c < 4; ++c) acc[i][c] = (acc[i][c] + factor * grad[c]) * gelu_slope<T>(z[c]);
    }
    store_channels(to + i * p.to.w, acc[i]);
  }
}

// One kernel row of a level's weights' gradient over a part of the segments: dz times the level's input, tap by tap.
struct WeightsGradient {
  Geometry g;
  TokensTiling tiling;
  Level size;
  MapView from, dz;
  int64_t parts;  // partial sums
  float* to;      // [parts][C][all_taps], from this level's first tap on
  int64_t all_taps;
};

template <class T, int KW>
__global__ void __launch_bounds__(THREADS) tokens_weights_kernel(WeightsGradient p) {
  const ChannelTile tile(p.tiling.channel_tiles);
  const int64_t rows = p.size.kt * p.size.km, part = tile.rest / rows;
  const int row = int(tile.rest % rows), km = int(p.size.km), W = int(p.g.W);
  const int dt = row / km - int(p.size.kt) / 2, dm = row % km - km / 2;
  const int64_t channel = tile.channel, units = p.g.B * p.tiling.image_blocks;
  constexpr int N = SEGMENT + KW - 1;
  float acc[KW][4] = {};
  for (int64_t unit = part; unit < units && channel < p.g.C; unit += p.parts) {
    const int64_t b = unit / p.tiling.image_blocks;
    const int segment = int(unit % p.tiling.image_blocks) * p.tiling.lanes + int(threadIdx.x) / GROUPS;
    const SegmentAt s(p.g, segment);
    const int t = s.t + dt, m = s.m + dm, column = s.w - KW / 2;
    if (segment >= p.tiling.segments || t < 0 || t >= p.g.T || m < 0 || m >= p.g.M) continue;
    Channels<T> dz[SEGMENT], x[N];
    load_columns(element<const T>(p.dz, b, channel, s.t, s.m, s.w), int(p.dz.w), columns_inside<SEGMENT>(s.w, W), dz);
    load_columns(element<const T>(p.from, b, channel, t, m, column), int(p.from.w), columns_inside<N>(column, W), x);
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      float values[N];
#pragma unroll
      for (int j = 0; j < N; ++j) values[j] = channel_of<T>(x[j], c);
#pragma unroll
      for (int i = 0; i < SEGMENT; ++i) {
        const float grad = channel_of<T>(dz[i], c);
#pragma unroll
        for (int a = 0; a < KW; ++a) acc[a][c] += values[i + a] * grad;
      }
    }
  }
  float *const area = shared_memory<float>(), *const sums = area + THREADS * 4;
  const int channels = tile.channels(p.g);
#pragma unroll
  for (int a = 0; a < KW; ++a) sum_lanes(acc[a], area, channels, sums + a * TILE);
  if (int(threadIdx.x) >= channels) return;
  float* const to = p.to + (part * p.g.C + tile.first + threadIdx.x) * p.all_taps + row * KW;
  for (int a = 0; a < KW; ++a) to[a] = sums[a * TILE + threadIdx.x];
}

// The gradients of one chunk of images.
class Backward {
 public:
  Backward(const ContextBackward& whole, const TokensBackwardPlan& plan, int64_t first, void* stream)
      : chain_(whole.chain), tiling_(plan.tokens.tiling), weight_parts_(plan.chunk_weight_parts), stream_(stream) {
    const DType dtype = chain_.dtype;
    const TokensScratch& scratch = plan.tokens.scratch;
    Geometry& g = chain_.g;
    g.B = std::min(scratch.images, g.B - first);
    chain_.ctx = images_from(chain_.ctx, first, dtype), chain_.gates = images_from(chain_.gates, first, dtype);
    grad_out_ = images_from(whole.grad_out, first, dtype);
    grad_ctx_ = images_from(whole.grad_ctx, first, dtype);
    grad_gates_ = images_from(whole.grad_gates, first, dtype);
    ctx_all_ = images_from(whole.ctx_all, first, dtype);
    mean_ = whole.mean + first * g.C;
    mean_parts_ = reinterpret_cast<float*>(static_cast<char*>(whole.scratch) + scratch.floats_at);
    global_ = mean_parts_ + scratch.images * SUM_PARTS * g.C;
    mean_grad_ = global_ + scratch.images * g.C;
    for (int l = 0; l < chain_.L; ++l) {
      z_[l] = scratch_map(whole.scratch, l, scratch, g, dtype);
      input_[l] = l ? scratch_map(whole.scratch, chain_.L + l - 1, scratch, g, dtype) : chain_.ctx;
      all_taps_ += chain_.levels[l].size.taps();
    }
    down_ = whole.grad_ctx.data || whole.weight_sums;
    if (whole.weight_sums) weights_ = whole.weight_sums + first / scratch.images * weight_parts_ * g.C * all_taps_;
  }

  void run() const {
    recompute_levels();
    mean_gradient();
    gates_gradient();
    if (!down_) return;
    for (int l = chain_.L - 1; l >= 0; --l) level_gradient(l);
    if (weights_) weights_gradients();
  }

 private:
  void recompute_levels() const {
    for (int l = 0; l < chain_.L; ++l) {
      const MapView next = l + 1 < chain_.L ? input_[l + 1] : MapView{};
      run_level_fwd(LevelForward{chain_.g, tiling_, chain_.levels[l], input_[l], z_[l], next, nullptr}, chain_.dtype,
                    stream_);
    }
  }

  MapView gate(int level) const {
    MapView gate = chain_.gates;
    gate.data = static_cast<char*>(gate.data) + level * gate.c * (chain_.dtype == DType::f32 ? 4 : 2);
    return gate;
  }

  void mean_gradient() const {
    const Geometry& g = chain_.g;
    with_type(chain_.dtype, [&](auto zero) {
      launch(tokens_mean_gradient_kernel<decltype(zero)>, g.B * SUM_PARTS * tiling_.channel_tiles, THREADS,
             THREADS * 16, stream_, MeanGradient{g, tiling_.channel_tiles, grad_out_, gate(chain_.L), mean_parts_});
    });
    run_means(Means{g.B, g.C, SUM_PARTS, mean_parts_, double(g.pixels()) / chain_.scale, mean_, mean_grad_, global_},
              stream_);
  }

  void gates_gradient() const {
    Gradients p{chain_, 1, grad_out_, {}, grad_gates_, ctx_all_, global_, mean_grad_, down_};
    const int64_t quads = chain_.g.C / 4;
    while (p.lanes < 32 && quads % (2 * p.lanes) == 0) p.lanes *= 2;
    std::copy(z_, z_ + chain_.L, p.z);
    const int64_t threads = chain_.g.B * chain_.g.pixels() * p.lanes;
    with_type(chain_.dtype, [&](auto zero) {
      launch(tokens_gradients_kernel<decltype(zero)>, (threads + THREADS - 1) / THREADS, THREADS, 0, stream_, p);
    });
  }

  // dz of level l - 1 from that of level l, or of level 0: the gradient of ctx
  void level_gradient(int l) const {
    if (l == 0 && !grad_ctx_.data) return;
    LevelBackward p{chain_.g, tiling_, chain_.levels[l], z_[l], grad_out_, {}, {}, grad_ctx_, chain_.scale};
    if (l > 0) p.gate = gate(l - 1), p.z = p.to = z_[l - 1];
    with_type(chain_.dtype, [&](auto zero) {
      with_width(p.above.size.kw, [&](auto width) {
        launch(tokens_level_bwd_kernel<decltype(zero), width>, p.g.B * tiling_.image_blocks * tiling_.channel_tiles,
               tiling_.lanes * GROUPS, p.above.size.taps() * TILE * 4, stream_, p);
      });
    });
  }

  void weights_gradients() const {
    float* to = weights_;
    for (int l = 0; l < chain_.L; ++l) {
      const Level& k = chain_.levels[l].size;
      const WeightsGradient p{chain_.g, tiling_, k, input_[l], z_[l], weight_parts_, to, all_taps_};
      with_type(chain_.dtype, [&](auto zero) {
        with_width(k.kw, [&](auto width) {
          launch(tokens_weights_kernel<decltype(zero), width>, weight_parts_ * k.kt * k.km * tiling_.channel_tiles,
                 tiling_.lanes * GROUPS, THREADS * 16 + k.kw * TILE * 4, stream_, p);
        });
      });
      to += k.taps();
    }
  }

  Chain chain_;
  TokensTiling tiling_;
  int64_t weight_parts_, all_taps_ = 0;
  void* stream_;
  MapView grad_out_, grad_ctx_, grad_gates_, ctx_all_, z_[MAX_LEVELS], input_[MAX_LEVELS];
  const float* mean_;
  float *mean_parts_, *global_, *mean_grad_, *weights_ = nullptr;
  bool down_;
};

}  // namespace

void run_context_bwd(const ContextBackward& p, const TokensBackwardPlan& plan, void* stream) {
  for (int64_t first = 0; first < p.chain.g.B; first += plan.tokens.scratch.images)
    Backward(p, plan, first, stream).run();
}

}  // namespace focalnet::cuda

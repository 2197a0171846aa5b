// Backward of modulate_fwd.cu: the gradients of q and of the modulator, the sums for the biases and LayerNorm's
// parameters, and the forward's result once more, which proj's weight gradient wants.
#include "cuda/modulate_tile.h"
#include "cuda/tokens.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

// A channel and a run of tokens per block.
template <class T>
__global__ void __launch_bounds__(THREADS) modulate_bwd_kernel(ModulateBackward arguments) {
  const ModulateBackward& a = arguments;
  const ModulateForward& p = a.forward;
  const int64_t C = p.g.C, lines = p.g.B * p.g.T * p.g.M, per_line = (p.g.W + 3) / 4;
  const int64_t c = blockIdx.x % C, part = blockIdx.x / C;
  const float q_bias = of_vector<T>(p.q_bias, c), bias = of_vector<T>(p.bias, c);
  float sum = 0;
  for (int64_t i = part * THREADS + threadIdx.x; i < lines * per_line; i += a.parts * THREADS) {
    const int64_t first = i % per_line * 4;
    const Pixel at(p.g, i / per_line * p.g.W + first);
    const int n = int(p.g.W - first < 4 ? p.g.W - first : 4);
    float q[4], modulator[4], grad[4], out[4], grad_q[4], grad_modulator[4];
    load_quad(at.in<const T>(p.q, c), p.q.w, n, q);
    load_quad(at.in<const T>(p.modulator, c), p.modulator.w, n, modulator);
    load_quad(at.in<const T>(a.grad, c), a.grad.w, n, grad);
    for (int j = 0; j < 4; ++j) {
      q[j] += q_bias, modulator[j] += bias;
      out[j] = q[j] * modulator[j];
      grad_q[j] = grad[j] * modulator[j];
      grad_modulator[j] = grad[j] * q[j];
      sum += j < n ? grad_modulator[j] : 0.0f;
    }
    store_quad(at.in<T>(a.grad, c), a.grad.w, n, out);
    store_quad(at.in<T>(a.grad_q, c), a.grad_q.w, n, grad_q);
    store_quad(at.in<T>(a.grad_modulator, c), a.grad_modulator.w, n, grad_modulator);
  }
  sum = group_sum(sum, shared_memory<float>(), THREADS);
  if (threadIdx.x == 0) {
    float* const sums = a.sums + part * 3 * C + c;
    sums[0] = sum, sums[C] = 0, sums[2 * C] = 0;
  }
}

// Four channels of a run of tokens per thread, for tokens whose channels are adjacent.
template <class T>
__global__ void __launch_bounds__(THREADS) modulate_tokens_bwd_kernel(ModulateBackward arguments) {
  const ModulateBackward& a = arguments;
  const ModulateForward& p = a.forward;
  constexpr int LANES = THREADS / GROUPS;
  const int64_t C = p.g.C, tokens = p.g.B * p.g.pixels();
  const ChannelTile tile((C + TILE - 1) / TILE);
  const int64_t c = tile.channel, part = tile.rest;
  float sum[4] = {};
  for (int64_t i = part * LANES + threadIdx.x / GROUPS; i < tokens && c < C; i += a.parts * LANES) {
    const Pixel at(p.g, i);
    float q[4], modulator[4], grad[4], out[4], grad_q[4], grad_modulator[4];
    load_channels(at.in<const T>(p.q, c), q);
    load_channels(at.in<const T>(p.modulator, c), modulator);
    load_channels(at.in<const T>(a.grad, c), grad);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      out[j] = q[j] * modulator[j];
      grad_q[j] = grad[j] * modulator[j];
      grad_modulator[j] = grad[j] * q[j];
      sum[j] += grad_modulator[j];
    }
    store_channels(at.in<T>(a.grad, c), out);
    store_channels(at.in<T>(a.grad_q, c), grad_q);
    store_channels(at.in<T>(a.grad_modulator, c), grad_modulator);
  }
  float *const area = shared_memory<float>(), *const to = a.sums + part * 3 * C + tile.first;
  const int channels = tile.channels(p.g);
  sum_lanes(sum, area, channels, to);
  if (int(threadIdx.x) < channels) to[C + threadIdx.x] = 0, to[2 * C + threadIdx.x] = 0;
}

bool by_tokens(const ModulateBackward& a) {
  const ModulateForward& p = a.forward;
  const std::initializer_list<MapView> maps{p.q, p.modulator, a.grad, a.grad_q, a.grad_modulator};
  return !p.ln_weight.data && !p.q_bias.data && !p.bias.data && p.g.C % 4 == 0 && in_quads(maps, p.dtype);
}

// With LayerNorm: `parts` blocks, each of which adds up its tiles' sums in shared memory.
template <class T>
__global__ void __launch_bounds__(TOKENS* WARPS) modulate_ln_bwd_kernel(ModulateBackward arguments) {
  const ModulateBackward& a = arguments;
  const ModulateForward& p = a.forward;
  const int64_t C = p.g.C, tokens = p.g.B * p.g.pixels();
  const int lane = threadIdx.x % TOKENS, warp = threadIdx.x / TOKENS;
  float* const area = shared_memory<float>();
  float* const mine = a.sums + blockIdx.x * 3 * C;
  for (int64_t c = warp; c < C; c += WARPS)
    if (lane < 3) mine[lane * C + c] = 0;
  for (int64_t tile = blockIdx.x; tile * TOKENS < tokens; tile += gridDim.x) {
    const int64_t token = tile * TOKENS + lane;
    const bool valid = token < tokens;
    const Pixel at(p.g, valid ? token : 0);
    const Normalizer normal = normalizer<T>(p, at, area);
    float straight = 0, along = 0;
    for (int64_t c = warp; c < C; c += WARPS) {
      const float grad = to_float(*at.in<const T>(a.grad, c)) * of_vector<T>(p.ln_weight, c);
      straight += grad;
      along += grad * (product<T>(p, at, c) - normal.mean) * normal.rstd;
    }
    straight = token_sum(straight, area) / float(C);
    along = token_sum(along, area) / float(C);
    for (int64_t c = warp; c < C; c += WARPS) {
      const float weight = of_vector<T>(p.ln_weight, c);
      const float q = query<T>(p, at, c), m = modulator<T>(p, at, c), z = (q * m - normal.mean) * normal.rstd;
      const float grad_out = valid ? to_float(*at.in<const T>(a.grad, c)) : 0.0f;
      const float grad = (grad_out * weight - straight - z * along) * normal.rstd;
      if (valid) {
        *at.in<T>(a.grad, c) = from_float<T>(z * weight + of_vector<T>(p.ln_bias, c));
        *at.in<T>(a.grad_q, c) = from_float<T>(grad * m);
        *at.in<T>(a.grad_modulator, c) = from_float<T>(grad * q);
      }
      const float of_bias = warp_sum(valid ? grad * q : 0.0f), of_ln_weight = warp_sum(grad_out * z),
                  of_ln_bias = warp_sum(grad_out);
      __syncwarp();
      if (lane < 3) mine[lane * C + c] += lane == 0 ? of_bias : lane == 1 ? of_ln_weight : of_ln_bias;
    }
  }
}

}  // namespace

int64_t modulate_bwd_parts(const ModulateBackward& a) {
  const ModulateForward& p = a.forward;
  const int64_t tokens = p.g.B * p.g.pixels(), processors = current_device().processors;
  if (by_tokens(a))
    return std::max<int64_t>(1, std::min(tokens / THREADS, 8 * processors / ((p.g.C + TILE - 1) / TILE)));
  const int64_t most = std::max<int64_t>(1, p.ln_weight.data ? (tokens + TOKENS - 1) / TOKENS : tokens / (4 * THREADS));
  return std::min(most, p.ln_weight.data ? 4 * processors : std::max<int64_t>(1, 16 * processors / p.g.C));
}

void run_modulate_bwd(const ModulateBackward& p, void* stream) {
  with_type(p.forward.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.forward.ln_weight.data)
      launch(modulate_ln_bwd_kernel<T>, p.parts, TOKENS * WARPS, TOKENS * WARPS * 4, stream, p);
    else if (by_tokens(p))
      launch(modulate_tokens_bwd_kernel<T>, p.parts * ((p.forward.g.C + TILE - 1) / TILE), THREADS, THREADS * 16,
             stream, p);
    else
      launch(modulate_bwd_kernel<T>, p.parts * p.forward.g.C, THREADS, THREADS / 32 * 4, stream, p);
  });
}

}  // namespace focalnet::cuda

// Backward of modulate_fwd.cu: the gradients of q and of the modulator, the sums for the biases and LayerNorm's
// parameters, and the forward's result once more, which proj's weight gradient wants.
#include "cuda/columns.h"
#include "cuda/modulate_tile.h"

namespace focalnet::cuda {

namespace {

constexpr int THREADS = 256;

// A block's sums over tokens of a channel, without LayerNorm: of grad_modulator and of grad_q.
__device__ void store_sums(const ModulateBackward& a, int64_t part, int64_t c, float of_modulator, float of_q) {
  of_modulator = group_sum(of_modulator, shared_memory<float>(), THREADS);
  of_q = group_sum(of_q, shared_memory<float>(), THREADS);
  const int64_t C = a.forward.g.C;
  float* const sums = a.sums + part * a.SUMS * C + c;
  if (threadIdx.x == 0) sums[0] = of_modulator, sums[C] = of_q, sums[2 * C] = 0, sums[3 * C] = 0;
}

// A channel and a run of tokens per block.
template <class T>
__global__ void __launch_bounds__(THREADS) modulate_bwd_kernel(ModulateBackward arguments) {
  const ModulateBackward& a = arguments;
  const ModulateForward& p = a.forward;
  const int64_t C = p.g.C, lines = p.g.B * p.g.T * p.g.M, per_line = (p.g.W + 3) / 4;
  const int64_t c = blockIdx.x % C, part = blockIdx.x / C;
  const float q_bias = of_vector<T>(p.q_bias, c), bias = of_vector<T>(p.bias, c);
  float sum = 0, sum_q = 0;
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
      sum += j < n ? grad_modulator[j] : 0.0f, sum_q += j < n ? grad_q[j] : 0.0f;
    }
    store_quad(at.in<T>(a.grad, c), a.grad.w, n, out);
    store_quad(at.in<T>(a.grad_q, c), a.grad_q.w, n, grad_q);
    store_quad(at.in<T>(a.grad_modulator, c), a.grad_modulator.w, n, grad_modulator);
  }
  store_sums(a, part, c, sum, sum_q);
}

// Over tokens whose channels are adjacent.
template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) modulate_columns_bwd_kernel(ModulateBackward a) {
  const ModulateForward& p = a.forward;
  const int64_t C = p.g.C, tokens = p.g.B * p.g.pixels();
  const ColumnsTiling tiling(C, sizeof(T));
  const ColumnsAt at(tiling);
  constexpr int N = Columns<T>::N;
  const int64_t column = at.column<T>(tiling), step = a.parts * tiling.lanes;
  const T* const query = static_cast<const T*>(p.q.data) + column;
  const T* const modulator = static_cast<const T*>(p.modulator.data) + column;
  T *const grads = static_cast<T*>(a.grad.data) + column, *const of_q = static_cast<T*>(a.grad_q.data) + column;
  T* const of_modulator = static_cast<T*>(a.grad_modulator.data) + column;
  float sum[N] = {}, sum_q[N] = {};
  if (column < C && at.lane < tiling.lanes)
#pragma unroll 2
    for (int64_t token = at.part * tiling.lanes + at.lane; token < tokens; token += step) {
      const Columns<T> q = load_columns(query + token * p.q.w), m = load_columns(modulator + token * p.modulator.w);
      const Columns<T> grad = load_columns(grads + token * a.grad.w);
      Columns<T> out, grad_q, grad_modulator;
#pragma unroll
      for (int i = 0; i < N; ++i) {
        out.set(i, q[i] * m[i]), grad_q.set(i, grad[i] * m[i]), grad_modulator.set(i, grad[i] * q[i]);
        sum[i] += grad[i] * q[i], sum_q[i] += grad[i] * m[i];
      }
      store_columns(grads + token * a.grad.w, out);
      store_columns(of_q + token * a.grad_q.w, grad_q);
      store_columns(of_modulator + token * a.grad_modulator.w, grad_modulator);
    }
  float* const to = a.sums + at.part * a.SUMS * C;
  sum_columns(sum, tiling, at, shared_memory<float>(), column, C, to);
  sum_columns(sum_q, tiling, at, shared_memory<float>(), column, C, to + C);
  if (at.lane == 0)
    for (int64_t c = column; c < column + N && c < C; ++c) to[2 * C + c] = 0, to[3 * C + c] = 0;
}

// Over channels whose tokens are adjacent.
template <class T>
__global__ void __launch_bounds__(ColumnsTiling::THREADS) modulate_lines_bwd_kernel(ModulateBackward a) {
  const ModulateForward& p = a.forward;
  const LinesAt at(p.g.C);
  const int64_t c = at.line;
  const T* const query = static_cast<const T*>(p.q.data) + c * p.q.c;
  const T* const modulator = static_cast<const T*>(p.modulator.data) + c * p.modulator.c;
  T *const grads = static_cast<T*>(a.grad.data) + c * a.grad.c, *const of_q =
                                                                    static_cast<T*>(a.grad_q.data) + c * a.grad_q.c;
  T* const of_modulator = static_cast<T*>(a.grad_modulator.data) + c * a.grad_modulator.c;
  const float q_bias = of_vector<T>(p.q_bias, c), bias = of_vector<T>(p.bias, c);
  float sum = 0, sum_q = 0;
  at.each<T>(p.g.W, [&](int64_t i) {
    const Columns<T> q = load_columns(query + i), m = load_columns(modulator + i), grad = load_columns(grads + i);
    Columns<T> out, grad_q, grad_modulator;
#pragma unroll
    for (int j = 0; j < Columns<T>::N; ++j) {
      const float value = q[j] + q_bias, factor = m[j] + bias;
      out.set(j, value * factor), grad_q.set(j, grad[j] * factor), grad_modulator.set(j, grad[j] * value);
      sum += grad[j] * value, sum_q += grad[j] * factor;
    }
    store_columns(grads + i, out);
    store_columns(of_q + i, grad_q);
    store_columns(of_modulator + i, grad_modulator);
  });
  store_sums(a, at.part, c, sum, sum_q);
}

bool by_lines(const ModulateBackward& a) {
  const ModulateForward& p = a.forward;
  const auto in = [&](const MapView& v) { return in_lines(p.g, v, p.dtype); };
  return !p.ln_weight.data && in(p.q) && in(p.modulator) && in(a.grad) && in(a.grad_q) && in(a.grad_modulator);
}

bool by_columns(const ModulateBackward& a) {
  const ModulateForward& p = a.forward;
  const auto in = [&](const MapView& v) { return in_columns(p.g, v, p.dtype); };
  const bool plain =
      !p.ln_weight.data && !p.q_bias.data && !p.bias.data && p.g.C % (p.dtype == DType::f32 ? 4 : 8) == 0;
  return plain && in(p.q) && in(p.modulator) && in(a.grad) && in(a.grad_q) && in(a.grad_modulator);
}

// With LayerNorm: `parts` blocks, each of which adds up its tiles' sums in shared memory.
template <class T>
__global__ void __launch_bounds__(TOKENS* WARPS) modulate_ln_bwd_kernel(ModulateBackward arguments) {
  const ModulateBackward& a = arguments;
  const ModulateForward& p = a.forward;
  const int64_t C = p.g.C, tokens = p.g.B * p.g.pixels();
  const int lane = threadIdx.x % TOKENS, warp = threadIdx.x / TOKENS;
  float* const area = shared_memory<float>();
  float* const mine = a.sums + blockIdx.x * a.SUMS * C;
  for (int64_t c = warp; c < C; c += WARPS)
    if (lane < a.SUMS) mine[lane * C + c] = 0;
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
      const float of_modulator = warp_sum(valid ? grad * q : 0.0f), of_q = warp_sum(valid ? grad * m : 0.0f),
                  of_ln_weight = warp_sum(grad_out * z), of_ln_bias = warp_sum(grad_out);
      __syncwarp();
      if (lane < a.SUMS)
        mine[lane * C + c] += lane == 0 ? of_modulator : lane == 1 ? of_q : lane == 2 ? of_ln_weight : of_ln_bias;
    }
  }
}

}  // namespace

int64_t modulate_bwd_parts(const ModulateBackward& a) {
  const ModulateForward& p = a.forward;
  const int64_t tokens = p.g.B * p.g.pixels(), processors = current_device().processors;
  if (by_lines(a)) return line_parts(p.g.C, tokens);
  if (by_columns(a)) return ColumnsTiling(p.g.C, p.dtype == DType::f32 ? 4 : 2).parts(tokens);
  const int64_t most = std::max<int64_t>(1, p.ln_weight.data ? (tokens + TOKENS - 1) / TOKENS : tokens / (4 * THREADS));
  return std::min(most, p.ln_weight.data ? 4 * processors : std::max<int64_t>(1, 16 * processors / p.g.C));
}

void run_modulate_bwd(const ModulateBackward& p, void* stream) {
  with_type(p.forward.dtype, [&](auto zero) {
    using T = decltype(zero);
    if (p.forward.ln_weight.data)
      launch(modulate_ln_bwd_kernel<T>, p.parts, TOKENS * WARPS, TOKENS * WARPS * 4, stream, p);
    else if (by_lines(p))
      launch(modulate_lines_bwd_kernel<T>, p.parts * p.forward.g.C, ColumnsTiling::THREADS,
             ColumnsTiling::THREADS / 32 * 4, stream, p);
    else if (by_columns(p))
      launch(modulate_columns_bwd_kernel<T>, p.parts * ColumnsTiling(p.forward.g.C, sizeof(T)).tiles,
             ColumnsTiling::THREADS, ColumnsTiling::THREADS * Columns<T>::N * 4, stream, p);
    else
      launch(modulate_bwd_kernel<T>, p.parts * p.forward.g.C, THREADS, THREADS / 32 * 4, stream, p);
  });
}

}  // namespace focalnet::cuda

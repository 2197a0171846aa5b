// The CPU kernels without torch, beside double precision in plain loops: for machines that are emulated.
//
//     kernels [SEED]     every check, in the instruction set that csrc/cpu/isa.cpp finds here; exits 1 if one is wrong
#include "cpu/kernels.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <vector>

#ifndef PI  // a test asks for another
#define PI 3.14159265358979323846
#endif

using namespace focalnet;
using namespace focalnet::cpu;

namespace {

std::mt19937_64 engine;
const char* const NAMES[] = {"float32", "bfloat16", "float16"};
// of the result's norm: some roundings of the dtype, sums in float
const double LIMITS[] = {2e-6, 6e-3, 1e-3};
int failures = 0;

double rounded(DType dtype, double x) {  // to nearest even; no overflow is drawn
  if (dtype == DType::f32) return float(x);
  if (x == 0) return 0;
  int exponent;
  const int bits = dtype == DType::bf16 ? 8 : 11;
  const double mantissa = std::frexp(x, &exponent);
  return std::ldexp(std::nearbyint(std::ldexp(mantissa, bits)), exponent - bits);
}

// Elements of a dtype, and what they stand for.
struct Values {
  DType dtype;
  std::vector<char> memory;
  int64_t n;

  Values(DType dtype, int64_t n) : dtype(dtype), memory(n * size() + 64, char(0xff)), n(n) {}
  static Values random(DType dtype, int64_t n, double scale, double mean = 0.25) {
    Values values(dtype, n);
    std::normal_distribution<double> normal;
    for (int64_t i = 0; i < n; ++i) values.set(i, scale * (normal(engine) + mean));
    return values;
  }
  int64_t size() const { return dtype == DType::f32 ? 4 : 2; }
  void* data() { return memory.data(); }
  float* floats() { return reinterpret_cast<float*>(memory.data()); }
  void set(int64_t i, double x) {
    const float single = float(rounded(dtype, x));
    uint32_t bits;
    std::memcpy(&bits, &single, 4);
    if (dtype == DType::bf16) bits >>= 16;
    if (dtype == DType::f16) {
      const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
      const float tiny = std::ldexp(std::fabs(single), 24);  // a subnormal's count of 2^-24
      bits = sign | (magnitude < 0x38800000 ? uint32_t(std::nearbyint(tiny)) : (magnitude - 0x38000000) >> 13);
    }
    std::memcpy(memory.data() + i * size(), &bits, size());
  }
  double get(int64_t i) const {
    uint32_t bits = 0;
    std::memcpy(&bits, memory.data() + i * size(), size());
    if (dtype == DType::f16) {
      const int exponent = bits >> 10 & 31;
      const double mantissa = bits & 1023, sign = bits >> 15 ? -1 : 1;
      if (exponent == 31) return NAN;
      return sign * (exponent ? std::ldexp(1024 + mantissa, exponent - 25) : std::ldexp(mantissa, -24));
    }
    if (dtype == DType::bf16) bits <<= 16;
    float single;
    std::memcpy(&single, &bits, 4);
    return single;
  }
};

// Memory that a kernel works in, filled with NaN, on a cache line.
struct Scratch {
  std::vector<char> memory;
  explicit Scratch(int64_t bytes) : memory(bytes + 64, char(0xff)) {}
  void* data() { return reinterpret_cast<void*>((reinterpret_cast<uintptr_t>(memory.data()) + 63) / 64 * 64); }
  float* floats() { return static_cast<float*>(data()); }
};

void report(const char* what, DType dtype, const std::vector<double>& expected, const std::vector<double>& found,
            double factor = 1) {
  double difference = 0, norm = 0;
  for (size_t i = 0; i < expected.size(); ++i) {
    difference += (found[i] - expected[i]) * (found[i] - expected[i]);
    norm += expected[i] * expected[i];
  }
  const double error = std::sqrt(difference / norm);
  const bool right = error <= factor * LIMITS[int(dtype)];  // NaN is wrong
  if (!right) ++failures;
  std::printf("%-28s %-9s %.1e%s\n", what, NAMES[int(dtype)], error, right ? "" : "  WRONG");
}
std::vector<double> all_of(const Values& values) {
  std::vector<double> found(values.n);
  for (int64_t i = 0; i < values.n; ++i) found[i] = values.get(i);
  return found;
}

double gelu(double x) { return x / 2 * std::erfc(-x / std::sqrt(2.0)); }
double gelu_slope(double x) {
  return std::erfc(-x / std::sqrt(2.0)) / 2 + x * std::exp(-x * x / 2) / std::sqrt(2 * PI);
}

Rows dense(Values& values, int64_t rows, int64_t width) {
  Rows r;
  r.data = values.data();
  r.pixels = rows, r.image = rows * width;
  r.t = rows * width, r.m = rows * width, r.w = width, r.W = rows;
  return r;
}

struct PackedWeight {
  Scratch panels;
  Packed packed;
  PackedWeight(const Kernels& k, Values& w, int64_t N, int64_t K) : panels(k.packed_bytes(w.dtype, N, K)) {
    k.pack_matrix(w.dtype, w.data(), K, 1, N, K, 0, N, panels.data());
    packed = {N, K, panels.data()};
  }
};

// ------------------------------------------------------------------------------------------------- focal_context

// A case in plain loops: levels z, what leaves them, the mean, the result; and the gradients of sum(out * grad).
struct Context {
  Geometry g;
  std::vector<Level> levels;
  std::vector<std::vector<double>> weights, z, ctx;  // ctx[0] enters; [b][c][pixel]
  std::vector<double> gates, out, mean, grad_ctx, grad_gates;
  std::vector<std::vector<double>> grad_weights;

  template <class F>
  void each_tap(const Level& k, const F& f) const {  // f(pixel, neighbour, tap)
    for (int64_t t = 0; t < g.T; ++t)
      for (int64_t m = 0; m < g.M; ++m)
        for (int64_t w = 0; w < g.W; ++w)
          for (int64_t i = 0; i < k.taps(); ++i) {
            const int64_t T = t + i / (k.km * k.kw) - k.rt(), M = m + i / k.kw % k.km - k.rm(),
                          W = w + i % k.kw - k.rw();
            if (T < 0 || T >= g.T || M < 0 || M >= g.M || W < 0 || W >= g.W) continue;
            f((t * g.M + m) * g.W + w, (T * g.M + M) * g.W + W, i);
          }
  }
  void forward() {
    const int64_t P = g.pixels(), L = int64_t(levels.size());
    out.assign(g.B * g.C * P, 0), mean.assign(g.B * g.C, 0);
    z.assign(L, out), ctx.resize(L + 1, out);
    for (int64_t plane = 0; plane < g.B * g.C; ++plane) {
      const int64_t b = plane / g.C, c = plane % g.C;
      for (int64_t l = 0; l < L; ++l) {
        each_tap(levels[l], [&](int64_t p, int64_t q, int64_t tap) {
          z[l][plane * P + p] += weights[l][c * levels[l].taps() + tap] * ctx[l][plane * P + q];
        });
        for (int64_t p = 0; p < P; ++p) {
          ctx[l + 1][plane * P + p] = gelu(z[l][plane * P + p]);
          out[plane * P + p] += gates[(b * (L + 1) + l) * P + p] * ctx[l + 1][plane * P + p];
        }
      }
      for (int64_t p = 0; p < P; ++p) mean[plane] += ctx[L][plane * P + p] / double(P);
      for (int64_t p = 0; p < P; ++p) out[plane * P + p] += gates[(b * (L + 1) + L) * P + p] * gelu(mean[plane]);
    }
  }
  void backward(const std::vector<double>& grad) {
    const int64_t P = g.pixels(), L = int64_t(levels.size());
    grad_ctx.assign(out.size(), 0), grad_gates.assign(gates.size(), 0), grad_weights = weights;
    for (auto& w : grad_weights) w.assign(w.size(), 0);
    for (int64_t plane = 0; plane < g.B * g.C; ++plane) {
      const int64_t b = plane / g.C, c = plane % g.C, at = plane * P;
      const auto gate = [&](int64_t l, int64_t p) -> int64_t { return (b * (L + 1) + l) * P + p; };
      double of_mean = 0;
      for (int64_t p = 0; p < P; ++p) {
        of_mean += gates[gate(L, p)] * grad[at + p] * gelu_slope(mean[plane]);
        grad_gates[gate(L, p)] += grad[at + p] * gelu(mean[plane]);
      }
      std::vector<double> e(P), below(P);
      for (int64_t p = 0; p < P; ++p) e[p] = of_mean / double(P);
      for (int64_t l = L - 1; l >= 0; --l) {
        below.assign(P, 0);
        std::vector<double> dz(P);
        for (int64_t p = 0; p < P; ++p) {
          grad_gates[gate(l, p)] += grad[at + p] * ctx[l + 1][at + p];
          dz[p] = (e[p] + gates[gate(l, p)] * grad[at + p]) * gelu_slope(z[l][at + p]);
        }
        each_tap(levels[l], [&](int64_t p, int64_t q, int64_t tap) {
          below[q] += weights[l][c * levels[l].taps() + tap] * dz[p];
          grad_weights[l][c * levels[l].taps() + tap] += dz[p] * ctx[l][at + q];
        });
        e = below;
      }
      for (int64_t p = 0; p < P; ++p) grad_ctx[at + p] = e[p];
    }
  }
};

// Channels-first and dense.
MapView map_of(Values& values, const Geometry& g, int64_t channels) {
  const int64_t P = g.pixels();
  return {values.data(), channels * P, P, g.M * g.W, g.W, 1};
}

void check_context(const Kernels& k, DType dtype, const char* what, Geometry g, std::vector<Level> levels) {
  const int64_t L = int64_t(levels.size()), P = g.pixels(), blocks = k.channel_blocks(g.C);
  Context exact{g, levels};
  Values ctx = Values::random(dtype, g.B * g.C * P, 1), gates = Values::random(dtype, g.B * (L + 1) * P, 1);
  Values grad = Values::random(dtype, g.B * g.C * P, 1), out(dtype, g.B * g.C * P), grad_ctx(dtype, g.B * g.C * P);
  exact.ctx.push_back(all_of(ctx)), exact.gates = all_of(gates);
  std::vector<Values> weights;
  std::vector<Scratch> packed;
  std::vector<const float*> taps, flipped;
  int64_t all_taps = 0;
  for (const Level& level : levels) {
    const int64_t n = level.taps();
    all_taps += n;
    Values& w = weights.emplace_back(Values::random(dtype, g.C * n, 1 / std::sqrt(double(n))));
    exact.weights.push_back(all_of(w));
    const int64_t strides[] = {n, level.km * level.kw, level.kw, 1}, back[] = {n, -strides[1], -strides[2], -1};
    for (int flip = 0; flip < 2; ++flip) {
      const bool paired = !flip && k.pairs(dtype);
      Scratch& to = packed.emplace_back(blocks * k.lanes * n * 4 * (paired ? 2 : 1));
      const void* first = static_cast<char*>(w.data()) + (flip ? (n - 1) * w.size() : 0);
      for (int64_t block = 0; block < blocks; ++block)
        k.pack_taps(dtype, first, g.C, level, flip ? back : strides, paired, block, to.floats());
    }
  }
  for (int64_t l = 0; l < L; ++l) taps.push_back(packed[2 * l].floats()), flipped.push_back(packed[2 * l + 1].floats());
  exact.forward();
  exact.backward(all_of(grad));

  std::vector<float> mean(g.B * g.C, NAN);
  ContextForward p{};
  p.g = g, p.dtype = dtype, p.L = L, p.levels = levels.data(), p.weights = taps.data(), p.mean = mean.data();
  p.ctx = map_of(ctx, g, g.C), p.gates = map_of(gates, g, L + 1), p.out = map_of(out, g, g.C);
  p.summed = (g.T + 63) / 64;
  for (int64_t i = 0; i < g.B * blocks; ++i) {
    Scratch plane(P * k.lanes * 4), sums(p.sums() * k.lanes * 4), memory(k.context_fwd_scratch(p));
    k.context_fwd_levels(p, i / blocks, i % blocks, 0, g.T, plane.floats(), sums.floats(), memory.data());
    k.context_fwd_finish(p, i / blocks, i % blocks, 0, g.T, plane.floats(), sums.floats());
  }
  char name[64];
  const auto named = [&](const char* part) { return std::snprintf(name, 64, "%s %s", what, part), name; };
  report(named("forward"), dtype, exact.out, all_of(out), 2);

  Scratch gate_sums(g.B * blocks * (L + 1) * P * 4), tap_sums(g.B * blocks * all_taps * k.lanes * 4);
  ContextBackward q{};
  q.forward = p, q.forward.out = {}, q.forward.mean = nullptr;
  q.flipped = flipped.data(), q.mean = mean.data();
  q.grad_out = map_of(grad, g, g.C), q.grad_ctx = map_of(grad_ctx, g, g.C);
  q.grad_gates = gate_sums.floats(), q.grad_weights = tap_sums.floats();
  for (int64_t i = 0; i < g.B * blocks; ++i) {
    Scratch memory(k.context_bwd_scratch(q));
    k.context_bwd(q, i / blocks, i % blocks, memory.data());
  }
  report(named("grad ctx"), dtype, exact.grad_ctx, all_of(grad_ctx), 2);
  std::vector<double> of_gates(exact.gates.size());
  for (int64_t b = 0; b < g.B; ++b)
    for (int64_t block = 0; block < blocks; ++block)
      for (int64_t i = 0; i < (L + 1) * P; ++i)
        of_gates[b * (L + 1) * P + i] += q.grad_gates[(b * blocks + block) * (L + 1) * P + i];
  report(named("grad gates"), dtype, exact.grad_gates, of_gates, 2);
  for (int64_t l = 0, before = 0; l < L; before += levels[l++].taps()) {
    std::vector<double> of_weights(exact.weights[l].size());
    for (int64_t b = 0; b < g.B; ++b)
      for (int64_t c = 0; c < g.C; ++c)
        for (int64_t tap = 0; tap < levels[l].taps(); ++tap)
          of_weights[c * levels[l].taps() + tap] +=
              q.grad_weights[((b * blocks + c / k.lanes) * all_taps + before + tap) * k.lanes + c % k.lanes];
    report(named("grad weight"), dtype, exact.grad_weights[l], of_weights, 2);
  }
}

// ------------------------------------------------------------------------------------------------------ products

std::vector<double> product(const std::vector<double>& a, const std::vector<double>& w, int64_t M, int64_t N,
                            int64_t K) {
  std::vector<double> out(M * N);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < K; ++i) out[m * N + n] += a[m * K + i] * w[n * K + i];
  return out;
}

void check_products(const Kernels& k, DType dtype, int64_t M, int64_t N, int64_t K) {
  Values x = Values::random(dtype, M * K, 1), w = Values::random(dtype, N * K, 1 / std::sqrt(double(K)));
  Values bias = Values::random(DType::f32, N, 1), out(dtype, M * N), few(dtype, M * N);
  std::vector<double> exact = product(all_of(x), all_of(w), M, N, K);
  for (int64_t i = 0; i < M * N; ++i) exact[i] += bias.get(i % N);

  PackedWeight packed(k, w, N, K);
  LinearForward p{};
  p.dtype = dtype, p.weight = packed.packed, p.bias = bias.floats(), p.in = dense(x, M, K), p.out = dense(out, M, N);
  Scratch memory(k.linear_scratch(p, M));
  k.linear_fwd(p, 0, M, memory.data());
  report("product", dtype, exact, all_of(out));

  Scratch operand(k.operand_bytes(dtype, M, K)), scratch(M * int64_t(sizeof(void*)) + 64);
  k.few_rows_operand(dtype, p.in, Residual{}, K, 0, M, operand.data(), scratch.data());
  FewRowsProduct f{};
  f.dtype = dtype, f.rows = M, f.operand = operand.data(), f.weight = w.data(), f.N = N, f.K = K;
  f.stride_n = K, f.stride_k = 1, f.ahead = 48, f.bias = bias.floats(), f.then = FewRowsProduct::Then::STORE;
  f.out = dense(few, M, N);
  for (int64_t n = 0; n < N; n += 48) {
    Scratch panel(k.few_rows_scratch(f, M));
    k.few_rows_product(f, n, std::min(N, n + 48), panel.data());
  }
  report("product of few rows", dtype, exact, all_of(few));

  Values grad = Values::random(dtype, M * N, 1);
  Scratch grad_weight(N * K * 4);
  WeightGradient q{};
  q.dtype = dtype, q.N = N, q.K = K, q.grad = dense(grad, M, N), q.in = p.in, q.unit = M;
  q.grad_weight = grad_weight.floats();
  Scratch more(k.weight_gradient_scratch(q, N));
  k.weight_gradient(q, 0, N, 0, M, more.data());
  const std::vector<double> of_grad = all_of(grad), of_x = all_of(x);
  std::vector<double> of_weight(N * K);
  for (int64_t m = 0; m < M; ++m)
    for (int64_t n = 0; n < N; ++n)
      for (int64_t i = 0; i < K; ++i) of_weight[n * K + i] += of_grad[m * N + n] * of_x[m * K + i];
  report("gradient of a weight", dtype, of_weight, {q.grad_weight, q.grad_weight + N * K});
}

// x + gamma * fc2(GELU(fc1(LayerNorm(x))))
void check_mlp(const Kernels& k, DType dtype, int64_t M, int64_t C, int64_t H) {
  Values x = Values::random(dtype, M * C, 1), y(dtype, M * C);
  Values fc1 = Values::random(dtype, H * C, 1 / std::sqrt(double(C))),
         fc2 = Values::random(dtype, C * H, 1 / std::sqrt(double(H)));
  Values b1 = Values::random(DType::f32, H, 1), b2 = Values::random(DType::f32, C, 1);
  Values weight = Values::random(DType::f32, C, 1, 1), bias = Values::random(DType::f32, C, 1);
  Values gamma = Values::random(DType::f32, C, 1);
  std::vector<double> z = all_of(x);
  for (int64_t m = 0; m < M; ++m) {
    double mean = 0, squares = 0;
    for (int64_t c = 0; c < C; ++c) mean += z[m * C + c] / double(C);
    for (int64_t c = 0; c < C; ++c) squares += std::pow(z[m * C + c] - mean, 2) / double(C);
    for (int64_t c = 0; c < C; ++c)
      z[m * C + c] = (z[m * C + c] - mean) / std::sqrt(squares + 1e-5) * weight.get(c) + bias.get(c);
  }
  std::vector<double> hidden = product(z, all_of(fc1), M, H, C);
  for (int64_t i = 0; i < M * H; ++i) hidden[i] = gelu(hidden[i] + b1.get(i % H));
  std::vector<double> exact = product(hidden, all_of(fc2), M, C, H);
  for (int64_t i = 0; i < M * C; ++i) exact[i] = x.get(i) + gamma.get(i % C) * (exact[i] + b2.get(i % C));

  PackedWeight first(k, fc1, H, C), second(k, fc2, C, H);
  MlpForward p{};
  p.dtype = dtype, p.fc1 = first.packed, p.fc2 = second.packed, p.fc1_bias = b1.floats(), p.fc2_bias = b2.floats();
  p.residual = {true, false, weight.floats(), bias.floats(), 1e-5f, false, gamma.floats(), nullptr};
  p.x = dense(x, M, C), p.y = dense(y, M, C);
  Scratch memory(k.mlp_scratch(p, M));
  k.mlp_fwd(p, 0, M, memory.data());
  report("mlp", dtype, exact, all_of(y), 2);
}

}  // namespace

int main(int count, char** arguments) {
  const uint64_t seed = count > 1 ? std::strtoull(arguments[1], nullptr, 10) : 0;
  engine.seed(seed);
  const Kernels& k = kernels();
  std::printf("%s, vectors of %d, seed %llu\n", k.name, k.lanes, static_cast<unsigned long long>(seed));
  for (const DType dtype : {DType::f32, DType::bf16, DType::f16}) {
    check_context(k, dtype, "map", {2, 21, 9, 1, 13}, {{3, 1, 3}, {5, 1, 5}, {7, 1, 7}});
    check_context(k, dtype, "sequence", {1, 6, 1, 1, 37}, {{1, 1, 3}, {1, 1, 9}});
    check_context(k, dtype, "volume", {1, 9, 4, 5, 6}, {{3, 3, 3}, {3, 1, 5}});
    check_products(k, dtype, 37, 75, 50);
    check_products(k, dtype, 16, 48, 801);
    check_mlp(k, dtype, 29, 40, 410);
  }
  std::printf("%d wrong\n", failures);
  return failures > 0;
}

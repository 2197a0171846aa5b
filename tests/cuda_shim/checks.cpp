// Kernels that test the shim itself, called from Python over NumPy arrays.
#include <pybind11/numpy.h>

#include "cuda/launch.h"
#include "cuda/mma.h"

namespace {

using namespace focalnet::cuda;

template <class T>
using Array = pybind11::array_t<T, pybind11::array::c_style>;

struct Load {
  const uint16_t* rows;  // [32][8]
  uint32_t* registers;   // [32][4]
  bool transposed;
  int64_t shift;  // bytes that rows lie off their alignment
};
void load_kernel(Load p) {
  const int lane = threadIdx.x;
  char* row = shared_memory<char>() + p.shift + 16 * lane;
  std::memcpy(row, p.rows + 8 * lane, 16);
  __syncwarp();
  uint32_t a[4];
  if (p.transposed)
    load_transposed(a, row);
  else
    load_matrices(a, row);
  std::memcpy(p.registers + 4 * lane, a, 16);
}
Array<uint32_t> load(Array<uint16_t> rows, bool transposed, int64_t shift) {
  Array<uint32_t> registers({32, 4});
  launch(load_kernel, 1, 32, 1024, nullptr, Load{rows.data(), registers.mutable_data(), transposed, shift});
  return registers;
}

struct Transpose {
  const uint32_t* from;
  uint32_t* to;  // [32] both
};
void transpose_kernel(Transpose p) { p.to[threadIdx.x] = transpose(p.from[threadIdx.x]); }
Array<uint32_t> transposed(Array<uint32_t> registers) {
  Array<uint32_t> result(32);
  launch(transpose_kernel, 1, 32, 0, nullptr, Transpose{registers.data(), result.mutable_data()});
  return result;
}

struct Multiply {
  const uint32_t *a, *b;  // [32][4], [32][2]
  float* d;               // [32][4]
};
template <class T>
void multiply_kernel(Multiply p) {
  const int lane = threadIdx.x;
  uint32_t a[4];
  float d[4];
  std::memcpy(a, p.a + 4 * lane, 16);
  std::memcpy(d, p.d + 4 * lane, 16);
  multiply_add<T>(d, a, uint2{p.b[2 * lane], p.b[2 * lane + 1]});
  std::memcpy(p.d + 4 * lane, d, 16);
}
Array<float> multiply(Array<uint32_t> a, Array<uint32_t> b, Array<float> d, bool bfloat16) {
  Array<float> result({32, 4});
  std::memcpy(result.mutable_data(), d.data(), 32 * 4 * sizeof(float));
  launch(bfloat16 ? multiply_kernel<__nv_bfloat16> : multiply_kernel<__half>, 1, 32, 0, nullptr,
         Multiply{a.data(), b.data(), result.mutable_data()});
  return result;
}

struct Shuffle {
  const float* values;
  float *crossed, *sent;
  int mask, source;
};
void shuffle_kernel(Shuffle p) {
  const int i = threadIdx.x;
  p.crossed[i] = __shfl_xor_sync(0xffffffffu, p.values[i], p.mask);
  p.sent[i] = __shfl_sync(0xffffffffu, p.values[i], p.source);
}
pybind11::tuple shuffle(Array<float> values, int mask, int source) {
  Array<float> crossed(values.size()), sent(values.size());
  launch(shuffle_kernel, 1, int(values.size()), 0, nullptr,
         Shuffle{values.data(), crossed.mutable_data(), sent.mutable_data(), mask, source});
  return pybind11::make_tuple(crossed, sent);
}

struct Poison {
  unsigned char* found;  // [blocks][bytes]
  int64_t bytes;
};
void poison_kernel(Poison p) {
  unsigned char* memory = shared_memory<unsigned char>();
  std::memcpy(p.found + blockIdx.x * p.bytes, memory, p.bytes);
  std::memset(memory, 0, p.bytes);
}
// What each of several blocks finds in its shared memory, which it leaves full of zeros.
Array<unsigned char> poison(int64_t blocks, int64_t bytes) {
  Array<unsigned char> found({blocks, bytes});
  launch(poison_kernel, blocks, 1, bytes, nullptr, Poison{found.mutable_data(), bytes});
  return found;
}

struct Pass {
  float* values;
  int rounds, ring;    // ring: threads that pass values in turn
  bool by_warp;        // whether barriers are the warp's
  bool before, after;  // whether there is a barrier before and after values are read
};
void pass_kernel(Pass p) {
  const int mine = threadIdx.x, next = mine / p.ring * p.ring + (mine + 1) % p.ring;
  float* memory = shared_memory<float>();
  float value = p.values[mine];
  for (int round = 0; round < p.rounds; ++round) {
    memory[mine] = value;
    if (p.before && p.by_warp) __syncwarp();
    if (p.before && !p.by_warp) __syncthreads();
    value = memory[next];
    if (p.after && p.by_warp) __syncwarp();
    if (p.after && !p.by_warp) __syncthreads();
  }
  p.values[mine] = value;
}
// Every thread takes the next one's value, so many rounds.
Array<float> pass(Array<float> values, int rounds, int ring, bool by_warp, bool before, bool after) {
  Array<float> result(values.size());
  std::memcpy(result.mutable_data(), values.data(), values.nbytes());
  launch(pass_kernel, 1, int(values.size()), values.nbytes(), nullptr,
         Pass{result.mutable_data(), rounds, ring, by_warp, before, after});
  return result;
}

enum class Fault { warp_in_block, half_a_shuffle, two_places };
void faulty_kernel(Fault fault) {
  const bool odd = threadIdx.x % 2 == 1;
  switch (fault) {
    case Fault::warp_in_block:
      if (odd)
        __syncthreads();
      else
        __syncwarp();
      return;
    case Fault::half_a_shuffle:
      if (odd) __shfl_sync(0xffffffffu, 1.0f, 0);
      __syncthreads();
      return;
    case Fault::two_places:
      if (odd)
        __syncthreads();
      else
        __syncthreads();
      return;
  }
}
void lose_barrier(int fault) { launch(faulty_kernel, 1, 64, 0, nullptr, Fault(fault)); }

void ask_for_shared_memory(int64_t bytes) { launch(poison_kernel, 0, 1, bytes, nullptr, Poison{}); }

}  // namespace

PYBIND11_MODULE(checks, m) {
  m.def("seed", &focalnet_shim::seed);
  m.def("load", &load);
  m.def("transpose", &transposed);
  m.def("multiply", &multiply);
  m.def("shuffle", &shuffle);
  m.def("poison", &poison);
  m.def("pass_on", &pass);
  m.def("lose_barrier", &lose_barrier);
  m.def("ask_for_shared_memory", &ask_for_shared_memory);
}

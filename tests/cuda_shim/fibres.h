// Blocks of CUDA threads as fibres. Between two synchronizations a fibre runs alone; which one runs next, and how far a
// warp gets ahead of the others, is random, so that a missing barrier shows: a thread that reads too early finds NaN or
// stale values in shared memory, which is filled with NaN before every block.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <vector>

namespace focalnet_shim {

struct Index {
  unsigned x = 0, y = 0, z = 0;
};
struct Running {
  Index thread, block, grid, size;
};

const Running& running();
inline int lane() { return running().thread.x % 32; }

// Barriers carry their place in the source: threads that wait at different ones are an error.
using Place = std::source_location;
void wait_for_block(Place place);
void wait_for_warp(Place place);

// Values exchanged between the lanes of the running thread's warp: a mailbox of 64 bytes for each, in two alternating
// sets, so that one wait is enough. `turn` switches a lane to its other set.
void turn();
unsigned char* mailbox(int lane);

// Shows `value` to the warp; afterwards the lanes' values can be read from their mailboxes.
template <class T>
void show(const T& value, Place place = Place::current()) {
  static_assert(sizeof(T) <= 64);
  turn();
  std::memcpy(mailbox(lane()), &value, sizeof(T));
  wait_for_warp(place);
}
template <class T>
T shown_by(int lane) {
  T value;
  std::memcpy(&value, mailbox(lane), sizeof(T));
  return value;
}

// `value` as lane `source` of the warp gave it.
template <class T>
T exchange(const T& value, int source, Place place = Place::current()) {
  show(value, place);
  return shown_by<T>(source % 32);
}

// Bytes of shared memory of the running block, 16-byte aligned.
void* shared_memory();

// Runs `kernel` in `blocks` blocks of `threads` threads, one block after the other.
void run_blocks(int64_t blocks, int threads, int64_t shared_bytes, const std::function<void()>& kernel);

// What runs kernels in the fibres' place while one is set, as compiled for a GPU, say. Gives 0, or the kernel failed.
using Runner = int (*)(const void* kernel, int64_t blocks, int threads, int64_t shared_bytes, const void* parameters,
                       int64_t size);
Runner runner();

// Seeds the random order from now on.
void seed(uint64_t seed);

}  // namespace focalnet_shim

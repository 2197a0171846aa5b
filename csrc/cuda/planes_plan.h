// How blocks of the plane kernels share their memory; the host plans with it, the kernels follow.
#pragma once

#include "cuda/planes.h"

namespace focalnet::cuda {

constexpr int LARGEST_BLOCK = 512, USUAL_BLOCK = 256;
constexpr int SUMS = 32;  // floats for group_sum

// Floats that each channel of a block needs.
struct ChannelSize {
  int taps;  // of one direction of the convolution
  int64_t planes;

  __host__ __device__ ChannelSize(const Chain& chain, const Frame& f, bool backward) {
    taps = 0;
    for (int l = 0; l < chain.L; ++l) taps += padded_taps(chain.levels[l].size);
    planes = backward ? 2 * int64_t(chain.L) * f.size : 2 * int64_t(f.size) + int64_t(f.segments) * ROWS * 4;
  }
};

// The group of threads that has a channel of a block, and its memory.
struct Group {
  const PlanesBlock& block;  // a kernel's parameters lie in constant memory: a copy would take registers
  int index, thread;         // which group of the block, and which of its threads
  float *sums, *taps, *flipped, *planes;

  __device__ Group(const Chain& chain, const PlanesBlock& block, const Frame& f, void* scratch, bool backward)
      : block(block), index(threadIdx.x / block.group_threads), thread(threadIdx.x % block.group_threads) {
    const ChannelSize size(chain, f, backward);
    sums = shared_memory<float>();
    taps = sums + SUMS + index * size.taps * (backward ? 2 : 1);
    flipped = taps + size.taps;
    planes = sums + SUMS + block.channels * size.taps * (backward ? 2 : 1) + index * size.planes;
    if (scratch) planes = static_cast<float*>(scratch) + (int64_t(blockIdx.x) * block.channels + index) * size.planes;
  }
  __device__ int threads() const { return block.group_threads; }
};

// Threads per channel and channels per block.
inline PlanesBlock planes_block(const Chain& chain, const Frame& f, const ChannelSize& size, bool backward) {
  const int64_t available = current_device().shared_per_block;
  PlanesBlock block{};
  const auto shared_bytes = [&](bool planes) {
    return 4 * (SUMS + block.channels * (size.taps * (backward ? 2 : 1) + (planes ? size.planes : 0)));
  };
  block.group_threads = 32;
  while (block.group_threads < USUAL_BLOCK && block.group_threads < f.segments) block.group_threads *= 2;
  block.channels = int(std::min<int64_t>(USUAL_BLOCK / block.group_threads, std::max<int64_t>(1, chain.g.C)));
  while (block.channels > 1 && shared_bytes(true) > available) block.channels /= 2;
  block.planes_in_shared = shared_bytes(true) <= available;
  if (!block.planes_in_shared) block.group_threads = LARGEST_BLOCK, block.channels = 1;
  block.shared_bytes = shared_bytes(block.planes_in_shared);
  return block;
}

inline PlanesSchedule planes_schedule(const Chain& chain, const Frame& f, const PlanesBlock& block, bool backward) {
  PlanesSchedule schedule{};
  schedule.channel_blocks = (chain.g.C + block.channels - 1) / block.channels;
  schedule.channel_run = schedule.image_run = 1;
  // Every task of the backward writes partial sums of the gates' and the weights' gradients: few tasks, but enough for
  // the device. A run over channels saves the former (maps are small then), one over images the latter.
  if (backward) {
    const int64_t enough = 6 * current_device().processors;
    const int64_t spare = std::max<int64_t>(1, chain.g.B * schedule.channel_blocks / enough);
    schedule.channel_run = std::min<int64_t>(schedule.channel_blocks, spare);
    schedule.image_run = std::max<int64_t>(1, spare / schedule.channel_run);
    if (f.segments < 64 && spare >= 4) {  // small maps: as many taps as pixels
      schedule.image_run = std::min<int64_t>(chain.g.B, 8);
      schedule.channel_run = std::max<int64_t>(1, spare / schedule.image_run);
    }
  }
  schedule.channel_runs = (schedule.channel_blocks + schedule.channel_run - 1) / schedule.channel_run;
  schedule.image_runs = (chain.g.B + schedule.image_run - 1) / schedule.image_run;
  schedule.blocks = std::min<int64_t>(schedule.tasks(), 1 << 20);
  return schedule;
}

inline PlanesPlan plan_planes(const Chain& chain, bool backward) {
  const Frame f(chain);
  const ChannelSize size(chain, f, backward);
  const Device device = current_device();
  PlanesPlan plan{};
  plan.block = planes_block(chain, f, size, backward);
  plan.schedule = planes_schedule(chain, f, plan.block, backward);
  if (!plan.block.planes_in_shared) {
    const int64_t most = std::min<int64_t>(2 * device.processors, device.scratch / 4 / size.planes);
    plan.schedule.blocks = std::max<int64_t>(std::min<int64_t>(plan.schedule.blocks, most), 1);
    plan.scratch_floats = plan.schedule.blocks * plan.block.channels * size.planes;
  }
  return plan;
}

}  // namespace focalnet::cuda

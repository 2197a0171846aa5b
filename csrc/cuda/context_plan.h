// How blocks of the plane kernels share their memory; the host plans with it, the kernels follow.
#pragma once

#include "cuda/planes.h"

namespace focalnet::cuda {

constexpr int LARGEST_BLOCK = 512, USUAL_BLOCK = 256;
constexpr int SUMS = 32;  // floats for group_sum

// Floats that each channel of a block needs.
struct Room {
  int taps;  // of one direction of the convolution
  int64_t planes;

  __host__ __device__ Room(const Chain& chain, const Frame& f, bool backward) {
    taps = 0;
    for (int l = 0; l < chain.L; ++l) taps += padded_taps(chain.levels[l].size);
    planes = backward ? 2 * int64_t(chain.L) * f.size : 2 * int64_t(f.size) + int64_t(f.segments) * ROWS * 4;
  }
};

// The memory of one channel of a block.
struct Memory {
  float *sums, *taps, *flipped, *planes;

  __device__ Memory(const Chain& chain, const ContextPlan& plan, const Frame& f, float* scratch, bool backward) {
    const Room room(chain, f, backward);
    const int group = threadIdx.x / plan.group;
    sums = shared_memory<float>();
    taps = sums + SUMS + group * room.taps * (backward ? 2 : 1);
    flipped = taps + room.taps;
    planes = sums + SUMS + plan.groups * room.taps * (backward ? 2 : 1) + group * room.planes;
    if (scratch) planes = scratch + (int64_t(blockIdx.x) * plan.groups + group) * room.planes;
  }
};

inline ContextPlan plan_planes(const Chain& chain, bool backward) {
  const Frame f(chain);
  const Room room(chain, f, backward);
  const Device device = current_device();
  ContextPlan plan{};
  const auto shared = [&](bool planes) {
    return 4 * (SUMS + plan.groups * (room.taps * (backward ? 2 : 1) + (planes ? room.planes : 0)));
  };
  plan.group = 32;
  while (plan.group < USUAL_BLOCK && plan.group < f.segments) plan.group *= 2;
  plan.groups = int(std::min<int64_t>(USUAL_BLOCK / plan.group, std::max<int64_t>(1, chain.g.C)));
  while (plan.groups > 1 && shared(true) > device.shared_per_block) plan.groups /= 2;
  plan.planes_in_shared = shared(true) <= device.shared_per_block;
  if (!plan.planes_in_shared) plan.group = LARGEST_BLOCK, plan.groups = 1;
  plan.shared = shared(plan.planes_in_shared);
  plan.channel_blocks = (chain.g.C + plan.groups - 1) / plan.groups;

  // Every task of the backward writes its share of the gates' and the weights' gradients: few tasks, but enough for the
  // device. A run over channels saves the former (maps are small then), one over images the latter.
  plan.channel_run = plan.image_run = 1;
  if (backward) {
    const int64_t enough = 6 * device.processors;
    const int64_t spare = std::max<int64_t>(1, chain.g.B * plan.channel_blocks / enough);
    plan.channel_run = std::min<int64_t>(plan.channel_blocks, spare);
    plan.image_run = std::max<int64_t>(1, spare / plan.channel_run);
    if (f.segments < 64 && spare >= 4) {  // small maps: as many taps as pixels
      plan.image_run = std::min<int64_t>(chain.g.B, 8);
      plan.channel_run = std::max<int64_t>(1, spare / plan.image_run);
    }
  }
  plan.channel_runs = (plan.channel_blocks + plan.channel_run - 1) / plan.channel_run;
  plan.image_runs = (chain.g.B + plan.image_run - 1) / plan.image_run;
  plan.slots = plan.channel_runs * plan.groups;
  plan.blocks = std::min<int64_t>(plan.tasks(), 1 << 20);
  if (!plan.planes_in_shared) {
    plan.blocks = std::min<int64_t>(plan.blocks, 2 * device.processors);
    plan.blocks = std::max<int64_t>(std::min<int64_t>(plan.blocks, device.scratch / 4 / room.planes), 1);
    plan.scratch = plan.blocks * plan.groups * room.planes;
  }
  return plan;
}

}  // namespace focalnet::cuda

// What the CUDA kernels are asked to do, in plain structs: no torch, no CUDA types. The ops (focal_context.cpp, ...)
// fill them in; the .cu files launch.
#pragma once

#include "common/geometry.h"

namespace focalnet::cuda {

constexpr int MAX_LEVELS = 8;

// A vector of parameters in the call's dtype, or nothing.
struct Vector {
  const void* data = nullptr;
  int64_t stride = 1;
};

struct LevelWeights {
  Level size;
  MapView weights;  // axis c is the channel, (t, m, w) the tap
};

// A level chain: the part of a call that both directions of focal_context share.
struct Chain {
  Geometry g;
  DType dtype;
  int L;
  LevelWeights levels[MAX_LEVELS];
  MapView ctx, gates;           // gates: axis c is the level, L + 1 of them
  Vector ctx_bias, gates_bias;  // added to them, where they come from a product that left its bias to us
  float scale;                  // of the result: 1 / (L + 1) if normalized
};

struct ContextForward {
  Chain chain;
  MapView out;
  float* mean;     // (B, C): of the last level over all pixels
  float* scratch;  // ContextPlan::scratch floats
};

struct ContextBackward {
  Chain chain;
  MapView grad_out;
  const float* mean;     // what the forward found
  MapView grad_ctx;      // written where data is not null
  MapView ctx_all;       // likewise: the forward's result again
  MapView grad_gates;    // likewise, by tokens; other forms leave gates_parts
  float* gates_parts;    // [ContextPlan::slots][B][L + 1][pixels], or null
  float* weights_parts;  // [ContextPlan::image_runs][C][all levels' taps], or null
  float* scratch;
};

// How a direction of focal_context is cut into blocks: over planes of floats, for every call.
struct ContextPlan {
  bool tensor_cores;                 // focal_context_*_rows.cu, not focal_context_*.cu
  int group;                         // threads per channel
  int groups;                        // channels side by side in a block
  int64_t channel_blocks;            // of `groups` channels
  int64_t channel_run, image_run;    // channel blocks and images that a task takes one after the other
  int64_t channel_runs, image_runs;  // tasks along both
  int64_t slots;                     // of gates_parts
  int64_t shared;                    // bytes of shared memory
  bool planes_in_shared;             // or in scratch
  int64_t blocks;                    // that run
  int64_t scratch;                   // floats
  constexpr int64_t tasks() const { return channel_runs * image_runs; }
};

ContextPlan plan_context_fwd(const Chain& chain);
ContextPlan plan_context_bwd(const Chain& chain);
void run_context_fwd(const ContextForward& p, const ContextPlan& plan, void* stream);
void run_context_bwd(const ContextBackward& p, const ContextPlan& plan, void* stream);

// The same by rows on tensor cores (rows.h), for 16-bit maps and kernels up to 13. Offsets count 16-bit elements of the
// shared memory of a warp, or of a block where a map is too wide for one.
constexpr int MOST_WARPS = 8;  // along a row: maps up to 1024 columns wide
struct RowsPlan {
  bool fits;                                     // whether this form can take the call
  int window;                                    // 16 or 32 columns
  int segments;                                  // of 8 columns, per row of one image
  int images;                                    // side by side in a warp
  int warps;                                     // along one row: 1, or as many as a wide map needs
  int owners;                                    // of rows, in a block: its warps, or 1 where a row needs them all
  int image_row, row;                            // elements of a ring's row: of one image, of all
  int reach[MAX_LEVELS + 1];                     // rows that levels up to l together look up and down
  int rings[MAX_LEVELS], ring_rows[MAX_LEVELS];  // of what enters level l
  int zeros, bands[MAX_LEVELS], sums;
  int elements;                    // in all
  int64_t strips, strip_rows;      // of rows
  int64_t groups, run, runs;       // of images, and how many of these a warp takes one after the other
  int64_t first_run;               // of a launch
  int64_t tasks, blocks, threads;  // threads: of a block
  int64_t shared;                  // bytes
  int64_t shares;                  // floats of [strips][B][C], sums of the last level where there are several strips
};

// What the backward has besides. A block's warps own neighbouring channels and go down the same maps together.
struct RowsBackwardPlan {
  RowsPlan rows;
  int flipped[MAX_LEVELS];                       // bands of the transposes
  int grads[MAX_LEVELS], grad_rows[MAX_LEVELS];  // rings of the gradients of what leaves level l's convolution
  // and such that only the lane that wrote them reads, 64 pairs to a row
  int slopes[MAX_LEVELS], slope_rows[MAX_LEVELS], grad_out, grad_out_rows;
  int products;         // [L + 1][STEP][2][32] pairs: what a channel adds to the gates' gradients
  int channels;         // of a block: its warps
  int64_t channel_run;  // blocks of channels that a task takes one after the other
  int64_t slots;        // of gates_parts: tasks along the channels
};

RowsBackwardPlan plan_rows_bwd(const Chain& chain);
void run_rows_bwd(const ContextBackward& p, const RowsBackwardPlan& plan, void* stream);

// The backward again for whatever the forward takes by rows: in several passes, which hand rows on to each other in
// global memory.
struct PassesPlan {
  RowsPlan down, up, weights;
  int64_t row, plane, handed_on;  // elements of what is handed on: of a row, of a channel, of all levels of a chunk
  int64_t chunk, chunk_images;    // runs (see RowsPlan), and images, that are there at once
  int64_t slots, slot_channels;   // of gates_parts
  int64_t image_runs;             // of weights_parts
  int64_t scratch;                // floats
};

PassesPlan plan_passes_bwd(const Chain& chain);
void run_passes_bwd(const ContextBackward& p, const PassesPlan& plan, void* stream);

RowsPlan plan_rows_fwd(const Chain& chain);
void run_rows_fwd(const ContextForward& p, const RowsPlan& plan, float* shares, void* stream);

// Level by level over tokens: maps whose channels are adjacent in memory, in whole quads. A level is one pass over the
// map, on CUDA cores, and leaves its result in scratch in the call's dtype.
struct TokensPlan {
  bool fits;              // whether this form can take the call
  int lanes;              // of a block: segments of columns side by side
  int64_t segments;       // of an image
  int64_t image_blocks;   // of `lanes` segments each
  int64_t channel_tiles;  // what a block has of the channels
  int64_t chunk;          // images at once
  int64_t pitch, map;     // elements of scratch from pixel to pixel, and of a level of a chunk
  int64_t elements;       // of scratch
  int64_t floats;         // of sums and means
  int64_t weights_parts;  // of the weights' gradients: of a chunk, and of all
  int64_t all_weights_parts;
};
constexpr int SEGMENT = 8, TILE = 32, SUM_PARTS = 16;  // columns; channels; of a map's pixels, in the mean's gradient

bool takes_tokens(const Chain& chain);  // wherever its maps lie so
TokensPlan plan_tokens(const ContextForward& p);
TokensPlan plan_tokens(const ContextBackward& p);
// `scratch`: TokensPlan::elements, then `floats`: TokensPlan::floats.
void run_tokens_fwd(const ContextForward& p, const TokensPlan& plan, void* scratch, float* floats, void* stream);
void run_tokens_bwd(const ContextBackward& p, const TokensPlan& plan, void* scratch, float* floats, void* stream);

// out = the sum over j < count of parts[j * stride + (image * C + channel) * channel_stride + pixel], in a fixed order.
struct SumJob {
  const float* parts;
  int64_t count, stride, channel_stride;
  Geometry g;
  MapView out;
};
constexpr int MAX_SUMS = MAX_LEVELS + 1;
struct SumJobs {
  DType dtype;
  int n;
  SumJob jobs[MAX_SUMS];
};
void run_sums(const SumJobs& jobs, void* stream);

// out = LN?((q + q_bias) * (modulator + bias))
struct ModulateForward {
  Geometry g;
  DType dtype;
  MapView q, modulator;
  Vector q_bias, bias;
  Vector ln_weight, ln_bias;  // null: no LayerNorm
  float ln_eps;
  MapView out;  // may be `modulator`
};
void run_modulate_fwd(const ModulateForward& p, void* stream);

// Its backward. `grad` is the gradient of out, over which out itself is written again.
struct ModulateBackward {
  ModulateForward forward;
  MapView grad, grad_q, grad_modulator;
  float* sums;  // [parts][3][C]: of grad_modulator, and of LN's weight's and bias' gradients
  int64_t parts;
};
int64_t modulate_bwd_parts(const ModulateBackward& p);
void run_modulate_bwd(const ModulateBackward& p, void* stream);

}  // namespace focalnet::cuda

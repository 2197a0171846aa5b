// What the CUDA kernels are asked to do, in plain structs: no torch, no CUDA types. The ops (focal_context.cpp, ...)
// fill them in; the .cu files launch.
#pragma once

#include <optional>

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
  float* mean;    // (B, C): of the last level over all pixels
  void* scratch;  // as many bytes as the plan asks for
};

struct ContextBackward {
  Chain chain;
  MapView grad_out;
  const float* mean;   // what the forward found
  MapView grad_ctx;    // written where data is not null
  MapView ctx_all;     // likewise: the forward's result again
  MapView grad_gates;  // likewise, by plans that have no gate_parts()
  float* gate_sums;    // [gate_parts()][L + 1][B][pixels], or null: partial sums of the gates' gradients
  float* weight_sums;  // [weight_parts()][C][all levels' taps], or null: of the weights' gradients
  void* scratch;       // as many bytes as the plan asks for
};

// Each form of the kernels has its plan: how a call is cut into blocks. A planner gives nothing where its form cannot
// take the call. A plan answers
//   scratch_bytes(): of ContextForward::scratch, ContextBackward::scratch;
//   gate_parts(), weight_parts(): in the backward, how many partial sums there are; nothing where the gates' gradients
//     are written at once;
// and run_context_fwd or run_context_bwd launches it.

// ---------------------------------------------------------------- planes of floats (planes.h): takes every call

struct PlanesBlock {
  int group_threads;      // threads per channel
  int channels;           // side by side in a block, a group of threads each
  bool planes_in_shared;  // or in scratch
  int64_t shared_bytes;
};

struct PlanesSchedule {
  int64_t channel_blocks;            // blocks of channels
  int64_t channel_run, image_run;    // channel blocks and images that a task takes one after the other
  int64_t channel_runs, image_runs;  // tasks along both
  int64_t blocks;                    // that run
  constexpr int64_t tasks() const { return channel_runs * image_runs; }
};

struct PlanesPlan {
  PlanesBlock block;
  PlanesSchedule schedule;
  int64_t scratch_floats;

  int64_t scratch_bytes() const { return 4 * scratch_floats; }
  std::optional<int64_t> gate_parts() const { return schedule.channel_runs * block.channels; }
  int64_t weight_parts() const { return schedule.image_runs; }
};

PlanesPlan plan_planes_fwd(const Chain& chain);
PlanesPlan plan_planes_bwd(const Chain& chain);
void run_context_fwd(const ContextForward& p, const PlanesPlan& plan, void* stream);
void run_context_bwd(const ContextBackward& p, const PlanesPlan& plan, void* stream);

// ------------------------------------------------- rows on tensor cores (rows.h): 16-bit maps and kernels up to 13

constexpr int MOST_WARPS = 8;  // along a row: maps up to 1024 columns wide

// How rows lie in a warp, or in a block where a map is too wide for one.
struct RowsLayout {
  int window;                 // 16 or 32 columns
  int segments;               // of 8 columns, per row of one image
  int images;                 // side by side in a warp
  int warps;                  // along one row: 1, or as many as a wide map needs
  int image_row, row;         // elements of a ring's row: of one image, of all
  int reach[MAX_LEVELS + 1];  // rows that levels up to l together look up and down
  int64_t image_groups;       // of `images` images each
};

// A ring buffer of rows in shared memory. Rows are put there STEP at a time, side by side: `rows` is a multiple of
// that, and `shift` brings the first of them to one. Device functions take it by value: through a reference to a
// kernel's parameters it would be read again for every row.
struct Ring {
  int first, row;    // elements: where it begins, and of a row
  int rows;          // in it
  int shift;         // row t of the map is in place (t + shift) % rows
  uint32_t inverse;  // of `rows`: 2^32 / rows, rounded up
};
// One for each level. Their numbers lie apart: read in one access of 64 bits they would cost aligned pairs of
// registers.
struct Rings {
  int first[MAX_LEVELS], row[MAX_LEVELS], rows[MAX_LEVELS], shift[MAX_LEVELS];
  uint32_t inverse[MAX_LEVELS];
  constexpr Ring operator[](int l) const { return {first[l], row[l], rows[l], shift[l], inverse[l]}; }
  void set(int l, const Ring& ring) {
    first[l] = ring.first, row[l] = ring.row, rows[l] = ring.rows, shift[l] = ring.shift, inverse[l] = ring.inverse;
  }
};

// Where everything lies in the shared memory of the rows' owner, in 16-bit elements.
struct RowsShared {
  Rings inputs;           // of what enters level l
  int rings;              // elements of rings of whole rows, which lie before all else
  int bands[MAX_LEVELS];  // of level l's kernel rows
  int sums;               // of the images
  int elements;           // in all
};

struct RowsSchedule {
  int owners;                  // of rows, in a block: its warps, or 1 where a row needs them all
  int64_t strips, strip_rows;  // of rows
  int64_t run, runs;           // image groups that an owner takes one after the other, and how many such runs there are
  int64_t first_run;           // of a launch
  int64_t tasks, blocks;       // of a launch
  int64_t threads;             // of a block
  int64_t shared_bytes;        // of a block
};

struct RowsPlan {
  RowsLayout layout;
  RowsShared shared;
  RowsSchedule schedule;
};

struct RowsForwardPlan {
  RowsPlan rows;
  int64_t strip_sums;  // [strips][B][C], of the last level: where there are several strips

  int64_t scratch_bytes() const { return 4 * strip_sums; }
};

bool takes_rows(const Chain& chain);  // of maps that lie as planes, on any GPU, and at their best
std::optional<RowsForwardPlan> plan_rows_fwd(const Chain& chain);
void run_context_fwd(const ContextForward& p, const RowsForwardPlan& plan, void* stream);

// The backward in several passes, for whatever the forward takes by rows. From pass to pass rows go through global
// memory: what leaves each level, GELU's slopes, and gradients.
struct PassesWorkspace {
  int64_t row, plane;    // elements of a row, and of a channel
  int64_t elements;      // of each of the three, for all levels of a chunk
  int64_t runs, images;  // of a chunk: as many as are in memory at once (runs: see RowsSchedule)
};

// Partial sums of the gates' gradients: channels of each, and how many of them.
struct PassesGates {
  int64_t channels, parts;
};

struct PassesPlan {
  RowsPlan down, up, weights;
  PassesWorkspace workspace;
  PassesGates gates;
  int64_t strip_sums;  // [strips][B][C], of the last gate times the gradient

  int64_t scratch_bytes() const { return 4 * (3 * workspace.elements / 2 + strip_sums); }
  std::optional<int64_t> gate_parts() const { return gates.parts; }
  int64_t weight_parts() const { return down.schedule.runs * down.schedule.strips; }
};

std::optional<PassesPlan> plan_passes_bwd(const Chain& chain);
void run_context_bwd(const ContextBackward& p, const PassesPlan& plan, void* stream);

// ------------------ tokens (tokens.h), level by level: maps whose channels are adjacent in memory, in whole quads

// A level is one pass over the map, on CUDA cores, and leaves its result in scratch in the call's dtype.
constexpr int SEGMENT = 8, TILE = 32, SUM_PARTS = 16;  // columns; channels; of a map's pixels, in the mean's gradient

// What blocks of a pass have.
struct TokensTiling {
  int lanes;              // segments of columns side by side
  int64_t segments;       // of an image
  int64_t image_blocks;   // of `lanes` segments each
  int64_t channel_tiles;  // of TILE channels
};

// Scratch memory: levels as maps, then sums and means as floats.
struct TokensScratch {
  int64_t images;     // at once: a chunk
  int64_t pitch;      // elements from pixel to pixel
  int64_t map;        // elements of one level of a chunk
  int64_t floats_at;  // byte where the floats begin
  int64_t bytes;      // in all
};

struct TokensPlan {
  TokensTiling tiling;
  TokensScratch scratch;

  int64_t scratch_bytes() const { return scratch.bytes; }
};

struct TokensBackwardPlan {
  TokensPlan tokens;
  int64_t chunks, chunk_weight_parts;  // of images; partial sums of the weights' gradients that each leaves

  int64_t scratch_bytes() const { return tokens.scratch.bytes; }
  std::optional<int64_t> gate_parts() const { return std::nullopt; }
  int64_t weight_parts() const { return chunks * chunk_weight_parts; }
};

bool takes_tokens(const Chain& chain);  // wherever its maps lie so
std::optional<TokensPlan> plan_tokens_fwd(const ContextForward& p);
std::optional<TokensBackwardPlan> plan_tokens_bwd(const ContextBackward& p);
void run_context_fwd(const ContextForward& p, const TokensPlan& plan, void* stream);
void run_context_bwd(const ContextBackward& p, const TokensBackwardPlan& plan, void* stream);

// --------------- images (images.h): 16-bit maps that fit shared memory, pixels adjacent, square kernels of 3 to 9

// On tensor cores. A block has a few channels of a few whole images, each channel a plane with zeros around them, for
// what enters a level and what leaves it. Work is dealt out in stretches: a few rows of EIGHT columns, one below the
// other. EIGHT stretches are a unit, of one image or of several.
constexpr int EIGHT = 8;

// n / divisor for n < 2^16, by a product.
struct Divisor {
  uint32_t divisor = 1;
  uint64_t inverse = uint64_t(1) << 32;
  constexpr Divisor() = default;
  constexpr explicit Divisor(int64_t d) : divisor(uint32_t(d)), inverse(((int64_t(1) << 32) + d - 1) / d) {}
  constexpr int divide(int n) const { return int(uint64_t(n) * inverse >> 32); }
};

struct ImagesLayout {
  int images, pixels;       // of a block, at a time; of an image
  int segments, stretches;  // of an image: of EIGHT columns; in each of these
  int stretch_rows;
  int units;               // of a channel
  int pitch, image_pitch;  // elements from a row to the next, from an image to the next, in a plane with zeros
  int plane;               // its elements
  int reach;               // rows of zeros above an image
  int tight_pitch, tight_image, tight_plane;  // likewise without zeros, rows at whole twos of elements; its elements
  int neighbours;                             // 1, 2 or 4 pixels, of which a row has a whole number
  int period, places;   // images whose places are listed, and others lie as they do; how many places
  int planes;           // of each channel in the forward
  int channels, warps;  // of a block at a time; that share a channel
  int64_t channel_tiles, image_blocks;
  int64_t runs;                    // blocks that share the image blocks of a tile of channels
  Divisor tiles, rows, row_parts;  // channel_tiles; of an image; `neighbours` of a row
  constexpr int listed() const { return images * stretches; }               // of a segment
  constexpr int all_listed() const { return (units + units % 2) * EIGHT; }  // a step has two units
  constexpr int threads() const { return 32 * channels * warps; }
};

// How threads read pixels: so many in one access, of a run of pixels that lie in a row in memory. That is an image, or
// all of a block's, which follow one another.
struct Vectors {
  int pixels;   // 1 or 4
  Divisor run;  // accesses; more than there are where all images are one
  bool one_run;
  Divisor period;  // accesses
};

struct ImagesPlan {
  ImagesLayout layout;
  Vectors vectors;

  int64_t scratch_bytes() const { return 0; }
};

struct ImagesBackwardPlan {
  ImagesLayout layout;
  Vectors vectors;

  int64_t scratch_bytes() const { return 0; }
  std::optional<int64_t> gate_parts() const { return layout.channel_tiles; }
  int64_t weight_parts() const { return layout.runs; }
};

bool takes_images(const Chain& chain);  // wherever its maps lie so, and fit
std::optional<ImagesPlan> plan_images_fwd(const ContextForward& p);
std::optional<ImagesBackwardPlan> plan_images_bwd(const ContextBackward& p);
void run_context_fwd(const ContextForward& p, const ImagesPlan& plan, void* stream);
void run_context_bwd(const ContextBackward& p, const ImagesBackwardPlan& plan, void* stream);

// ------------------------------------------------------------------------------------------------- other kernels

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

// A (rows, columns) weight and its bias, if there is one, with zeros up to `to_rows`; what is written is dense.
struct PadRows {
  DType dtype;
  int64_t rows, to_rows, columns, row_stride, column_stride;
  const void* weight;
  Vector bias;
  void *to_weight, *to_bias;  // to_bias: or null
};
void run_pad_rows(const PadRows& p, void* stream);

// The sums over tokens of each of a matrix' n channels, in parts: sums [parts][n].
struct TokenSums {
  int64_t tokens, n, token_stride, channel_stride;
  DType dtype;
  const void* rows;
  float* sums = nullptr;
  int64_t parts = 0;
};
int64_t token_sums_parts(const TokenSums& p);  // 0: it does not lie so that we would take it
void run_token_sums(const TokenSums& p, void* stream);

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
  static constexpr int SUMS = 4;
  float* sums;  // [parts][SUMS][C]: of grad_modulator, of grad_q, and of LN's weight's and bias' gradients
  int64_t parts;
};
int64_t modulate_bwd_parts(const ModulateBackward& p);
void run_modulate_bwd(const ModulateBackward& p, void* stream);

// Dense elements of some dtype, or nothing.
struct Elements {
  const void* data = nullptr;
  DType dtype = DType::f32;
};

// What a residual branch has around its body: drop_path * gamma * norm?(...).
struct Around {
  bool norm;
  float norm_eps;
  Elements norm_weight, norm_bias;  // (C,)
  Elements gamma;                   // (C,) or nothing
  Elements drop_path;               // a factor per sample, or nothing
};

// y = LayerNorm(x), dense rows (tokens, C); x is in y's dtype or in float32. Where `sum` has data, it is written in x's
// dtype, x + drop_path * gamma * u with u in y's, and y is the norm of that.
struct NormForward {
  int64_t tokens;
  int C;
  float eps;
  Elements x, weight, bias, y;
  Elements u, sum, gamma, drop_path;
  int64_t pixels;  // tokens of a sample
};
bool takes_norm(const NormForward& p);
void run_norm_fwd(const NormForward& p, void* stream);

// y = x + drop_path * gamma * norm?(u), dense rows (tokens, C).
struct ResidualForward {
  int64_t tokens;
  int C;
  int64_t pixels;  // tokens of a sample
  Elements x, u, y;
  Around around;
};
void run_residual_fwd(const ResidualForward& p, void* stream);

// The backward of drop_path * gamma * norm?(rows), plus `add`.
struct NormBackward {
  int64_t tokens;
  int C;
  int64_t pixels;
  Elements rows, grad, add;  // add: or nothing
  Elements grad_rows;        // written
  Around around;
  float* sums;  // [parts][4][C]: of the gradients of norm's weight, its bias, gamma, and (without add) of rows
  int64_t parts;
};
constexpr int MOST_NORMALIZED = 6144;  // channels; ops/_native.py says it to dispatch
int64_t norm_bwd_parts(int64_t tokens, int C);
void run_norm_bwd(const NormBackward& p, void* stream);

// hidden = GELU(pre), which may be one (tokens, M), and pre's gradient over `grad`; sums [parts][M] of the latter.
struct GeluBackward {
  int64_t tokens;
  int M;
  DType dtype;
  const void* pre;
  void *hidden, *grad;
  float* sums;
  int64_t parts;
};
void run_gelu_bwd(const GeluBackward& p, void* stream);

// Parts of a sum over tokens.
int64_t token_parts(int64_t tokens, int channels);

}  // namespace focalnet::cuda

#pragma once
// Which kernel a low-bit product gets: host arithmetic, no CUDA. Exposed in Python as quantkernels.plan.

#include <algorithm>
#include <cstdint>

#include "core/args.h"
#include "core/bitplanes.h"
#include "cuda/tile/walk.h"

namespace qk::cuda {

// dp4a row by row, popcounts of planes row by row, direct, mma of bytes, mma of bits.
enum class Engine { kDotProduct, kPlaneProduct, kDepthwise, kBytes, kBits };

// Output channels by pixels that a block of 128 threads computes. Four warps take 32 channels each, or two of them share.
enum class TileShape { k128x128, k64x128, k128x32 };

struct ProductPlan {
  Engine engine;
  TileShape tile;
  int chunk;       // bytes of the activation that one copy moves: 16; 4; 1 where taps do not end on words
  int64_t splits;  // blocks that share the depth of a tile
  int64_t steps;   // of 128 bytes of depth, of all splits together
  int64_t tiles;   // of the output, all groups together
};

struct Device {
  int architecture;  // 80, 86, 89, 90, ...
  int multiprocessors;
};

inline constexpr int64_t kStepBytes = 128;        // depth that a stage of the pipeline holds
inline constexpr int64_t kMaxDepth = 1 << 15;     // products are below 2^16: int32 sums of this many are exact
inline constexpr int64_t kMaxBitDepth = 1 << 27;  // products of up to four bits are below 2^4
inline constexpr int64_t kDotProductPixels = 8;   // rows up to which weights are streamed once, without tensor cores
inline constexpr int64_t kDotProductDepth = 1 << 19;
inline constexpr int kMaxBitPairs = 4;  // of planes; with more of them bytes are faster
inline constexpr int64_t kCopyBytes = 16;

inline constexpr int channels_of(TileShape tile) { return tile == TileShape::k64x128 ? 64 : 128; }
inline constexpr int pixels_of(TileShape tile) { return tile == TileShape::k128x32 ? 32 : 128; }

inline bool is_linear(const ConvGeometry& g) {
  return g.in_height * g.in_width == 1 && g.kernel_height * g.kernel_width == 1 && g.out_height * g.out_width == 1 &&
         g.groups == 1;
}

// Whether the activation is wanted as planes.
inline bool takes_planes(Engine engine) { return engine == Engine::kBits || engine == Engine::kPlaneProduct; }

// Bytes of a tap of one group in a row of codes: a single tap's rows are padded for whole copies.
inline int64_t tap_bytes_of(const ConvGeometry& g, Engine engine) {
  const int64_t channels = g.in_channels / g.groups;
  if (takes_planes(engine)) return words_of(channels) * (kWordBits / 8);
  const bool padded = g.kernel_height * g.kernel_width == 1 && engine != Engine::kDepthwise;
  return padded ? divide_up(channels, kCopyBytes) * kCopyBytes : channels;
}

// Where planes are multiplied as they are. Up to sm_90 the bit product is an instruction; a tap must begin with a word.
inline bool multiplies_bits(const ConvGeometry& g, int x_bits, int w_bits, int architecture) {
  const int64_t taps = g.kernel_height * g.kernel_width, channels = g.in_channels / g.groups;
  return x_bits * w_bits <= kMaxBitPairs && architecture <= 90 && (taps == 1 || channels % kWordBits == 0) &&
         taps * channels >= 128;
}

// learned: the sums of each pair of planes have a step of their own, so planes are multiplied whatever it costs, and a block
// needs twice the registers for its sums: integers of this pair, floats of all.
inline ProductPlan plan_product(const ConvGeometry& g, int x_bits, int w_bits, bool learned, const Device& device) {
  const int64_t taps = g.kernel_height * g.kernel_width, channels = g.in_channels / g.groups, depth = taps * channels;
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  ProductPlan plan{Engine::kBytes, TileShape::k128x128, 16, 1, 0, 0};
  if (is_linear(g) && pixels <= kDotProductPixels && depth <= kDotProductDepth) {
    plan.engine = learned ? Engine::kPlaneProduct : Engine::kDotProduct;
    return plan;
  }
  if (g.groups > 1 && channels == 1 && taps <= kMaxDepth && g.out_height * g.out_width * g.out_channels <= INT32_MAX) {
    plan.engine = Engine::kDepthwise;
    return plan;
  }
  if (learned || multiplies_bits(g, x_bits, w_bits, device.architecture)) plan.engine = Engine::kBits;
  const bool bits = plan.engine == Engine::kBits;
  const int64_t tap_bytes = tap_bytes_of(g, plan.engine);
  plan.chunk = tap_bytes % kCopyBytes == 0 ? 16 : bits ? 4 : 1;

  const int64_t group_channels = g.out_channels / g.groups;
  if (pixels <= 32 && plan.chunk == 16) {
    plan.tile = TileShape::k128x32;
  } else if (plan.chunk != 16 || group_channels <= 64 || learned) {
    plan.tile = TileShape::k64x128;
  }
  plan.tiles = g.groups * divide_up(group_channels, channels_of(plan.tile)) * divide_up(pixels, pixels_of(plan.tile));
  plan.steps = divide_up(taps * tap_bytes, kStepBytes);
  // Splits of the depth: as many as int32 sums need, and more where tiles leave multiprocessors idle. A split is worth its
  // partial sums from a few steps on.
  if (learned) {  // floats of parts of the depth would depend on how it was split
    plan.splits = 1;
    return plan;
  }
  constexpr int64_t kBlocksAtOnce = 2, kFewestSteps = 4, kMostSplits = 32;
  const int64_t needed = divide_up(plan.steps, (bits ? kMaxBitDepth / 8 : kMaxDepth) / kStepBytes);
  const int64_t idle = device.multiprocessors * kBlocksAtOnce / plan.tiles;
  const int64_t wanted = std::clamp<int64_t>(std::min(idle, plan.steps / kFewestSteps), 1, kMostSplits);
  const int64_t per_split = std::max<int64_t>(1, divide_up(plan.steps, std::max(needed, wanted)));
  plan.splits = std::max<int64_t>(1, divide_up(plan.steps, per_split));
  return plan;
}

}  // namespace qk::cuda

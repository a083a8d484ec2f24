#pragma once
// How a launch cuts a tensor seen as [outer, channels, inner] for the threads: host arithmetic, no CUDA.
//
// Runs: `inner` neighbours share a channel. A group of up to 32 lanes takes a slice of one channel: chunks of its runs,
// whose packs start at multiples of the pack size, so the first and the last pack of a run may belong to it in part.
// Columns: runs are short and there are many of them (channels_last). The row of channels * inner columns is repeated until
// it is a whole number of packs and at least a warp of them wide; a thread keeps to its columns and walks down the rows.

#include <algorithm>
#include <bit>
#include <cstdint>
#include <numeric>

#include "core/args.h"

namespace qk::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kWarps = kThreads / 32;
inline constexpr int kBlocksPerMultiprocessor = 8;  // 8 * 256 threads fill a multiprocessor of every target
inline constexpr int64_t kShortRun = 32;            // runs below this, and at least as many rows, go by columns

QK_HOST_DEVICE constexpr int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

struct Walk {
  Layout layout;
  bool aligned;  // whole packs may be moved by one access
  bool by_columns;
  int64_t partials;  // accumulators that the first stage leaves a channel
  int64_t slices;    // runs: groups that share a channel; columns: blocks that share a stripe of columns
  // runs
  int lanes;        // threads of a group, a power of two
  int warps;        // groups that merge before they write: 1, or all of a block's
  uint32_t pieces;  // chunks that a run is cut into
  uint32_t chunks;  // of a channel: outer * pieces
  // columns
  int64_t period;  // columns of a repeated row
  int64_t rows;    // repeated rows, the last one perhaps partial
};

// What of an op the walk depends on.
struct Shape {
  int pack;     // elements of a pack
  int columns;  // neighbouring columns that a thread takes, 1 or a pack
  int unroll;   // packs that a thread has in flight
};

inline int64_t columns_blocks(const Walk& walk, const Shape& shape) {
  return divide_up(walk.period, int64_t{32} * shape.columns);
}
inline int64_t runs_blocks(const Walk& walk) { return divide_up(walk.layout.channels * walk.slices * walk.lanes, kThreads); }

// A function of the layout and the chip alone, so the order of additions never changes between runs.
inline Walk walk_of(Layout layout, const Shape& shape, bool aligned, int multiprocessors) {
  if (layout.channels == 1) layout = {1, 1, layout.numel()};
  Walk walk{};
  walk.layout = layout;
  walk.aligned = aligned;
  walk.by_columns = layout.inner < kShortRun && layout.outer >= kShortRun;
  const int64_t blocks = int64_t{multiprocessors} * kBlocksPerMultiprocessor;
  if (walk.by_columns) {
    const int64_t row = layout.channels * layout.inner;
    walk.period = row * (shape.pack / std::gcd<int64_t>(row, shape.pack));
    walk.period *= divide_up(int64_t{32} * shape.pack, walk.period);
    walk.rows = divide_up(layout.numel(), walk.period);
    walk.slices = std::clamp<int64_t>(blocks / columns_blocks(walk, shape), 1, divide_up(walk.rows, kWarps * shape.unroll));
    walk.partials = walk.slices * (walk.period / layout.channels);
    return walk;
  }
  // A run that starts anywhere touches one pack more.
  const int64_t packs =
      divide_up(layout.inner, shape.pack) + (layout.inner % shape.pack != 0 && layout.outer * layout.channels > 1);
  walk.lanes = static_cast<int>(std::bit_ceil(static_cast<uint64_t>(std::min<int64_t>(packs, 32))));
  walk.pieces = static_cast<uint32_t>(divide_up(packs, int64_t{walk.lanes} * shape.unroll));
  walk.chunks = static_cast<uint32_t>(layout.outer * walk.pieces);
  walk.slices = std::clamp<int64_t>(blocks * kThreads / walk.lanes / layout.channels, 1, walk.chunks);
  walk.warps = walk.lanes == 32 && walk.slices >= kWarps ? kWarps : 1;
  walk.slices -= walk.slices % walk.warps;
  walk.partials = walk.slices / walk.warps;
  return walk;
}

}  // namespace qk::cuda

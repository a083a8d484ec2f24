#pragma once
// Device code of fake_quantize. Formulas are those of csrc/core/quantizer.h; compile with --fmad=false.

#include "core/quantizer.h"
#include "cuda/tile/element.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

inline constexpr int kThreads = 256;
inline constexpr int kColumnWidth = 32;                      // columns that a block of the column kernel takes
inline constexpr int kColumnRows = kThreads / kColumnWidth;  // and rows it reads at once

struct Channel {
  Grid grid;
  float inverse;
};

__device__ __forceinline__ Channel load_channel(const float* grid, int64_t channel) {
  const float* row = grid + channel * kGridColumns;
  return {{row[0], row[1], row[2]}, inverse_step(row[1])};
}

// The three sums that every range gradient is made of.
struct RangeSums {
  float below = 0.0f, above = 0.0f, inside = 0.0f;
};

template <Ste kSte>
__device__ __forceinline__ float backward_element(float g, float x, const Channel& c, float levels, RangeSums& sums) {
  if constexpr (kSte == Ste::kIdentity) return g;
  const float position = grid_position(x, c.grid.offset, c.inverse);
  if (position < 0.0f) sums.below += g;
  if (position >= levels) sums.above += g;
  if constexpr (kSte == Ste::kFull) {
    // Outside the range the clamped position is a whole number, so this term vanishes there by itself.
    const float clamped = clamp_code(position, levels);
    sums.inside += g * (round_to_even(clamped) - clamped);
  }
  return position >= 0.0f && position <= levels ? g : 0.0f;
}

// q, 16 bytes at a time while a pack lies in one channel; a scalar tail, and scalars throughout where runs are short.
template <class T, Kind kKind, bool kPacked>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_forward_kernel(const T* __restrict__ x,         // [outer, channels, inner]
                                 T* __restrict__ out,             // like x
                                 const float* __restrict__ grid,  // [channels, 3]
                                 Layout layout, float levels) {
  const int64_t numel = layout.outer * layout.channels * layout.inner;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int64_t threads = static_cast<int64_t>(gridDim.x) * kThreads;
  constexpr int kSize = kPacked ? Pack<T>::kSize : 1;
  const int64_t packs = numel / kSize;
  for (int64_t i = thread; i < packs; i += threads) {
    const Channel c = load_channel(grid, layout.channels == 1 ? 0 : i * kSize / layout.inner % layout.channels);
    if constexpr (kPacked) {
      Pack<T> pack = reinterpret_cast<const Pack<T>*>(x)[i];
#pragma unroll
      for (int u = 0; u < kSize; ++u)
        pack.v[u] = from_float<T>(decode(encode(kKind, to_float(pack.v[u]), c.grid, c.inverse, levels), c.grid));
      reinterpret_cast<Pack<T>*>(out)[i] = pack;
    } else {
      out[i] = from_float<T>(decode(encode(kKind, to_float(x[i]), c.grid, c.inverse, levels), c.grid));
    }
  }
  for (int64_t i = packs * kSize + thread; i < numel; i += threads) {  // per tensor alone has a tail
    const Channel c = load_channel(grid, 0);
    out[i] = from_float<T>(decode(encode(kKind, to_float(x[i]), c.grid, c.inverse, levels), c.grid));
  }
}

// Long runs: block (channel, slice) takes every gridDim.y'th stretch of its channel. partial [channels, slices, 3].
template <class T, Ste kSte>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_backward_run_kernel(const T* __restrict__ grad,      // [outer, channels, inner]
                                      const T* __restrict__ x,         // like grad
                                      T* __restrict__ grad_x,          // like grad
                                      const float* __restrict__ grid,  // [channels, 3]
                                      float* __restrict__ partial, Layout layout, float levels) {
  const int64_t channel = blockIdx.x, count = layout.outer * layout.inner;
  const Channel c = load_channel(grid, channel);
  RangeSums sums;
  for (int64_t j = static_cast<int64_t>(blockIdx.y) * kThreads + threadIdx.x; j < count;
       j += static_cast<int64_t>(gridDim.y) * kThreads) {
    const int64_t i = layout.outer == 1 ? channel * layout.inner + j
                                        : (j / layout.inner * layout.channels + channel) * layout.inner + j % layout.inner;
    grad_x[i] = from_float<T>(backward_element<kSte>(to_float(grad[i]), to_float(x[i]), c, levels, sums));
  }
  const float below = block_sum<kThreads>(sums.below), above = block_sum<kThreads>(sums.above),
              inside = block_sum<kThreads>(sums.inside);
  if (threadIdx.x == 0) {
    float* mine = partial + (channel * gridDim.y + blockIdx.y) * 3;
    mine[0] = below, mine[1] = above, mine[2] = inside;
  }
}

// Short runs: neighbouring threads take neighbouring columns (channel, inner). partial [columns, slices, 3].
template <class T, Ste kSte>
__global__ void __launch_bounds__(kThreads)
    fake_quantize_backward_column_kernel(const T* __restrict__ grad,      // [outer, columns]
                                         const T* __restrict__ x,         // like grad
                                         T* __restrict__ grad_x,          // like grad
                                         const float* __restrict__ grid,  // [channels, 3]
                                         float* __restrict__ partial, Layout layout, float levels) {
  __shared__ RangeSums rows[kColumnRows][kColumnWidth];
  const int lane = threadIdx.x % kColumnWidth, first_row = threadIdx.x / kColumnWidth;
  const int64_t columns = layout.channels * layout.inner;
  const int64_t column = static_cast<int64_t>(blockIdx.x) * kColumnWidth + lane;
  RangeSums sums;
  if (column < columns) {
    const Channel c = load_channel(grid, column / layout.inner);
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kColumnRows + first_row; row < layout.outer;
         row += static_cast<int64_t>(gridDim.y) * kColumnRows) {
      const int64_t i = row * columns + column;
      grad_x[i] = from_float<T>(backward_element<kSte>(to_float(grad[i]), to_float(x[i]), c, levels, sums));
    }
  }
  rows[first_row][lane] = sums;
  __syncthreads();
  if (first_row == 0 && column < columns) {
    for (int r = 1; r < kColumnRows; ++r) {
      sums.below += rows[r][lane].below;
      sums.above += rows[r][lane].above;
      sums.inside += rows[r][lane].inside;
    }
    float* mine = partial + (column * gridDim.y + blockIdx.y) * 3;
    mine[0] = sums.below, mine[1] = sums.above, mine[2] = sums.inside;
  }
}

// Second stage: one block a channel adds its partial sums in a fixed order.
__global__ void __launch_bounds__(kThreads)
    fake_quantize_reduce_kernel(const float* __restrict__ partial,  // [channels, count, 3]
                                float* __restrict__ sums,           // [channels, 3]
                                int64_t count) {
  const int64_t channel = blockIdx.x;
  for (int s = 0; s < 3; ++s) {
    float sum = 0.0f;
    for (int64_t i = threadIdx.x; i < count; i += kThreads) sum += partial[(channel * count + i) * 3 + s];
    const float total = block_sum<kThreads>(sum);
    if (threadIdx.x == 0) sums[channel * 3 + s] = total;
  }
}

}  // namespace qk::cuda

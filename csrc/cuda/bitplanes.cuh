#pragma once
// Device code of the bit-planes: a warp's ballot on one bit of 32 neighbouring codes is a word of that bit's plane.

#include "core/bitplanes.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

inline constexpr int kWordsAtOnce = 8;  // words whose elements a warp has in flight

// Where codes to pack come from: memory, or a quantizer.
struct StoredCodes {
  using T = uint8_t;
  struct Params {};
  const T* x;  // [rows, columns]
  Kind kind;

  __device__ Params params(int64_t) const { return {}; }
  __device__ __forceinline__ int digits(T value, const Params&) const { return digits_of(kind, value); }
};

template <class Element>
struct QuantizedCodes {
  using T = Element;
  using Params = Channel;
  const T* x;  // [rows, columns]
  Kind kind;
  const float* grid;  // [rows or 1, 3]
  bool per_row;
  float levels;

  __device__ Params params(int64_t row) const { return load_channel(grid, per_row ? row : 0); }
  __device__ __forceinline__ int digits(T value, const Params& c) const {
    return digits_of(kind, from_float<uint8_t>(qk::encode(kind, to_float(value), c.grid, c.inverse, levels)));
  }
};

struct Packing {
  int64_t rows, columns, words;
  int64_t slices;  // warps that share a row
  int bits;
};

// plane_sums null: not asked for. Slices of a row add to its sums, which are then zero before; integers, so in any order.
template <class Source>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Source source, const Packing packing,
                                                        int32_t* __restrict__ planes,        // [bits, rows, words]
                                                        int32_t* __restrict__ plane_sums) {  // [bits, rows]
  const int lane = threadIdx.x % 32;
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t row = warp / packing.slices, slice = warp % packing.slices;
  if (row >= packing.rows) return;  // the whole warp
  const typename Source::Params params = source.params(row);
  const typename Source::T* const x = source.x + row * packing.columns;
  unsigned ones[kMaxBits] = {};
  for (int64_t word = slice * kWordsAtOnce; word < packing.words; word += packing.slices * kWordsAtOnce) {
    typename Source::T value[kWordsAtOnce]{};
#pragma unroll
    for (int u = 0; u < kWordsAtOnce; ++u) {
      const int64_t column = (word + u) * kWordBits + lane;
      if (column < packing.columns) value[u] = x[column];
    }
    int digits[kWordsAtOnce];
#pragma unroll
    for (int u = 0; u < kWordsAtOnce; ++u)
      digits[u] = (word + u) * kWordBits + lane < packing.columns ? source.digits(value[u], params) : 0;
#pragma unroll
    for (int plane = 0; plane < kMaxBits; ++plane) {
      if (plane >= packing.bits) break;
      const int digit = digit_of_plane(source.kind, packing.bits, plane);
      unsigned mine = 0;  // lane u writes word u
#pragma unroll
      for (int u = 0; u < kWordsAtOnce; ++u) {
        const unsigned ballot = __ballot_sync(kAllLanes, digits[u] >> digit & 1);
        if (lane == u) mine = ballot;
      }
      ones[plane] += __popc(mine);
      if (lane < kWordsAtOnce && word + lane < packing.words)
        planes[(plane * packing.rows + row) * packing.words + word + lane] = static_cast<int32_t>(mine);
    }
  }
  if (plane_sums == nullptr) return;
#pragma unroll
  for (int plane = 0; plane < kMaxBits; ++plane) {
    if (plane >= packing.bits) break;
    const auto total = static_cast<int32_t>(__reduce_add_sync(kAllLanes, ones[plane]));
    int32_t* const sum = plane_sums + plane * packing.rows + row;
    if (lane != 0) continue;
    if (packing.slices > 1) {
      atomicAdd(sum, total);
    } else {
      *sum = total;
    }
  }
}

// Four bits as the lowest bits of four bytes.
__device__ __forceinline__ uint32_t spread_bits(uint32_t bits) { return (bits & 0xfu) * 0x00204081u & 0x01010101u; }

// A thread takes a word of each plane and writes its 32 codes.
__global__ void __launch_bounds__(kThreads)
    unpack_kernel(const int32_t* __restrict__ planes,  // [bits, rows, words]
                  uint8_t* __restrict__ codes,         // [rows, columns]
                  int64_t rows, int64_t columns, int64_t words, Kind kind, int bits, bool aligned) {
  constexpr int kPack = 16;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < rows * words;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    uint32_t quads[kWordBits / 4] = {};
    for (int plane = 0; plane < bits; ++plane) {
      const auto word = static_cast<uint32_t>(planes[plane * rows * words + i]);
      const auto weight = static_cast<uint32_t>(plane_weight(kind, bits, plane));
#pragma unroll
      for (int q = 0; q < kWordBits / 4; ++q) quads[q] += spread_bits(word >> 4 * q) * weight;
    }
    const int64_t row = i / words, column = i % words * kWordBits;
    uint8_t* const out = codes + row * columns + column;
#pragma unroll
    for (int half = 0; half < kWordBits / kPack; ++half) {
      Pack<uint8_t, kPack> pack;
#pragma unroll
      for (int e = 0; e < kPack; ++e) pack.v[e] = static_cast<uint8_t>(quads[half * kPack / 4 + e / 4] >> e % 4 * 8);
      const int64_t left = columns - column - half * kPack;
      if (aligned && left >= kPack) {
        store_pack<uint8_t, kPack, true>(out + half * kPack, pack, 0, kPack);
      } else {
        store_pack<uint8_t, kPack, false>(out + half * kPack, pack, 0, static_cast<int>(min(left, int64_t{kPack})));
      }
    }
  }
}

}  // namespace qk::cuda

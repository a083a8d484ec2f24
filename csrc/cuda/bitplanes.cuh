#pragma once
// Device code of the bit-planes. Eight lanes take a word's 32 codes, four each, and turn them into words of eight planes by
// transposing 8 x 8 nibbles: three shuffles for 128 codes, whatever their number of bits.

#include "core/bitplanes.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

inline constexpr int kCodesALane = 4;  // of a word
inline constexpr int kLanesAWord = kWordBits / kCodesALane;
inline constexpr int kWordsALane = 4;  // that it has in flight, and writes at once
inline constexpr int kWordsAWarp = kWordsALane * 32 / kLanesAWord;

// Where codes to pack come from, as four bytes: memory, or a quantizer.
template <Kind kKind>
struct StoredCodes {
  using T = uint8_t;
  struct Params {};
  const T* x;  // [rows, columns]

  __device__ Params params(int64_t) const { return {}; }
  __device__ __forceinline__ uint32_t codes(const Pack<T, kCodesALane>& values, const Params&) const {
    uint32_t bytes;
    memcpy(&bytes, &values, sizeof bytes);
    return bytes;
  }
};

template <class Element, Kind kKind>
struct QuantizedCodes {
  using T = Element;
  using Params = Channel;
  const T* x;         // [rows, columns]
  const float* grid;  // [rows or 1, 3]
  bool per_row;
  float levels;

  __device__ Params params(int64_t row) const { return load_channel(grid, per_row ? row : 0); }
  __device__ __forceinline__ uint32_t codes(const Pack<T, kCodesALane>& values, const Params& c) const {
    uint32_t bytes = 0;
#pragma unroll
    for (int e = 0; e < kCodesALane; ++e) bytes |= integer_code_of<kKind>(to_float(values.v[e]), c, levels) << 8 * e;
    return bytes;
  }
};

struct Packing {
  int64_t rows, columns, words;
  int64_t slices;  // warps that share a row
  int bits;
  bool aligned;        // four elements may be loaded at once
  bool aligned_words;  // and four words stored
};

// Nibble p: the digits that plane p shows of four codes.
template <Kind kKind>
__device__ __forceinline__ uint32_t nibbles_of(uint32_t codes, int bits) {
  // Bytes 0, 1, 2 become 00, 01, 11: the thermometer.
  if constexpr (kKind == Kind::kTernary) codes |= codes >> 1 & 0x01010101u;
  uint32_t nibbles = 0;
#pragma unroll
  for (int plane = 0; plane < kMaxBits; ++plane) {
    if (plane >= bits) break;
    const uint32_t digits = codes >> digit_of_plane(kKind, bits, plane) & 0x01010101u;
    // The product has digit e at bit 24 + e, and no carries: its sixteen terms have a bit each.
    nibbles |= (digits * 0x01020408u >> 24 & 0xfu) << 4 * plane;
  }
  return nibbles;
}

// Lane j of eight gets nibble j of each of them, that of lane i as nibble i.
__device__ __forceinline__ uint32_t transpose_nibbles(uint32_t nibbles, int lane) {
  constexpr uint32_t kLower[] = {0x0000ffffu, 0x00ff00ffu, 0x0f0f0f0fu};
#pragma unroll
  for (int step = 0; step < 3; ++step) {
    const int distance = 4 >> step;
    const bool upper = lane & distance;
    const int rotation = upper ? 32 - 4 * distance : 4 * distance;
    const uint32_t mine = upper ? ~kLower[step] : kLower[step];
    const uint32_t other = __shfl_xor_sync(kAllLanes, nibbles, distance);
    nibbles = (nibbles & mine) | ((other << rotation | other >> (32 - rotation)) & ~mine);
  }
  return nibbles;
}

// How many of a lane's codes are in the row, if `left` elements are from its first one on.
__device__ __forceinline__ int valid_codes(int64_t left) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{kCodesALane}, left)));
}

__device__ __forceinline__ void store_words(int32_t* out,  // [words]: of a row of a plane
                                            int64_t word, const Packing& packing, const uint32_t (&words)[kWordsALane]) {
  if (packing.aligned_words && word + kWordsALane <= packing.words) {
    ptx::store_16(out + word, uint4{words[0], words[1], words[2], words[3]});
  } else {
#pragma unroll
    for (int u = 0; u < kWordsALane; ++u)
      if (word + u < packing.words) out[word + u] = static_cast<int32_t>(words[u]);
  }
}

// plane_sums null: not asked for. Slices of a row add to its sums, which are then zero before; integers, so in any order.
template <Kind kKind, class Source>
__global__ void __launch_bounds__(kThreads) pack_kernel(const Source source, const Packing packing,
                                                        int32_t* __restrict__ planes,        // [bits, rows, words]
                                                        int32_t* __restrict__ plane_sums) {  // [bits, rows]
  using T = typename Source::T;
  const int lane = threadIdx.x % 32, part = lane % kLanesAWord;  // of a word; the plane that the lane ends with
  const int64_t warp = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32;
  const int64_t row = warp / packing.slices, slice = warp % packing.slices;
  if (row >= packing.rows) return;  // the whole warp
  const typename Source::Params params = source.params(row);
  const T* const x = source.x + row * packing.columns;
  int32_t* const out = planes + (part * packing.rows + row) * packing.words;
  int32_t ones = 0;
  for (int64_t begin = slice * kWordsAWarp; begin < packing.words; begin += packing.slices * kWordsAWarp) {
    const int64_t word = begin + lane / kLanesAWord * kWordsALane;
    const T* const mine = x + word * kWordBits + part * kCodesALane;
    const int64_t left = packing.columns - (mine - x);
    Pack<T, kCodesALane> values[kWordsALane];
    if (packing.aligned && left > (kWordsALane - 1) * kWordBits) {
#pragma unroll
      for (int u = 0; u < kWordsALane; ++u)
        values[u] = load_pack<T, kCodesALane, true>(mine + u * kWordBits, 0, kCodesALane);
    } else {
#pragma unroll
      for (int u = 0; u < kWordsALane; ++u)
        values[u] = load_pack<T, kCodesALane, false>(mine + u * kWordBits, 0, valid_codes(left - u * kWordBits));
    }
    uint32_t words[kWordsALane];
#pragma unroll
    for (int u = 0; u < kWordsALane; ++u) {
      uint32_t codes = source.codes(values[u], params);
      const int valid = valid_codes(left - u * kWordBits);
      if (valid < kCodesALane) codes &= (1u << 8 * valid) - 1;
      words[u] = transpose_nibbles(nibbles_of<kKind>(codes, packing.bits), lane);
      ones += __popc(words[u]);
    }
    if (part < packing.bits) store_words(out, word, packing, words);
  }
  if (plane_sums == nullptr) return;
  for (int distance = kLanesAWord; distance < 32; distance *= 2) ones += __shfl_xor_sync(kAllLanes, ones, distance);
  if (lane >= packing.bits) return;
  int32_t* const sum = plane_sums + part * packing.rows + row;
  if (packing.slices > 1) {
    atomicAdd(sum, ones);
  } else {
    *sum = ones;
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

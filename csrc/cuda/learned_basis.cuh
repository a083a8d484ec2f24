#pragma once
// Device code of learned_basis_quantize: the search tree of core/learned_basis.h, built once a channel, lies in the caches;
// a walk down it finds the level, and what B B^T and B x need of an element follows from its code.

#include "cuda/tile/levels.cuh"
#include "cuda/tile/traverse.cuh"

namespace qk::cuda {

// Rows of a grid [channels, 1 + bits], or made of a basis [channels, bits] where there is none.
struct LevelSource {
  const float* grid;
  const float* basis;
  int bits;
  Encoding encoding;

  __device__ __forceinline__ void load(int64_t channel, float* row) const {
    if (!grid) return row_of_basis(basis + channel * bits, bits, encoding, row);
#pragma unroll
    for (int j = 0; j < 1 + kMaxBits; ++j)
      if (j < 1 + bits) row[j] = grid[channel * (1 + bits) + j];
  }
};

// A thread a code: its level, the number of levels that come before it, and the nearest of those, to whose midpoint it
// writes the threshold.
__global__ void __launch_bounds__(kThreads) level_table_kernel(const LevelSource source,
                                                               float* __restrict__ tables,  // [channels, table_size]
                                                               int64_t channels) {
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  const int bits = source.bits, count = 1 << bits, code = static_cast<int>(thread % count);
  const int64_t channel = thread / count;
  if (channel >= channels) return;
  float row[1 + kMaxBits];
  source.load(channel, row);
  const float level = level_of(row, code);
  int rank = 0, below_code = 0;
  float below = 0.0f;
  for (int other = 0; other < count; ++other) {
    const float candidate = level_of(row, other);
    if (!comes_before(candidate, other, level, code)) continue;
    if (rank == 0 || comes_before(below, below_code, candidate, other)) {
      below = candidate;
      below_code = other;
    }
    ++rank;
  }
  float* const table = tables + channel * table_size(bits);
  if (rank > 0) table[node_below(rank, count)] = midpoint(below, level);
  table[count + rank] = level;
  reinterpret_cast<int32_t*>(table)[2 * count + rank] = code;
}

// For up to kMax bits: the upper triangle of B B^T, row by row, and B x.
template <int kMax>
struct Moments : Additive<moment_sums(kMax)> {
  int bits;
  float* gram;     // [channels, bits, bits]
  float* product;  // [channels, bits]

  __device__ void finish(int64_t channel, const double* totals) const {
    float* const mine = gram + channel * bits * bits;
#pragma unroll
    for (int i = 0, s = 0; i < kMax; ++i)
#pragma unroll
      for (int j = i; j < kMax; ++j, ++s)
        if (j < bits) mine[i * bits + j] = mine[j * bits + i] = static_cast<float>(totals[s]);
#pragma unroll
    for (int i = 0; i < kMax; ++i)
      if (i < bits) product[channel * bits + i] = static_cast<float>(totals[gram_sums(kMax) + i]);
  }
};

// q alone, or the code alone.
template <class Element, class Stored = Element>
struct LearnedBasisForward {
  using T = Element;
  using Out = Stored;  // T: values; uint8_t: codes
  using Reduction = NoReduction;
  using Params = const float*;  // the channel's table
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = 4;
  static constexpr bool kWideColumns = false;

  const T* in[1];       // x [outer, channels, inner]
  Out* out;             // like x
  const float* tables;  // [channels, table_size]
  int bits;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return tables + channel * table_size(bits); }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& table, float*) const {
    const int leaf = nearest_leaf(table, bits, x[0]);
    return std::is_same_v<Out, uint8_t> ? static_cast<float>(code_at(table, bits, leaf)) : table[leaf];
  }
};

// q and the moments, for up to kMax bits.
template <class Element, int kMax>
struct LearnedBasisTrain {
  using T = Element;
  using Out = Element;
  using Reduction = Moments<kMax>;
  using Params = const float*;
  static constexpr int kInputs = 1, kUnroll = kMax <= 2 ? 4 : 2, kMinBlocks = kMax <= 4 ? 2 : 1;
  static constexpr bool kWideColumns = false;

  const T* in[1];       // x [outer, channels, inner]
  Out* out;             // like x
  const float* tables;  // [channels, table_size]
  float zero_digit;     // what a bit that is 0 stands for: -1 or 0
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return tables + channel * table_size(reduction.bits); }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& table, float* sums) const {
    const int bits = reduction.bits, leaf = nearest_leaf(table, bits, x[0]);
    const int code = code_at(table, bits, leaf);
    float digit[kMax];
#pragma unroll
    for (int i = 0; i < kMax; ++i) digit[i] = code >> i & 1 ? 1.0f : zero_digit;
#pragma unroll
    for (int i = 0, s = 0; i < kMax; ++i)
#pragma unroll
      for (int j = i; j < kMax; ++j, ++s) sums[s] += digit[i] * digit[j];
#pragma unroll
    for (int i = 0; i < kMax; ++i) sums[gram_sums(kMax) + i] += digit[i] * x[0];
    return table[leaf];
  }
};

// g where x is not above the top level.
template <class Element>
struct LearnedBasisBackward {
  using T = Element;
  using Out = Element;
  using Reduction = NoReduction;
  using Params = float;
  static constexpr int kInputs = 2, kUnroll = 4, kMinBlocks = 4;
  static constexpr bool kWideColumns = true;

  const T* in[2];       // grad, x [outer, channels, inner]
  Out* out;             // grad_x, like x
  const float* tables;  // [channels, table_size]
  int bits;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return tables[channel * table_size(bits) + (2 << bits) - 1]; }
  __device__ __forceinline__ float operator()(const float (&in)[2], const Params& top, float*) const {
    return in[1] <= top ? in[0] : 0.0f;
  }
};

}  // namespace qk::cuda

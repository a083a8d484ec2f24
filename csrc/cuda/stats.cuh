#pragma once
// Device code of the statistics: passes that only read.

#include "cuda/tile/channel.cuh"
#include "cuda/tile/traverse.cuh"

namespace qk::cuda {

struct StatsReduction {
  static constexpr int kSums = 4;
  StatsArgs args;

  static __device__ __forceinline__ float start(int s) { return s == 0 ? INFINITY : s == 1 ? -INFINITY : 0.0f; }
  // A NaN wins every comparison.
  template <class A>
  static __device__ __forceinline__ A merge(int s, A a, A b) {
    if (s == 0) return b < a || b != b ? b : a;
    if (s == 1) return b > a || b != b ? b : a;
    return a + b;
  }
  __device__ void finish(int64_t channel, const double* totals) const {
    float stats[kSums];
#pragma unroll
    for (int s = 0; s < kSums; ++s) stats[s] = static_cast<float>(totals[s]);
    finish_stats(args, channel, stats);
  }
};

template <class Element>
struct ChannelStats {
  using T = Element;
  using Out = void;
  using Reduction = StatsReduction;
  struct Params {};
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = 2;
  static constexpr bool kWideColumns = true;

  const T* in[1];  // x [outer, channels, inner]
  Reduction reduction;

  __device__ Params params(int64_t) const { return {}; }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params&, float* sums) const {
    sums[0] = ptx::min_nan(sums[0], x[0]);
    sums[1] = ptx::max_nan(sums[1], x[0]);
    sums[2] += fabsf(x[0]);
    sums[3] = fmaf(x[0], x[0], sums[3]);
    return 0.0f;
  }
};

struct MeanReduction : Additive<2> {
  float* mean;  // [channels]

  __device__ void finish(int64_t channel, const double* totals) const {
    mean[channel] = totals[1] > 0.0 ? static_cast<float>(totals[0] / totals[1]) : 0.0f;
  }
};

// Mean of |x| where |x| > threshold.
template <class Element>
struct ConditionalMean {
  using T = Element;
  using Out = void;
  using Reduction = MeanReduction;
  using Params = float;
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = 2;
  static constexpr bool kWideColumns = true;

  const T* in[1];          // x [outer, channels, inner]
  const float* threshold;  // [channels]
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return threshold[channel]; }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& bound, float* sums) const {
    if (const float magnitude = fabsf(x[0]); magnitude > bound) {
      sums[0] += magnitude;
      sums[1] += 1.0f;
    }
    return 0.0f;
  }
};

inline constexpr int kRangesAtOnce = 8;  // candidates of one pass

struct ErrorsReduction : Additive<kRangesAtOnce> {
  float* errors;  // [channels, candidates]
  int64_t candidates;
  int count;  // of this pass

  __device__ void finish(int64_t channel, const double* totals) const {
#pragma unroll
    for (int j = 0; j < kRangesAtOnce; ++j)
      if (j < count) errors[channel * candidates + j] = static_cast<float>(totals[j]);
  }
};

// Squared error of up to 8 symmetric ranges [-a, a].
template <class Element>
struct RangeErrors {
  using T = Element;
  using Out = void;
  using Reduction = ErrorsReduction;
  struct Params {
    Grid grid[kRangesAtOnce];
    float inverse[kRangesAtOnce];
  };
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = 2;
  static constexpr bool kWideColumns = false;

  const T* in[1];       // x [outer, channels, inner]
  const float* ranges;  // [channels, candidates]: a
  float levels;
  Reduction reduction;

  __device__ Params params(int64_t channel) const {
    Params p{};
#pragma unroll
    for (int j = 0; j < kRangesAtOnce; ++j) {
      if (j >= reduction.count) continue;
      const float a = ranges[channel * reduction.candidates + j];
      p.grid[j] = {-a, (a + a) / levels, 0.0f};
      p.inverse[j] = inverse_step(p.grid[j].step);
    }
    return p;
  }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& p, float* sums) const {
#pragma unroll
    for (int j = 0; j < kRangesAtOnce; ++j) {
      const float code = uniform_code(grid_position(x[0], p.grid[j].offset, p.inverse[j]), levels);
      const float error = decode(code, p.grid[j]) - x[0];
      sums[j] = fmaf(error, error, sums[j]);
    }
    return 0.0f;
  }
};

}  // namespace qk::cuda

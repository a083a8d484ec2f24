#pragma once
// Reductions in a fixed order, the same bits on every run. A Reduction says what is reduced and where it goes:
//
//   static constexpr int kSums                     accumulators a channel
//   static float start(int s)                      value of an empty accumulator
//   static A merge(int s, A a, A b)                two accumulators made one
//   void finish(int64_t channel, const double* totals) const

#include "cuda/tile/element.cuh"
#include "cuda/tile/walk.h"

namespace qk::cuda {

inline constexpr unsigned kAllLanes = 0xffffffffu;

// Every lane gets the warp's sum. All of them must call it.
__device__ __forceinline__ int64_t warp_sum(int64_t value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// For ops that only map.
struct NoReduction {
  static constexpr int kSums = 0;
  static __device__ float start(int) { return 0.0f; }
  template <class A>
  static __device__ A merge(int, A a, A) {
    return a;
  }
  __device__ void finish(int64_t, const double*) const {}
};

// For the many that add.
template <int kCount>
struct Additive {
  static constexpr int kSums = kCount;
  static __device__ __forceinline__ float start(int) { return 0.0f; }
  template <class A>
  static __device__ __forceinline__ A merge(int, A a, A b) {
    return a + b;
  }
};

template <class Reduction, class A = float>
struct Accumulators {
  A v[Reduction::kSums > 0 ? Reduction::kSums : 1];

  __device__ __forceinline__ Accumulators() {
#pragma unroll
    for (int s = 0; s < Reduction::kSums; ++s) v[s] = Reduction::start(s);
  }

  template <class B>
  __device__ __forceinline__ void merge(const B* other) {
#pragma unroll
    for (int s = 0; s < Reduction::kSums; ++s) v[s] = Reduction::merge(s, v[s], static_cast<A>(other[s]));
  }

  // The first lane of every group of `lanes` (a power of two) gets the group's. All lanes of the warp must call it.
  __device__ __forceinline__ void merge_lanes(int lanes) {
    for (int offset = lanes / 2; offset > 0; offset /= 2) {
#pragma unroll
      for (int s = 0; s < Reduction::kSums; ++s) v[s] = Reduction::merge(s, v[s], __shfl_down_sync(kAllLanes, v[s], offset));
    }
  }

  // Thread 0 gets the block's, from the first lanes of its warps. All threads must call it, once a kernel.
  __device__ __forceinline__ void merge_warps() {
    __shared__ A warps[kWarps][Reduction::kSums];
    if (threadIdx.x % 32 == 0) {
#pragma unroll
      for (int s = 0; s < Reduction::kSums; ++s) warps[threadIdx.x / 32][s] = v[s];
    }
    __syncthreads();
    if (threadIdx.x == 0)
      for (int w = 1; w < kWarps; ++w) merge(warps[w]);
  }
};

// To the place that `finish` names if these are a channel's last accumulators, else to row `index` of its partial ones.
template <class Reduction, class A>
__device__ __forceinline__ void put(const Reduction& reduction, const Accumulators<Reduction, A>& sums, int64_t channel,
                                    int64_t index, int64_t count,
                                    float* __restrict__ partial) {  // [channels, count, kSums]
  if (count > 1) {
    float* const mine = partial + (channel * count + index) * Reduction::kSums;
#pragma unroll
    for (int s = 0; s < Reduction::kSums; ++s) mine[s] = static_cast<float>(sums.v[s]);
  } else {
    double totals[Reduction::kSums];
#pragma unroll
    for (int s = 0; s < Reduction::kSums; ++s) totals[s] = sums.v[s];
    reduction.finish(channel, totals);
  }
}

// Second stage: `warps` warps a channel (1 or all of the block) merge its partial accumulators, in double.
template <class Reduction>
__global__ void __launch_bounds__(kThreads) combine_kernel(const Reduction reduction,
                                                           const float* __restrict__ partial,  // [channels, count, kSums]
                                                           int64_t channels, int64_t count, int warps) {
  const int64_t channel = (static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32) / warps;
  Accumulators<Reduction, double> sums;
  if (channel < channels)
    for (int64_t i = threadIdx.x % (32 * warps); i < count; i += 32 * warps)
      sums.merge(partial + (channel * count + i) * Reduction::kSums);
  sums.merge_lanes(32);
  if (warps > 1) sums.merge_warps();
  if (threadIdx.x % (32 * warps) == 0 && channel < channels) put(reduction, sums, channel, 0, 1, nullptr);
}

}  // namespace qk::cuda

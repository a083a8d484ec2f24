#pragma once
// Sums over a block in a fixed order: the same bits on every run.

namespace qk::cuda {

// The sum of `value` over all kThreads threads, valid in thread 0. Every thread of the block must call it.
template <int kThreads>
__device__ __forceinline__ float block_sum(float value) {
  static_assert(kThreads % 32 == 0 && kThreads <= 1024);
  __shared__ float warps[32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_down_sync(0xffffffffu, value, offset);
  if (threadIdx.x % 32 == 0) warps[threadIdx.x / 32] = value;
  __syncthreads();
  float total = 0.0f;
  if (threadIdx.x == 0)
    for (int w = 0; w < kThreads / 32; ++w) total += warps[w];
  __syncthreads();  // warps[] may be written again by the next sum
  return total;
}

}  // namespace qk::cuda

#pragma once
// What the tensor cores do at most through mma.sync: a loop of nothing else, on operands that stay in registers. Benchmarks
// judge the low-bit products by it (csrc/cpu/peaks.h is the processor's); no op uses it.

#include "cuda/ptx/mma.cuh"

namespace qk::cuda {

// Each fragment of rows meets each of columns: as many sums that do not wait for each other, in each of four warps or more a
// scheduler, as hide an mma's latency.
inline constexpr int kPeakRows = 2, kPeakColumns = 4;
inline constexpr int kPeakThreads = 256;
inline constexpr int kPeakUnrolled = 4;  // rounds, so that counting them costs little

template <bool kBits>
__global__ void __launch_bounds__(kPeakThreads, 2)
    mma_peak_kernel(const uint32_t* __restrict__ operands,  // [4 * kPeakRows + 2 * kPeakColumns, 32 lanes]
                    int64_t rounds,
                    int32_t* __restrict__ sums) {  // [blocks, kPeakThreads]: a lane's own, all rounds together
  const int lane = static_cast<int>(threadIdx.x) % 32;
  uint32_t a[kPeakRows][4], b[kPeakColumns][2];
#pragma unroll
  for (int i = 0; i < kPeakRows; ++i)
#pragma unroll
    for (int part = 0; part < 4; ++part) a[i][part] = operands[(4 * i + part) * 32 + lane];
#pragma unroll
  for (int j = 0; j < kPeakColumns; ++j)
#pragma unroll
    for (int part = 0; part < 2; ++part) b[j][part] = operands[(4 * kPeakRows + 2 * j + part) * 32 + lane];
  int32_t d[kPeakRows][kPeakColumns][4] = {};
#pragma unroll kPeakUnrolled
  for (int64_t round = 0; round < rounds; ++round)
#pragma unroll
    for (int i = 0; i < kPeakRows; ++i)
#pragma unroll
      for (int j = 0; j < kPeakColumns; ++j) {
        if constexpr (kBits) {
          ptx::mma_b1(d[i][j], a[i], b[j]);
        } else {
          ptx::mma_u8(d[i][j], a[i], b[j]);
        }
      }
  uint32_t sum = 0;  // wraps, as the products' sums do
#pragma unroll
  for (int i = 0; i < kPeakRows; ++i)
#pragma unroll
    for (int j = 0; j < kPeakColumns; ++j)
#pragma unroll
      for (int e = 0; e < 4; ++e) sum += static_cast<uint32_t>(d[i][j][e]);
  sums[static_cast<int64_t>(blockIdx.x) * kPeakThreads + threadIdx.x] = static_cast<int32_t>(sum);
}

}  // namespace qk::cuda

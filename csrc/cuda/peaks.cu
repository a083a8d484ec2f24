// The peaks of csrc/cuda/peaks.cuh by a C function: benchmarks/peaks.py finds it in the library by its name.

#include "cuda/peaks.cuh"

#include "cuda/kernels.h"
#include "cuda/tile/launch.cuh"

// bits: multiply bits rather than bytes. The operations (two a multiply-add) that were put on the stream, or 0 if the launch
// failed.
extern "C" __attribute__((visibility("default"))) double qk_mma_peak(bool bits, const void* operands, int64_t rounds,
                                                                     int64_t blocks, void* sums, void* stream) {
  using namespace qk::cuda;
  const Context context{stream, 1, 0, {}};
  launch(context, qk::cuda::blocks(blocks), kPeakThreads, bits ? mma_peak_kernel<true> : mma_peak_kernel<false>,
         static_cast<const uint32_t*>(operands), rounds, static_cast<int32_t*>(sums));
  if (last_error()) return 0;
  const double multiply_adds = 16.0 * 8 * (bits ? 256 : 32) * kPeakRows * kPeakColumns;
  return 2 * multiply_adds * static_cast<double>(rounds) * static_cast<double>(blocks) * (kPeakThreads / 32);
}

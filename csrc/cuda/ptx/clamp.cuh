#pragma once
// max.NaN and min.NaN (sm_80 and newer): one instruction each, and a NaN stays one. fmaxf and fminf would drop it, and a
// comparison with a selection takes two.

#include <cuda_runtime.h>

namespace qk::cuda::ptx {

#if defined(QK_EMULATOR)

// -0 is less than +0, and every NaN becomes the one that the device gives.
inline float max_nan(float a, float b) {
  if (a != a || b != b) return std::bit_cast<float>(0x7fffffffu);
  return a > b || (a == b && !std::signbit(a)) ? a : b;
}
inline float min_nan(float a, float b) {
  if (a != a || b != b) return std::bit_cast<float>(0x7fffffffu);
  return a < b || (a == b && std::signbit(a)) ? a : b;
}

#else

__device__ __forceinline__ float max_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

__device__ __forceinline__ float min_nan(float a, float b) {
  float result;
  asm("min.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

#endif

}  // namespace qk::cuda::ptx

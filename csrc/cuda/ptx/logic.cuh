#pragma once
// lop3: any function of three words in one instruction. The compiler finds it by itself, but not where a constant mask and
// its complement would count as two inputs.

#include <cuda_runtime.h>

#include <cstdint>

namespace qk::cuda::ptx {

// The bits of `mask` from a, the others from b.
#if defined(QK_EMULATOR)

inline uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) { return (a & mask) | (b & ~mask); }

#else

__device__ __forceinline__ uint32_t select_bits(uint32_t mask, uint32_t a, uint32_t b) {
  uint32_t result;
  asm("lop3.b32 %0, %1, %2, %3, 0xe4;" : "=r"(result) : "r"(a), "r"(b), "r"(mask));
  return result;
}

#endif

}  // namespace qk::cuda::ptx

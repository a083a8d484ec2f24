#pragma once
// st.global.v4: 16 bytes in one instruction. The compiler takes the assignment of a struct apart into a store for each
// element; __stwb keeps it whole, but as a strong store that no load may be moved across.

#include <cuda_runtime.h>

namespace qk::cuda::ptx {

#if defined(QK_EMULATOR)

inline void store_16(void* global, const uint4& v) { *static_cast<uint4*>(global) = v; }

#else

// Aligned to 16. No "memory" clobber: what is written here is not read again by the kernel.
__device__ __forceinline__ void store_16(void* global, const uint4& v) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(global)), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w));
}

#endif

}  // namespace qk::cuda::ptx

#pragma once
// The dynamic shared memory of a launch.

#include <cuda_runtime.h>

namespace qk::cuda {

// Aligned to 128 bytes: what the bulk copies of newer targets ask for.
template <class T>
__device__ __forceinline__ T* dynamic_shared() {
#if defined(QK_EMULATOR)
  return static_cast<T*>(emu::dynamic_shared());
#else
  extern __shared__ __align__(128) unsigned char bytes[];
  return reinterpret_cast<T*>(bytes);
#endif
}

}  // namespace qk::cuda

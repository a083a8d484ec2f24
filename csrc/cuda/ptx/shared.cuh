#pragma once
// Loads and stores of shared memory, each one instruction of up to 16 bytes. The emulator counts their bank conflicts.

#include <cuda_runtime.h>

namespace qk::cuda::ptx {

#if defined(QK_EMULATOR)

template <class T>
T load_shared(const void* shared, emu::Where where = emu::Where::current()) {
  emu::shared_access(shared, sizeof(T), where);
  return *static_cast<const T*>(shared);
}
template <class T>
void store_shared(void* shared, const T& value, emu::Where where = emu::Where::current()) {
  emu::shared_access(shared, sizeof(T), where);
  *static_cast<T*>(shared) = value;
}

#else

template <class T>
__device__ __forceinline__ T load_shared(const void* shared) {
  return *static_cast<const T*>(shared);
}
template <class T>
__device__ __forceinline__ void store_shared(void* shared, const T& value) {
  *static_cast<T*>(shared) = value;
}

#endif

}  // namespace qk::cuda::ptx

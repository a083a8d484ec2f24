#pragma once
// cp.async (sm_80 and newer): global to shared memory without registers in between. A thread's copies since its last commit
// form a group; data may be read after a wait, and by other threads after a barrier behind it.

#include <cuda_runtime.h>

namespace qk::cuda::ptx {

#if defined(QK_EMULATOR)

inline void cp_async_16(void* shared, const void* global) { emu::copy_async(shared, global, 16); }
template <int kBytes>
inline void cp_async_or_zero(void* shared, const void* global, bool inside, emu::Where where = emu::Where::current()) {
  alignas(16) static const char zeros[kBytes] = {};
  emu::shared_access(shared, kBytes, where);
  emu::copy_async(shared, inside ? global : zeros, kBytes);
}
inline void cp_async_commit() { emu::commit_copies(); }
template <int kGroupsInFlight>
inline void cp_async_wait() {
  emu::wait_copies(kGroupsInFlight);
}

#else

// 16 bytes, both addresses aligned to 16. .cg keeps them out of L1: shared memory is where they are wanted.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(shared))),
               "l"(global)
               : "memory");
}

// 16 or 4 bytes, aligned to their size; zeros if not inside, and then nothing is read. Smaller ones may only go through L1.
template <int kBytes>
__device__ __forceinline__ void cp_async_or_zero(void* shared, const void* global, bool inside) {
  static_assert(kBytes == 16 || kBytes == 4);
  const auto to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
  const int bytes = inside ? kBytes : 0;
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(to), "l"(global), "r"(bytes) : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most kGroupsInFlight of the thread's groups are under way.
template <int kGroupsInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

#endif

}  // namespace qk::cuda::ptx

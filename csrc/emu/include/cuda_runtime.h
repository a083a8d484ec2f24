#pragma once
// Stands in for CUDA's header of this name when csrc/cuda is compiled for the emulator: the language and the part of the
// run-time library that the kernels and their launches use. Float atomics are missing on purpose: their order is not fixed.

#include <bit>
#include <cmath>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "emu/emulator.h"

#define QK_EMULATOR 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
// One segment of the module holds all thread-local variables: that is how the emulator finds what to poison.
#define __shared__ static thread_local

// ---- launches and errors ----

using cudaStream_t = void*;
using cudaError_t = int;
inline constexpr cudaError_t cudaSuccess = 0;
inline constexpr cudaError_t cudaErrorLaunchFailure = 719;
enum cudaDeviceAttr {
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };

struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
};

template <class... Expected, class... Actual>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...), Actual&&... actual) {
  struct Call {
    void (*kernel)(Expected...);
    std::tuple<Expected...> arguments;
  } call{kernel, {static_cast<Expected>(actual)...}};
  const auto body = [](void* context) {
    const auto& [run, arguments] = *static_cast<Call*>(context);
    std::apply(run, arguments);
  };
  const bool ok = qk::emu::run(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                               reinterpret_cast<const void*>(kernel), body, &call);
  return ok ? cudaSuccess : cudaErrorLaunchFailure;
}

inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
// A small device, of a size that depends on the seed: results must not depend on it, beyond the order of sums.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = 2 + static_cast<int>(qk::emu::seed() % 5);
      break;
    case cudaDevAttrComputeCapabilityMajor:
      *value = qk::emu::architecture() / 10;
      break;
    case cudaDevAttrComputeCapabilityMinor:
      *value = qk::emu::architecture() % 10;
      break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = 99 << 10;  // the least that any target has
      break;
  }
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel*, cudaFuncAttribute, int) {
  return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return qk::emu::has_error() ? cudaErrorLaunchFailure : cudaSuccess; }
inline const char* cudaGetErrorString(cudaError_t) {
  static std::string text;
  text = qk::emu::take_error();
  return text.c_str();
}
inline cudaError_t cudaMemsetAsync(void* pointer, int value, size_t bytes, cudaStream_t) {
  return std::memset(pointer, value, bytes), cudaSuccess;
}
enum cudaMemcpyKind { cudaMemcpyDeviceToDevice };
inline cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind, cudaStream_t) {
  return std::memcpy(to, from, bytes), cudaSuccess;
}

// ---- synchronisation ----

inline void __syncthreads(qk::emu::Where where = qk::emu::Where::current()) { qk::emu::sync_threads(where); }
inline unsigned __activemask() { return qk::emu::active_mask(); }

namespace qk::emu {

template <class T>
uint64_t to_bits(T value) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof value);
  return bits;
}
template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

// A lane outside its segment of `width` lanes gets its own value; one outside the mask is an error.
inline bool read_lane(const Exchange& all, int lane, int source, bool inside, uint64_t* result) {
  if (!inside) source = lane;
  *result = all.value[source];
  return all.mask >> source & 1;
}
inline bool shuffle_down(const Exchange& all, int lane, uint64_t* result) {
  const int source = lane + all.argument[lane];
  return read_lane(all, lane, source, source / all.width[lane] == lane / all.width[lane], result);
}
inline bool shuffle_up(const Exchange& all, int lane, uint64_t* result) {
  const int source = lane - all.argument[lane];
  return read_lane(all, lane, source, source >= lane / all.width[lane] * all.width[lane], result);
}
inline bool shuffle_xor(const Exchange& all, int lane, uint64_t* result) {
  const int source = lane ^ all.argument[lane];
  return read_lane(all, lane, source, source / all.width[lane] <= lane / all.width[lane], result);
}
inline bool shuffle_index(const Exchange& all, int lane, uint64_t* result) {
  const int width = all.width[lane];
  return read_lane(all, lane, lane / width * width + all.argument[lane] % width, true, result);
}
inline bool ballot(const Exchange& all, int, uint64_t* result) {
  *result = 0;
  for (int l = 0; l < kWarp; ++l)
    if ((all.mask >> l & 1) && all.value[l] != 0) *result |= uint64_t{1} << l;
  return true;
}
inline bool add(const Exchange& all, int, uint64_t* result) {
  *result = 0;
  for (int l = 0; l < kWarp; ++l)
    if (all.mask >> l & 1) *result += all.value[l];
  return true;
}
inline bool nothing(const Exchange&, int, uint64_t*) { return true; }

template <class T>
T shuffle(unsigned mask, T value, int argument, int width, Resolve resolve, const Where& where) {
  return from_bits<T>(exchange(mask, to_bits(value), argument, width, resolve, where));
}

}  // namespace qk::emu

template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32,
                   qk::emu::Where where = qk::emu::Where::current()) {
  return qk::emu::shuffle(mask, value, static_cast<int>(delta), width, qk::emu::shuffle_down, where);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, qk::emu::Where where = qk::emu::Where::current()) {
  return qk::emu::shuffle(mask, value, static_cast<int>(delta), width, qk::emu::shuffle_up, where);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, qk::emu::Where where = qk::emu::Where::current()) {
  return qk::emu::shuffle(mask, value, lanes, width, qk::emu::shuffle_xor, where);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, qk::emu::Where where = qk::emu::Where::current()) {
  return qk::emu::shuffle(mask, value, lane, width, qk::emu::shuffle_index, where);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, qk::emu::Where where = qk::emu::Where::current()) {
  return static_cast<unsigned>(qk::emu::exchange(mask, predicate != 0, 0, 32, qk::emu::ballot, where));
}
inline int __any_sync(unsigned mask, int predicate, qk::emu::Where where = qk::emu::Where::current()) {
  return __ballot_sync(mask, predicate, where) != 0;
}
inline int __all_sync(unsigned mask, int predicate, qk::emu::Where where = qk::emu::Where::current()) {
  return __ballot_sync(mask, predicate, where) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, qk::emu::Where where = qk::emu::Where::current()) {
  return static_cast<unsigned>(qk::emu::exchange(mask, value, 0, 32, qk::emu::add, where));
}
inline void __syncwarp(unsigned mask = 0xffffffffu, qk::emu::Where where = qk::emu::Where::current()) {
  qk::emu::exchange(mask, 0, 0, 32, qk::emu::nothing, where);
}

// ---- atomics: fibers do not run at the same time, so these are plain ----

template <std::integral T>
T atomicAdd(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address + value));
}
template <std::integral T>
T atomicOr(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, static_cast<T>(*address | value));
}
template <std::integral T>
T atomicMax(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, *address < value ? value : *address);
}
template <std::integral T>
T atomicMin(T* address, std::type_identity_t<T> value) {
  return std::exchange(*address, value < *address ? value : *address);
}
template <std::integral T>
T atomicCAS(T* address, std::type_identity_t<T> expected, std::type_identity_t<T> value) {
  const T old = *address;
  if (old == expected) *address = value;
  return old;
}

template <class T>
T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
T max(T a, T b) {
  return a < b ? b : a;
}
inline int __popc(unsigned v) { return std::popcount(v); }
// c + the four products of the bytes of a and b.
inline unsigned __dp4a(unsigned a, unsigned b, unsigned c) {
  for (int shift = 0; shift < 32; shift += 8) c += (a >> shift & 0xffu) * (b >> shift & 0xffu);
  return c;
}
// Four bytes of the eight of (y, x), each named by three bits of a hexadecimal digit of the selector.
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const uint64_t both = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned byte = selector >> 4 * i & 7u;
    result |= (static_cast<unsigned>(both >> 8 * byte) & 0xffu) << 8 * i;
  }
  return result;
}

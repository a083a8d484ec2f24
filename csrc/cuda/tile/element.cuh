#pragma once
// Elements in memory and in registers: 16-byte accesses, arithmetic in float32, one rounding at the store.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>

#include "core/args.h"
#include "cuda/ptx/store.cuh"

namespace qk::cuda {

__device__ __forceinline__ float to_float(float v) { return v; }
__device__ __forceinline__ float to_float(__half v) { return __half2float(v); }
__device__ __forceinline__ float to_float(__nv_bfloat16 v) { return __bfloat162float(v); }

template <class T>
__device__ __forceinline__ T from_float(float v);
template <>
__device__ __forceinline__ float from_float<float>(float v) {
  return v;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float v) {
  return __float2bfloat16_rn(v);
}
// A code. That of a NaN is 0.
template <>
__device__ __forceinline__ uint8_t from_float<uint8_t>(float v) {
  return v == v ? static_cast<uint8_t>(v) : 0;
}

// Neighbouring elements that one access moves.
template <class T, int kSize>
struct alignas(sizeof(T) * kSize) Pack {
  T v[kSize];
};

// As many elements as 16 bytes hold.
template <class T>
inline constexpr int kPackSize = 16 / static_cast<int>(sizeof(T));

// The elements [lo, hi) of the pack at p; the others are 0. One access if kWhole says that all are asked for and p is
// aligned.
template <class T, int kSize, bool kWhole>
__device__ __forceinline__ Pack<T, kSize> load_pack(const T* p, int lo, int hi) {
  if constexpr (kWhole) {
    return *reinterpret_cast<const Pack<T, kSize>*>(p);
  } else {
    Pack<T, kSize> pack{};
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i >= lo && i < hi) pack.v[i] = p[i];
    return pack;
  }
}

template <class T, int kSize, bool kWhole>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, kSize>& pack, int lo, int hi) {
  if constexpr (kWhole && sizeof(pack) == sizeof(uint4)) {
    uint4 bits;
    memcpy(&bits, &pack, sizeof bits);
    ptx::store_16(p, bits);
  } else if constexpr (kWhole) {
    *reinterpret_cast<Pack<T, kSize>*>(p) = pack;
  } else {
#pragma unroll
    for (int i = 0; i < kSize; ++i)
      if (i >= lo && i < hi) p[i] = pack.v[i];
  }
}

// Calls f(T*) with the element type that dtype names.
template <class F>
void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<__half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<__nv_bfloat16*>(nullptr));
    case DType::kUInt8:
      return;  // the checks of csrc/ops let no integer tensor come here
  }
}

}  // namespace qk::cuda

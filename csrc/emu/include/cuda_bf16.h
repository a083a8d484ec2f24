#pragma once
// Stands in for CUDA's header of this name in the emulator: storage and conversions, rounded and with NaNs as the device
// does.

#include <bit>
#include <cstdint>

struct __nv_bfloat16 {
  uint16_t bits;
};

inline float __bfloat162float(__nv_bfloat16 b) { return std::bit_cast<float>(static_cast<uint32_t>(b.bits) << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float v) {
  const uint32_t bits = std::bit_cast<uint32_t>(v);
  return {static_cast<uint16_t>(v != v ? 0x7fffu : (bits + 0x7fffu + (bits >> 16 & 1u)) >> 16)};
}

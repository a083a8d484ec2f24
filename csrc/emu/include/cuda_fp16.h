#pragma once
// Stands in for CUDA's header of this name in the emulator: storage and conversions, rounded and with NaNs as the device
// does.

#include <bit>
#include <cmath>
#include <cstdint>

struct __half {
  uint16_t bits;
};

inline float __half2float(__half h) {
  const uint32_t sign = static_cast<uint32_t>(h.bits & 0x8000u) << 16, magnitude = h.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return std::bit_cast<float>(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Subnormal halves are exact multiples of 2^-24.
  if (magnitude < 0x400u) return std::copysign(static_cast<float>(magnitude) * 0x1p-24f, std::bit_cast<float>(sign));
  return std::bit_cast<float>(sign | ((magnitude << 13) + (112u << 23)));
}

inline __half __float2half_rn(float v) {
  const uint32_t sign = std::bit_cast<uint32_t>(v) >> 16 & 0x8000u;
  const float magnitude = std::fabs(v);
  uint32_t half;
  if (v != v) return {0x7fff};
  if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<uint32_t>(std::nearbyint(magnitude * 0x1p24f));
  } else {
    const uint32_t bits = std::bit_cast<uint32_t>(magnitude);
    half = (bits - (112u << 23) + 0xfffu + (bits >> 13 & 1u)) >> 13;
  }
  return {static_cast<uint16_t>(sign | half)};
}

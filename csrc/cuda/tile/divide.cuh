#pragma once
// Division by a number that the host knows: one multiplication and a shift.

#include <bit>
#include <cstdint>

#include "core/macros.h"

namespace qk::cuda {

// Exact for dividends below 2^31: the multiplier is 2^(31 + shift) / divisor rounded up, by less than divisor <= 2^shift.
struct Divider {
  uint32_t divisor = 1, multiplier = 1u << 31, shift = 0;

  Divider() = default;
  explicit Divider(uint32_t d) : divisor(d), shift(static_cast<uint32_t>(std::bit_width(d - 1))) {
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + shift)) + d - 1) / d);
  }

  QK_HOST_DEVICE uint32_t operator()(uint32_t n) const {
    return static_cast<uint32_t>((uint64_t{n} * multiplier) >> (31 + shift));
  }
};

}  // namespace qk::cuda

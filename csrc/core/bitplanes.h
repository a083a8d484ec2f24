#pragma once
// Where a code's bits lie: planes[bit][row][word], most significant plane first, element i of a row in bit i % 32 of word
// i / 32, the last word of a row padded with zero bits.

#include "core/quantizer.h"

namespace qk {

inline constexpr int kWordBits = 32;

QK_HOST_DEVICE int64_t words_of(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

// The binary digit of a code that plane p shows. Ternary codes 0, 1, 2 are first made 00, 01, 11: plane 0 is code >= 1,
// plane 1 is code >= 2.
QK_HOST_DEVICE int digit_of_plane(Kind kind, int bits, int plane) {
  return kind == Kind::kTernary ? plane : bits - 1 - plane;
}

}  // namespace qk

#pragma once
// Where a code's bits lie: planes[bit][row][word], most significant plane first, element i of a row in bit i % 32 of word
// i / 32, the last word of a row padded with zero bits.

#include "core/quantizer.h"

namespace qk {

inline constexpr int kWordBits = 32;

QK_HOST_DEVICE int64_t words_of(int64_t columns) { return (columns + kWordBits - 1) / kWordBits; }

// The bits of a word that lie in [first, last) of its row.
QK_HOST_DEVICE uint32_t bits_within(int64_t word, int64_t first, int64_t last) {
  uint32_t bits = ~0u;
  if (word * kWordBits < first) bits &= ~0u << (first - word * kWordBits);
  if ((word + 1) * kWordBits > last) bits &= ~0u >> ((word + 1) * kWordBits - last);
  return bits;
}

// The binary digit of a code that plane p shows. Ternary codes 0, 1, 2 are first made 00, 01, 11: plane 0 is code >= 1,
// plane 1 is code >= 2.
QK_HOST_DEVICE int digit_of_plane(Kind kind, int bits, int plane) {
  return kind == Kind::kTernary ? plane : bits - 1 - plane;
}

QK_HOST_DEVICE int digit_of_code(Kind kind, int code, int digit) {
  return kind == Kind::kTernary ? (code > digit ? 1 : 0) : code >> digit & 1;
}

// And the plane that shows a digit.
QK_HOST_DEVICE int plane_of_digit(Kind kind, int bits, int digit) { return digit_of_plane(kind, bits, digit); }

// What a digit that is set adds to the value, for a row of the grid: q = offset + sum_d step_of_digit(d) * digit_d.
QK_HOST_DEVICE float step_of_digit(Kind kind, const float* row, int digit) {
  if (kind == Kind::kLearned) return row[1 + digit];
  return kind == Kind::kTernary ? row[1] : row[1] * static_cast<float>(1 << digit);
}

}  // namespace qk

#pragma once
// THE definition of the quantizers: from a value to its code, and from a code to its value. Every backend calls these
// functions or repeats them lane by lane, so element-wise results are bit-equal everywhere (compile without FMA
// contraction).

#include <cmath>
#include <cstdint>

#include "core/macros.h"

namespace qk {

// The kind says how a value becomes a code. The numbers are part of the op schemas.
enum class Kind : int64_t { kUniform = 0, kBinary = 1, kTernary = 2, kIdentity = 3, kLearned = 4 };

// What the straight-through estimator lets pass, and which gradients the grid gets.
enum class Ste : int64_t {
  kIdentity = 0,  // grad_x = g everywhere, none for the grid: its statistics are constants
  kClip = 1,      // grad_x = g inside the range; the ends of the range learn (PACT)
  kFull = 2,      // and the step learns from the rounding error inside, too (PACT+, LSQ)
};

inline constexpr int kGridColumns = 3;  // offset, step, threshold: one row a channel (of a learned basis: grid_columns)
inline constexpr int kMaxQuantizers = 8;
inline constexpr int kMaxBits = 8;
inline constexpr int kMaxLevels = 255;

struct Grid {
  float offset;
  float step;
  float threshold;
};

// Adding and subtracting 1.5 * 2^23 rounds |v| < 2^22 to the nearest integer, ties to even, in the default rounding mode.
inline constexpr float kRoundingMagic = 12582912.0f;

QK_HOST_DEVICE float round_to_even(float v) { return (v + kRoundingMagic) - kRoundingMagic; }

// A step of zero (a constant tensor) and a step whose reciprocal overflows give 0: the code is then 0 and q = offset.
QK_HOST_DEVICE float inverse_step(float step) {
  const float inverse = 1.0f / step;
  return step > 0.0f && inverse <= 3.402823466e38f ? inverse : 0.0f;
}

// Levels from the smallest to the largest value (DQA, equations 9 to 11). It has no threshold.
QK_HOST_DEVICE Grid minmax_grid(float low, float high, int64_t levels) {
  return {low, (high - low) / static_cast<float>(levels), 0.0f};
}

// NaN passes both comparisons unchanged, so a NaN in x stays visible in q.
QK_HOST_DEVICE float clamp_code(float v, float levels) {
  v = v < 0.0f ? 0.0f : v;
  return v > levels ? levels : v;
}

// Position of x on the grid, before clamping and rounding.
QK_HOST_DEVICE float grid_position(float x, float offset, float inverse) { return (x - offset) * inverse; }

QK_HOST_DEVICE float uniform_code(float position, float levels) { return round_to_even(clamp_code(position, levels)); }
QK_HOST_DEVICE float binary_code(float x) { return x >= 0.0f ? 1.0f : 0.0f; }
QK_HOST_DEVICE float ternary_code(float x, float threshold) {
  return (x > -threshold ? 1.0f : 0.0f) + (x > threshold ? 1.0f : 0.0f);
}

// The code of x as a float. Identity has none.
QK_HOST_DEVICE float encode(Kind kind, float x, const Grid& grid, float inverse, float levels) {
  if (kind == Kind::kUniform) return uniform_code(grid_position(x, grid.offset, inverse), levels);
  return kind == Kind::kBinary ? binary_code(x) : ternary_code(x, grid.threshold);
}

// The value of a code: two roundings, never fused.
QK_HOST_DEVICE float decode(float code, const Grid& grid) { return grid.offset + grid.step * code; }

// Bits that a code takes when packed. Ternary codes are two thermometer bits: code >= 1 and code >= 2.
QK_HOST_DEVICE int bits_of(Kind kind, int64_t levels) {
  if (kind == Kind::kTernary) return 2;
  int bits = 0;
  for (int64_t rest = levels; rest > 0; rest >>= 1) ++bits;
  return bits;
}

// A row of a learned quantizer's grid is its offset and the step of each bit.
QK_HOST_DEVICE int grid_columns(Kind kind, int bits) { return kind == Kind::kLearned ? 1 + bits : kGridColumns; }

// Weight of plane p (0 is the most significant) in the integer code.
QK_HOST_DEVICE int plane_weight(Kind kind, int bits, int plane) {
  return kind == Kind::kTernary ? 1 : 1 << (bits - 1 - plane);
}

}  // namespace qk

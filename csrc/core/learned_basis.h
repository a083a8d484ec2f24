#pragma once
// A learned basis (LQ-Nets): 2^n levels q = offset + sum_j step_j * bit_j(code), the code of x that of the nearest level.
//
// Levels are sorted once a channel; x is then compared with the midpoints of neighbours, and a tie goes down. The sorted
// levels are the leaves of a search tree, whose node k has the children 2k and 2k + 1: nodes 1 to 2^n - 1 are thresholds,
// nodes 2^n to 2^(n+1) - 1 the levels in ascending order. n steps down the tree find the level.

#include <cstdint>

#include "core/args.h"

namespace qk {

// The digits e of a code: q = sum_j v_j e_j for the basis v. The numbers are part of the op schemas.
enum class Encoding : int64_t { kSigned = 0, kUnsigned = 1 };  // e in {-1, +1}^n; e in {0, 1}^n

inline constexpr int kMaxLearnedLevels = 1 << kMaxBits;

struct LearnedBasisArgs {
  Layout layout;
  DType dtype;
  Encoding encoding;
  int bits;
  const float* basis;  // [channels, bits]
  const void* x;       // [outer, channels, inner]
  const void* grad;    // like x; backward only
  void* out;           // like x: q, or grad_x in the backward pass
  float* gram;         // [channels, bits, bits]: B B^T, B the digits e of all codes of the channel; null: not wanted
  float* product;      // [channels, bits]: B x; null where gram is
};

struct LearnedEncodeArgs {
  Layout layout;
  DType dtype;
  int bits;
  const float* grid;  // [channels, 1 + bits]: offset, step of each bit
  const void* x;      // [outer, channels, inner]
  uint8_t* codes;     // like x
};

// A row of a learned quantizer's grid: offset, step_0, ..., step_(n-1). step_j belongs to bit j of the code. (Loops of
// constant length: on a device the row then stays in registers.)
QK_HOST_DEVICE void row_of_basis(const float* basis, int bits, Encoding encoding, float* row) {
  float sum = 0.0f;
  for (int j = 0; j < kMaxBits; ++j) {
    if (j >= bits) continue;
    sum = sum + basis[j];
    row[1 + j] = encoding == Encoding::kSigned ? basis[j] + basis[j] : basis[j];
  }
  row[0] = encoding == Encoding::kSigned ? -sum : 0.0f;
}

// In this order, each sum rounded.
QK_HOST_DEVICE float level_of(const float* row, int code) {
  float level = row[0];
  for (int j = 0; j < kMaxBits; ++j)
    if (code >> j & 1) level = level + row[1 + j];
  return level;
}

// The order of levels: equal ones by their codes, NaN last. Total, whatever the basis.
QK_HOST_DEVICE bool comes_before(float a, int a_code, float b, int b_code) {
  if (a < b || b < a) return a < b;
  if ((a != a) != (b != b)) return b != b;
  return a_code < b_code;
}

// Thresholds between neighbouring levels.
QK_HOST_DEVICE float midpoint(float below, float above) { return (below + above) * 0.5f; }

// The inner node whose threshold lies just below the level of this rank, 1 to levels - 1.
QK_HOST_DEVICE int node_below(int rank, int levels) { return (levels + rank) / (2 * (rank & -rank)); }

// The digit e_j of a code as a number.
QK_HOST_DEVICE float digit_of(int code, int j, Encoding encoding) {
  return code >> j & 1 ? 1.0f : encoding == Encoding::kSigned ? -1.0f : 0.0f;
}

// Accumulators a channel: the upper triangle of B B^T, row by row, and B x.
QK_HOST_DEVICE constexpr int gram_sums(int bits) { return bits * (bits + 1) / 2; }
QK_HOST_DEVICE constexpr int moment_sums(int bits) { return gram_sums(bits) + bits; }

}  // namespace qk

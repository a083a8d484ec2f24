#pragma once
// A quantizer's grid as vectors, and the code of a vector: the lanes of csrc/core/quantizer.h.

#include "cpu/traverse.h"

namespace qk::cpu::QK_CPU_ISA {

// The same in every lane, or one channel a lane.
struct GridVec {
  Vec offset, step, inverse, threshold;
};

inline ChannelTable grid_table(const Layout& layout, const Walk& walk, const float* grid) {
  return ChannelTable(layout, walk, 4, [&](const auto& field) {
    float *const offset = field(0), *const step = field(1), *const inverse = field(2), *const threshold = field(3);
    for (int64_t c = 0; c < layout.channels; ++c) {
      const float* row = grid + c * kGridColumns;
      offset[c] = row[0];
      step[c] = row[1];
      inverse[c] = inverse_step(row[1]);
      threshold[c] = row[2];
    }
  });
}

// Whether no result is subnormal that is made of `scale` times these offsets and steps, multiplied by codes and added up in
// whatever order. If each of the former is 0 or at least 2^-100, it is a multiple of 2^-123; so is every sum of multiples of
// them, and what float32 rounds it to; and a multiple of 2^-123 is 0 or a normal number. NaN is no subnormal either.
inline bool no_subnormals(const float* terms, int64_t count, float scale = 1.0f) {
  int small = 0;
  for (int64_t i = 0; i < count; ++i) {
    const float term = std::abs(scale * terms[i]);
    small |= (term != 0.0f) & (term < 0x1p-100f);
  }
  return !small;
}

template <class Field>
inline GridVec grid_params(Field field) {
  return {field(0), field(1), field(2), field(3)};
}

inline Vec position_of(Vec x, const GridVec& grid) { return multiplier_subtract(x, grid.offset) * grid.inverse; }

inline Vec binary_code(Vec x) { return keep(less_equal(splat(0.0f), x), splat(1.0f)); }
inline Vec ternary_code(Vec x, Vec threshold) {
  const Vec one = splat(1.0f);
  return keep(less(splat(0.0f) - threshold, x), one) + keep(less(threshold, x), one);
}

template <Kind kKind>
inline Vec code_of(Vec x, const GridVec& grid, Vec levels) {
  if constexpr (kKind == Kind::kUniform) {
    return round_to_even(clamp_code(position_of(x, grid), levels));
  } else if constexpr (kKind == Kind::kBinary) {
    return binary_code(x);
  } else {
    return ternary_code(x, grid.threshold);
  }
}

// Calls f.template operator()<kKind>() for a kind that has codes.
template <class F>
inline void with_kind(Kind kind, const F& f) {
  switch (kind) {
    case Kind::kUniform:
      return f.template operator()<Kind::kUniform>();
    case Kind::kBinary:
      return f.template operator()<Kind::kBinary>();
    case Kind::kTernary:
      return f.template operator()<Kind::kTernary>();
    case Kind::kIdentity:
    case Kind::kLearned:
      return;  // refused by csrc/ops, or of another family
  }
}

}  // namespace qk::cpu::QK_CPU_ISA

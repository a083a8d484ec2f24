#pragma once
// A channel's quantizer in registers, and the codes that it gives: core/quantizer.h in the instructions of the device.

#include <cuda_runtime.h>

#include <cstring>

#include "core/quantizer.h"
#include "cuda/ptx/clamp.cuh"

namespace qk::cuda {

struct Channel {
  Grid grid;
  float inverse;
};

__device__ __forceinline__ Channel load_channel(const float* __restrict__ grid,  // [channels, 3]
                                                int64_t channel) {
  const float* const row = grid + channel * kGridColumns;
  return {{row[0], row[1], row[2]}, inverse_step(row[1])};
}

__device__ __forceinline__ float clamp_code(float v, float levels) { return ptx::min_nan(ptx::max_nan(v, 0.0f), levels); }

__device__ __forceinline__ float uniform_code(float position, float levels) {
  return round_to_even(clamp_code(position, levels));
}

// The code of x as a float.
template <Kind kKind>
__device__ __forceinline__ float code_of(float x, const Channel& c, float levels) {
  if constexpr (kKind == Kind::kUniform) return uniform_code(grid_position(x, c.grid.offset, c.inverse), levels);
  return kKind == Kind::kBinary ? binary_code(x) : ternary_code(x, c.grid.threshold);
}

// The code of x; that of a NaN is 0.
template <Kind kKind>
__device__ __forceinline__ uint32_t integer_code_of(float x, const Channel& c, float levels) {
  if constexpr (kKind == Kind::kBinary) return x >= 0.0f ? 1u : 0u;
  if constexpr (kKind == Kind::kTernary) return (x > -c.grid.threshold ? 1u : 0u) + (x > c.grid.threshold ? 1u : 0u);
  // fmaxf prefers 0 to a NaN. After the addition that rounds, the lowest bits are the code.
  const float clamped = fminf(fmaxf(grid_position(x, c.grid.offset, c.inverse), 0.0f), levels);
  const float rounded = clamped + kRoundingMagic;
  uint32_t bits;
  memcpy(&bits, &rounded, sizeof bits);
  return bits & 0xffu;
}

// Calls f.template operator()<kKind>() for a kind that has codes.
template <class F>
void with_kind(Kind kind, const F& f) {
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

// The same in device code, and for the identity, which has none.
template <class F>
__device__ __forceinline__ void with_any_kind(Kind kind, const F& f) {
  if (kind == Kind::kUniform) return f.template operator()<Kind::kUniform>();
  if (kind == Kind::kBinary) return f.template operator()<Kind::kBinary>();
  if (kind == Kind::kTernary) return f.template operator()<Kind::kTernary>();
  f.template operator()<Kind::kIdentity>();
}

}  // namespace qk::cuda

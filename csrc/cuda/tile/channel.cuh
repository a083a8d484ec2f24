#pragma once
// A channel's quantizer in registers.

#include <cuda_runtime.h>

#include "core/quantizer.h"

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
      return;  // refused by csrc/ops
  }
}

}  // namespace qk::cuda

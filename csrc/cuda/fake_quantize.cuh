#pragma once
// Device code of fake_quantize. Formulas are those of csrc/core/quantizer.h; compile with --fmad=false.

#include "cuda/tile/channel.cuh"
#include "cuda/tile/traverse.cuh"

namespace qk::cuda {

// Position, mask and the three sums that every range gradient is made of: below, above, inside (docs/numerics.md).
template <bool kInsideSum>
__device__ __forceinline__ bool straight_through(float g, float position, float levels, float* sums) {
  if (position < 0.0f) sums[0] += g;
  if (position >= levels) sums[1] += g;
  if constexpr (kInsideSum) {
    // Outside the range the clamped position is a whole number, so this term vanishes there by itself.
    const float clamped = clamp_code(position, levels);
    sums[2] = fmaf(g, round_to_even(clamped) - clamped, sums[2]);
  }
  return position >= 0.0f && position <= levels;
}

template <class Element, Kind kKind, class Stored = Element>
struct FakeQuantizeForward {
  using T = Element;
  using Out = Stored;  // T: values; uint8_t: codes
  using Reduction = NoReduction;
  using Params = Channel;
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = 4;
  static constexpr bool kWideColumns = true;

  const T* in[1];     // x [outer, channels, inner]
  Out* out;           // like x
  const float* grid;  // [channels, 3]
  float levels;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_channel(grid, channel); }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& c, float*) const {
    const float code = code_of<kKind>(x[0], c, levels);
    return std::is_same_v<Out, uint8_t> ? code : decode(code, c.grid);
  }
};

template <bool kInsideSum>
struct RangeSums : Additive<kInsideSum ? 3 : 2> {
  float* sums;  // [channels, 3]: below, above, inside

  __device__ void finish(int64_t channel, const double* totals) const {
    for (int s = 0; s < 3; ++s) sums[channel * 3 + s] = s < RangeSums::kSums ? static_cast<float>(totals[s]) : 0.0f;
  }
};

// For STEs other than the identity, whose backward pass is a copy. Clip: without the sums.
template <class Element>
struct FakeQuantizeClip {
  using T = Element;
  using Out = Element;
  using Reduction = NoReduction;
  using Params = Channel;
  static constexpr int kInputs = 2, kUnroll = 4, kMinBlocks = 4;
  static constexpr bool kWideColumns = true;

  const T* in[2];     // grad, x [outer, channels, inner]
  Out* out;           // grad_x, like x
  const float* grid;  // [channels, 3]
  float levels;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_channel(grid, channel); }
  __device__ __forceinline__ float operator()(const float (&in)[2], const Params& c, float*) const {
    const float position = grid_position(in[1], c.grid.offset, c.inverse);
    return position >= 0.0f && position <= levels ? in[0] : 0.0f;
  }
};

template <class Element, bool kInsideSum>
struct FakeQuantizeBackward {
  using T = Element;
  using Out = Element;
  using Reduction = RangeSums<kInsideSum>;
  using Params = Channel;
  static constexpr int kInputs = 2, kUnroll = 4, kMinBlocks = 2;
  static constexpr bool kWideColumns = true;

  const T* in[2];     // grad, x [outer, channels, inner]
  Out* out;           // grad_x, like x
  const float* grid;  // [channels, 3]
  float levels;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_channel(grid, channel); }
  __device__ __forceinline__ float operator()(const float (&in)[2], const Params& c, float* sums) const {
    return straight_through<kInsideSum>(in[0], grid_position(in[1], c.grid.offset, c.inverse), levels, sums) ? in[0] : 0.0f;
  }
};

}  // namespace qk::cuda

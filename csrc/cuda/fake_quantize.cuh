#pragma once
// Device code of fake_quantize. Formulas are those of csrc/core/quantizer.h; compile with --fmad=false.

#include "core/bitplanes.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"
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

// The masked form keeps one bit an element, in memory order, in place of x for the backward pass. A thread takes a pack of
// neighbours; the lanes that share a word of the mask join their bits by shuffles.

template <int kSize>
inline constexpr int kLanesAMaskWord = kWordBits / kSize;

// All lanes of the warp must call it.
template <int kSize>
__device__ __forceinline__ uint32_t join_bits(uint32_t bits, int lane) {
  bits <<= lane % kLanesAMaskWord<kSize> * kSize;
#pragma unroll
  for (int distance = 1; distance < kLanesAMaskWord<kSize>; distance *= 2)
    bits |= __shfl_xor_sync(kAllLanes, bits, distance);
  return bits;
}

// Walks [outer, channels, inner] in memory order, and loads a channel's parameters where it begins.
template <bool kOneChannel>
class ChannelCursor {
 public:
  __device__ __forceinline__ ChannelCursor(const float* grid, const Layout& layout, int64_t i)
      : grid_(grid), layout_(layout) {
    if constexpr (!kOneChannel) {
      channel_ = i / layout.inner % layout.channels;
      left_ = layout.inner - i % layout.inner;
    }
    params = load_channel(grid, channel_);
  }
  __device__ __forceinline__ void advance() {
    if constexpr (kOneChannel) return;
    if (--left_ > 0) return;
    left_ = layout_.inner;
    channel_ = channel_ + 1 < layout_.channels ? channel_ + 1 : 0;
    params = load_channel(grid_, channel_);
  }

  Channel params;

 private:
  const float* grid_;  // [channels, 3]
  const Layout& layout_;
  int64_t channel_ = 0, left_ = 0;
};

// The elements of a pack at i that are in the tensor.
template <int kSize>
__device__ __forceinline__ int inside_of(int64_t i, int64_t numel) {
  return static_cast<int>(max(int64_t{0}, min(int64_t{kSize}, numel - i)));
}

template <class T, int kSize>
__device__ __forceinline__ Pack<T, kSize> load_inside(const T* p, int inside, bool aligned) {
  return aligned && inside == kSize ? load_pack<T, kSize, true>(p, 0, kSize) : load_pack<T, kSize, false>(p, 0, inside);
}

template <class T, int kSize>
__device__ __forceinline__ void store_inside(T* p, const Pack<T, kSize>& pack, int inside, bool aligned) {
  aligned&& inside == kSize ? store_pack<T, kSize, true>(p, pack, 0, kSize)
                            : store_pack<T, kSize, false>(p, pack, 0, inside);
}

template <class T, bool kOneChannel>
__global__ void __launch_bounds__(kThreads) fake_quantize_masked_kernel(const T* __restrict__ x,  // [outer, channels, inner]
                                                                        const float* grid,        // [channels, 3]
                                                                        T* __restrict__ out,      // like x
                                                                        int32_t* __restrict__ mask,  // [words_of(numel)]
                                                                        const Layout layout, float levels, bool aligned) {
  constexpr int kSize = kPackSize<T>;
  const int lane = threadIdx.x % 32;
  const int64_t numel = layout.numel(), stride = static_cast<int64_t>(gridDim.x) * kThreads * kSize;
  // `first` is that of the warp, whose lanes stay together.
  for (int64_t first = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x - lane) * kSize; first < numel;
       first += stride) {
    const int64_t i = first + lane * kSize;
    const int inside = inside_of<kSize>(i, numel);
    const Pack<T, kSize> in = load_inside<T, kSize>(x + i, inside, aligned);
    Pack<T, kSize> q{};
    uint32_t bits = 0;
    ChannelCursor<kOneChannel> at(grid, layout, i);
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (e >= inside) continue;
      const float position = grid_position(to_float(in.v[e]), at.params.grid.offset, at.params.inverse);
      const float clamped = clamp_code(position, levels);
      bits |= (position == clamped ? 1u : 0u) << e;  // never of a NaN
      q.v[e] = from_float<T>(decode(round_to_even(clamped), at.params.grid));
      at.advance();
    }
    store_inside<T, kSize>(out + i, q, inside, aligned);
    bits = join_bits<kSize>(bits, lane);
    if (inside > 0 && lane % kLanesAMaskWord<kSize> == 0) mask[i / kWordBits] = static_cast<int32_t>(bits);
  }
}

template <class T>
__global__ void __launch_bounds__(kThreads) apply_mask_kernel(const T* __restrict__ grad,        // [numel]
                                                              const int32_t* __restrict__ mask,  // [words_of(numel)]
                                                              T* __restrict__ out,               // [numel]
                                                              int64_t numel, bool aligned) {
  constexpr int kSize = kPackSize<T>;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kSize; i < numel;
       i += static_cast<int64_t>(gridDim.x) * kThreads * kSize) {
    const int inside = inside_of<kSize>(i, numel);
    const Pack<T, kSize> in = load_inside<T, kSize>(grad + i, inside, aligned);
    const uint32_t bits = static_cast<uint32_t>(mask[i / kWordBits]) >> i % kWordBits;
    Pack<T, kSize> kept{};
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (bits >> e & 1) kept.v[e] = in.v[e];
    store_inside<T, kSize>(out + i, kept, inside, aligned);
  }
}

}  // namespace qk::cuda

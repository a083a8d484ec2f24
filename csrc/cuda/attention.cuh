#pragma once
// Device code of attention_quantize: q = sum_k a_k Q_k(x) (DQA, equation 3), the members' terms added in the order of k.
// Formulas are those of csrc/core/quantizer.h; compile with --fmad=false.

#include "cuda/fake_quantize.cuh"

namespace qk::cuda {

// What all channels share. kMax: members that registers are kept for.
template <int kMax>
struct Members {
  int count;
  int64_t channels;
  Kind kinds[kMax];
  Ste stes[kMax];
  float levels[kMax];
  const float* attention;  // [count]
  const float* grids;      // [count, channels, 3]
};

template <int kMax>
struct ChannelMembers {
  float base;
  struct {
    Channel channel;
    float attention;
    float weight;  // attention * step
  } member[kMax];
};

template <int kMax>
__device__ __forceinline__ ChannelMembers<kMax> load_members(const Members<kMax>& all, int64_t channel) {
  ChannelMembers<kMax> p{};
#pragma unroll
  for (int k = 0; k < kMax; ++k) {
    if (k >= all.count) continue;
    auto& m = p.member[k];
    m.channel = load_channel(all.grids, k * all.channels + channel);
    m.attention = all.attention[k];
    m.weight = m.attention * m.channel.grid.step;
    if (all.kinds[k] != Kind::kIdentity) p.base = p.base + m.attention * m.channel.grid.offset;
  }
  return p;
}

// kUniform: all members are; the common case needs no branches.
template <class Element, int kMax, bool kUniform>
struct AttentionForward {
  using T = Element;
  using Out = Element;
  using Reduction = NoReduction;
  using Params = ChannelMembers<kMax>;
  static constexpr int kInputs = 1, kUnroll = 4, kMinBlocks = kMax > 4 ? 2 : 4;
  static constexpr bool kWideColumns = false;  // the parameters of a pack of columns would not fit in registers

  const T* in[1];  // x [outer, channels, inner]
  Out* out;        // like x
  Members<kMax> members;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_members(members, channel); }
  __device__ __forceinline__ float operator()(const float (&x)[1], const Params& p, float*) const {
    float q = p.base;
#pragma unroll
    for (int k = 0; k < kMax; ++k) {
      if (k >= members.count) continue;
      const auto& m = p.member[k];
      const Kind kind = kUniform ? Kind::kUniform : members.kinds[k];
      if (kind == Kind::kIdentity) {
        q = q + m.attention * x[0];
      } else {
        q = q + m.weight * qk::encode(kind, x[0], m.channel.grid, m.channel.inverse, members.levels[k]);
      }
    }
    return q;
  }
};

// sum g; for each member sum g*c (identity: sum g*x) and its three range sums.
template <int kMax>
struct AttentionSums : Additive<1 + 4 * kMax> {
  int count;
  int64_t channels;
  Kind kinds[kMax];
  const float* grids;   // [count, channels, 3]
  float* sums;          // [count, channels, 3], or null
  float* contribution;  // to the gradient of attention: [channels, kMaxQuantizers], or [count] of the only channel

  __device__ void finish(int64_t channel, const double* totals) const {
#pragma unroll
    for (int k = 0; k < kMax; ++k) {
      if (k >= count) continue;
      const double* const mine = totals + 1 + 4 * k;
      const float* const grid = grids + (k * channels + channel) * kGridColumns;
      contribution[channel * kMaxQuantizers + k] =
          static_cast<float>(kinds[k] == Kind::kIdentity ? mine[0] : grid[0] * totals[0] + grid[1] * mine[0]);
      for (int s = 0; sums && s < 3; ++s) sums[(k * channels + channel) * 3 + s] = static_cast<float>(mine[1 + s]);
    }
    if (channels > 1)
      for (int k = count; k < kMaxQuantizers; ++k) contribution[channel * kMaxQuantizers + k] = 0.0f;
  }
};

// Result void: grad_attention is all that is wanted.
template <class Element, class Result, int kMax, bool kUniform>
struct AttentionBackward {
  using T = Element;
  using Out = Result;
  using Reduction = AttentionSums<kMax>;
  using Params = ChannelMembers<kMax>;
  static constexpr int kInputs = 2, kUnroll = 2, kMinBlocks = 2;
  static constexpr bool kWideColumns = false;

  const T* in[2];  // grad, x [outer, channels, inner]
  Out* out;        // grad_x, like x
  Members<kMax> members;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_members(members, channel); }
  __device__ __forceinline__ float operator()(const float (&in)[2], const Params& p, float* sums) const {
    const float g = in[0], x = in[1];
    float slope = 0.0f;
    sums[0] += g;
#pragma unroll
    for (int k = 0; k < kMax; ++k) {
      if (k >= members.count) continue;
      const auto& m = p.member[k];
      float* const mine = sums + 1 + 4 * k;
      const Kind kind = kUniform ? Kind::kUniform : members.kinds[k];
      bool passes = true;
      if (kind == Kind::kIdentity) {
        mine[0] += g * x;
      } else if (kind == Kind::kUniform) {
        const float position = grid_position(x, m.channel.grid.offset, m.channel.inverse), levels = members.levels[k];
        mine[0] += g * uniform_code(position, levels);
        if (members.stes[k] == Ste::kClip) passes = straight_through<false>(g, position, levels, mine + 1);
        if (members.stes[k] == Ste::kFull) passes = straight_through<true>(g, position, levels, mine + 1);
      } else {
        mine[0] += g * qk::encode(kind, x, m.channel.grid, m.channel.inverse, members.levels[k]);
      }
      slope = slope + (passes ? m.attention : 0.0f);
    }
    return g * slope;
  }
};

// The gradient of attention from its channels' contributions.
struct AttentionTotals : Additive<kMaxQuantizers> {
  int count;
  float* grad_attention;  // [count]

  __device__ void finish(int64_t, const double* totals) const {
#pragma unroll
    for (int k = 0; k < kMaxQuantizers; ++k)
      if (k < count) grad_attention[k] = static_cast<float>(totals[k]);
  }
};

}  // namespace qk::cuda

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

// Neighbouring elements share each member's branches.
template <class Element, int kMax>
struct AttentionForward {
  using T = Element;
  using Out = Element;
  using Reduction = NoReduction;
  using Params = ChannelMembers<kMax>;
  static constexpr int kInputs = 1, kUnroll = kMax > 4 ? 2 : 4, kMinBlocks = kMax > 4 ? 3 : 4;
  static constexpr bool kWideColumns = false;  // the parameters of a pack of columns would not fit in registers

  const T* in[1];  // x [outer, channels, inner]
  Out* out;        // like x
  Members<kMax> members;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_members(members, channel); }
  template <int kSize>
  __device__ __forceinline__ void all(const float (&in)[1][kSize], const Params& p, float*, float (&q)[kSize]) const {
    const auto& x = in[0];
#pragma unroll
    for (int e = 0; e < kSize; ++e) q[e] = p.base;
#pragma unroll
    for (int k = 0; k < kMax; ++k) {
      if (k >= members.count) continue;
      const auto& m = p.member[k];
      with_any_kind(members.kinds[k], [&]<Kind kKind>() {
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          if constexpr (kKind == Kind::kIdentity) {
            q[e] = q[e] + m.attention * x[e];
          } else {
            q[e] = q[e] + m.weight * code_of<kKind>(x[e], m.channel, members.levels[k]);
          }
        }
      });
    }
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

// Out null: grad_attention is all that is wanted.
template <class Element, int kMax>
struct AttentionBackward {
  using T = Element;
  using Out = Element;
  using Reduction = AttentionSums<kMax>;
  using Params = ChannelMembers<kMax>;
  static constexpr int kInputs = 2, kUnroll = kMax > 4 ? 1 : 2, kMinBlocks = kMax > 4 ? 2 : 3;
  static constexpr bool kWideColumns = false;

  const T* in[2];  // grad, x [outer, channels, inner]
  Out* out;        // grad_x, like x
  Members<kMax> members;
  Reduction reduction;

  __device__ Params params(int64_t channel) const { return load_members(members, channel); }
  template <int kSize>
  __device__ __forceinline__ void all(const float (&in)[2][kSize], const Params& p, float* sums,
                                      float (&grad_x)[kSize]) const {
    const auto &g = in[0], &x = in[1];
    float slope[kSize] = {};
#pragma unroll
    for (int e = 0; e < kSize; ++e) sums[0] += g[e];
#pragma unroll
    for (int k = 0; k < kMax; ++k) {
      if (k >= members.count) continue;
      const auto& m = p.member[k];
      float* const mine = sums + 1 + 4 * k;
      with_any_kind(members.kinds[k], [&]<Kind kKind>() {
        if constexpr (kKind == Kind::kUniform) {
          if (members.stes[k] == Ste::kClip) return uniform<true>(g, x, m, members.levels[k], mine, slope);
          if (members.stes[k] == Ste::kFull) return uniform<false>(g, x, m, members.levels[k], mine, slope);
        }
#pragma unroll
        for (int e = 0; e < kSize; ++e) {
          const float term = kKind == Kind::kIdentity ? x[e] : code_of<kKind>(x[e], m.channel, members.levels[k]);
          mine[0] = fmaf(g[e], term, mine[0]);
          slope[e] = slope[e] + m.attention;
        }
      });
    }
#pragma unroll
    for (int e = 0; e < kSize; ++e) grad_x[e] = g[e] * slope[e];
  }

 private:
  // A uniform member whose range learns.
  template <bool kClip, int kSize, class Member>
  static __device__ __forceinline__ void uniform(const float (&g)[kSize], const float (&x)[kSize], const Member& m,
                                                 float levels, float* mine, float (&slope)[kSize]) {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      const float position = grid_position(x[e], m.channel.grid.offset, m.channel.inverse);
      mine[0] = fmaf(g[e], uniform_code(position, levels), mine[0]);
      slope[e] = slope[e] + (straight_through<!kClip>(g[e], position, levels, mine + 1) ? m.attention : 0.0f);
    }
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

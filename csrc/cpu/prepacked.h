#pragma once
// Weights arranged once for all calls: panels (cpu/dot.h) in which a byte holds as many codes as fit, and the sums of their
// taps. Planes hold as few bits, but their codes have to be put together at each call, and turned where channels are lanes.

#include <bit>

#include "cpu/lowbit.h"

namespace qk::cpu::QK_CPU_ISA {

// What prepack() writes; 0 where it would be of no use: without AVX-512, by planes, and for depthwise windows.
int64_t prepacked_bytes(const LowbitArgs& args);
// args.prepacked does not matter. to [prepacked_bytes()]
void prepack(const LowbitArgs& args, uint8_t* to);

#if defined(__AVX512F__)

// Where everything lies: tap_sums as in Weights, then the panels, [groups][panels][packed steps][channels of the
// panel][kDepth]. Of a packed step's bytes the lowest `width` bits are the codes of one step, the next ones those of the
// step after it.
class Prepacked {
 public:
  Prepacked(const LowbitArgs& args, const Plan& plan)
      : data_(args.prepacked),
        width_(static_cast<int>(std::bit_ceil(static_cast<unsigned>(args.w_bits)))),
        steps_(plan.steps()),
        group_vectors_(plan.group_vectors),
        vectors_(plan.groups * plan.group_vectors),
        sums_(args.geometry.kernel_height * args.geometry.kernel_width * plan.slots()) {}

  static bool suits(const LowbitArgs& args, const Plan& plan) {
    return !plan.by_planes() && plan.path != Path::kDepthwise && plan.depth > 0 && args.geometry.out_channels > 0;
  }

  int width() const { return width_; }
  int shared() const { return 8 / width_; }
  int64_t packed_steps() const { return divide_up(steps_, shared()); }
  int64_t sums_bytes() const { return round_up(sums_ * static_cast<int64_t>(sizeof(int64_t)), 64); }
  int64_t sums_count() const { return sums_; }
  int64_t bytes() const { return sums_bytes() + vectors_ * packed_steps() * 64; }
  // From the beginning.
  int64_t panel_at(int64_t group, int64_t index) const {
    return sums_bytes() + (group * group_vectors_ + index * kTileVectors) * packed_steps() * 64;
  }

  const uint8_t* panel(int64_t group, int64_t index) const { return data_ + panel_at(group, index); }
  const int64_t* tap_sums() const { return reinterpret_cast<const int64_t*>(data_); }
  // The panel of so many vectors as it is multiplied: where it lies, or in `scratch`.
  const Weight* expanded(int64_t group, int64_t index, int64_t vectors, Weight* scratch) const;

 private:
  const uint8_t* data_;
  int width_;
  int64_t steps_, group_vectors_, vectors_;
  int64_t sums_;  // tap_sums
};

// Step s of those that lie in the same bytes, 2^(s % kInPlace * kWidth) times as large: so much less has to be shifted.
template <int kWidth, int kInPlace = 1>
QK_INLINED inline __m512i codes_of(__m512i packed, int s) {
  if constexpr (kWidth == 8) return packed;
  const int right = s / kInPlace * kInPlace * kWidth, left = s % kInPlace * kWidth;
  const __m512i shifted = right == 0 ? packed : _mm512_srli_epi16(packed, right);
  return _mm512_and_si512(shifted, _mm512_set1_epi8(static_cast<char>(((1 << kWidth) - 1) << left)));
}

QK_INLINED inline __m512i broadcast_step(const Activation* codes) {
  int32_t four;
  std::memcpy(&four, codes, sizeof four);
  return _mm512_set1_epi32(four);
}

// To dots the products of the last steps, which do not fill their bytes. Of its own, or the loop below would keep its sums
// in memory.
template <int kWidth>
[[gnu::noinline]] void add_last_steps(const Activation* const* rows, int count, int64_t at, const uint8_t* packed,
                                      int vectors, int64_t steps, int32_t* dots) {
  for (int r = 0; r < count; ++r)
    for (int v = 0; v < vectors; ++v, dots += kLanes) {
      __m512i sum = _mm512_loadu_si512(dots);
      for (int s = 0; s < steps; ++s)
        sum = _mm512_dpbusd_epi32(sum, broadcast_step(rows[r] + at + s * kDepth),
                                  codes_of<kWidth>(_mm512_loadu_si512(packed + v * 64), s));
      _mm512_storeu_si512(dots, sum);
    }
}

// As dot_tile(), of rows in one line by a panel that is prepacked. For few rows: each tile of them unpacks the weights anew.
template <int R, int V, int kWidth>
void dot_packed_tile(const Activation* const* rows, const uint8_t* panel, int64_t steps, int32_t* dots) {
  constexpr int kShared = 8 / kWidth;
  constexpr int kInPlace = kWidth > 2 || R > 2 ? 1 : 2;
  // One for each place in a byte; and a product waits four cycles for the one before it in its sum.
  constexpr int kChains = std::max(kInPlace, R == 1 && kShared > 1 ? 2 : 1);
  __m512i sums[kChains][R][V];
  unrolled<kChains>([&](int c) QK_INLINED {
    unrolled<R>([&](int r) QK_INLINED { unrolled<V>([&](int v) QK_INLINED { sums[c][r][v] = _mm512_setzero_si512(); }); });
  });
  const int64_t last = steps / kShared * kShared * kDepth;
  for (int64_t at = 0; at < last; at += kShared * kDepth, panel += V * 64) {
    __m512i packed[V];
    unrolled<V>([&](int v) QK_INLINED { packed[v] = _mm512_loadu_si512(panel + v * 64); });
    unrolled<kShared>([&](int s) QK_INLINED {
      __m512i activation[R];
      unrolled<R>([&](int r) QK_INLINED { activation[r] = broadcast_step(rows[r] + at + s * kDepth); });
      unrolled<V>([&](int v) QK_INLINED {
        const __m512i weight = codes_of<kWidth, kInPlace>(packed[v], s);
        unrolled<R>([&](int r) QK_INLINED {
          __m512i& sum = sums[s % kChains][r][v];
          sum = _mm512_dpbusd_epi32(sum, activation[r], weight);
        });
      });
    });
  }
  unrolled<R>([&](int r) QK_INLINED {
    unrolled<V>([&](int v) QK_INLINED {
      __m512i sum = sums[0][r][v];
      unrolled<kChains - 1>([&](int c) QK_INLINED {
        sum = _mm512_add_epi32(sum, _mm512_srli_epi32(sums[c + 1][r][v], kInPlace > 1 ? (c + 1) * kWidth : 0));
      });
      _mm512_storeu_si512(dots + (r * V + v) * kLanes, sum);
    });
  });
  if (steps % kShared) add_last_steps<kWidth>(rows, R, last, panel, V, steps % kShared, dots);
}

// Calls f.template operator()<width>().
template <class F>
void with_width(int width, const F& f) {
  if (width == 8) return f.template operator()<8>();
  if (width == 4) return f.template operator()<4>();
  width == 2 ? f.template operator()<2>() : f.template operator()<1>();
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

// What quantizers need to know of a tensor, a channel at a time, in one pass.

#include "cpu/stats.h"

#include "cpu/grid.h"
#include "cpu/halves.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

struct NoParams {};

// finish_stats() of kLanes channels, of which total s of channel c is totals[c * kNext + s * kOther]: loops that the
// compiler makes vectors of.
template <int kNext, int kOther>
__attribute__((noinline)) void finish_many(const StatsArgs& args, int64_t channel, const float* totals) {
  float low[kLanes], high[kLanes], magnitudes[kLanes], squares[kLanes];
  int nans = 0;
  for (int c = 0; c < kLanes; ++c) {
    const float* const own = totals + c * kNext;
    low[c] = own[0];
    high[c] = own[kOther];
    magnitudes[c] = own[2 * kOther];
    squares[c] = own[3 * kOther];
    nans |= magnitudes[c] != magnitudes[c];
  }
  // The minima and maxima of vectors pass over NaN; sum |x| is NaN exactly where there is one.
  if (nans)
    for (int c = 0; c < kLanes; ++c)
      if (std::isnan(magnitudes[c])) low[c] = high[c] = magnitudes[c];
  if (float* const to = args.stats)
    for (int c = 0; c < kLanes; ++c) {
      float* const row = to + (channel + c) * 4;
      row[0] = low[c];
      row[1] = high[c];
      row[2] = magnitudes[c];
      row[3] = squares[c];
    }
  if (!args.grids) return;
  for (int64_t k = 0; k < args.count; ++k) {
    float* const rows = args.grids + (k * args.layout.channels + channel) * kGridColumns;
    const int64_t levels = args.levels[k];
    float steps[kLanes];  // in a loop of their own, which becomes one division of vectors
#pragma GCC unroll 1
    for (int c = 0; c < kLanes; ++c) steps[c] = minmax_grid(low[c], high[c], levels).step;
    for (int c = 0; c < kLanes; ++c) {
      rows[c * kGridColumns] = low[c];
      rows[c * kGridColumns + 1] = steps[c];
      rows[c * kGridColumns + 2] = 0.0f;
    }
  }
}

template <class T>
struct ChannelStats {
  static constexpr int kSums = 4;  // min, max, sum |x|, sum x^2
  static constexpr int kRows = kWholeVectors ? 4 : 6;
  static constexpr Combine combine(int s) { return s == 0 ? Combine::kMin : s == 1 ? Combine::kMax : Combine::kSum; }
  const StatsArgs& args;
  const T* x = static_cast<const T*>(args.x);

  template <class Field>
  NoParams params(Field) const {
    return {};
  }

  void finish_channel(int64_t channel, const float* totals) const {  // as finish_many()
    const bool nan = std::isnan(totals[2]);
    const float stats[kSums] = {nan ? totals[2] : totals[0], nan ? totals[2] : totals[1], totals[2], totals[3]};
    finish_stats(args, channel, stats);
  }

  template <int kNext, int kOther>
  void finish_channels(int64_t channel, const float* totals) const {
    finish_many<kNext, kOther>(args, channel, totals);
  }

  template <class Lanes>
  Vec read(int64_t i, Lanes lanes) const
    requires(kWholeVectors && std::is_same_v<T, float>)
  {
    return load_first(x + i, lanes);
  }
  void add_up(Vec value, NoParams, Vec* sums) const {
    sums[0] = min(sums[0], value);
    sums[1] = max(sums[1], value);
    sums[2] = multiplier_add(abs(value), sums[2]);
    sums[3] = multiply_add(value, value, sums[3]);
  }
  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, NoParams params, Vec* sums) const {
    add_up(load(x + i, lanes), params, sums);
  }
};

#if defined(__AVX512F__)
// 32 elements of a half type at a time. Their minima and maxima come from the integers that their bits are: without a sign
// larger ones are larger numbers, with it smaller ones, and as unsigned integers all with a sign are above all without.
// Where both occur, the least integer is neither, so it is followed no longer. kAdds: the sums are wanted; without them sum
// |x| tells no more than whether there is a NaN.
template <class T, bool kAdds>
struct ChannelStatsOfHalves : ChannelStats<T> {
  struct Pairs {
    __m512i largest_signed = _mm512_set1_epi16(-0x8000), largest = _mm512_setzero_si512(), least = _mm512_set1_epi16(-1);
    MagnitudeSums<T> sums;

    __mmask32 some_negative() const { return _mm512_movepi16_mask(largest); }
    __mmask32 all_negative() const { return _mm512_movepi16_mask(largest_signed); }
    bool settled() const { return some_negative() == 0xffffffff && all_negative() == 0; }
    bool settled_together() const { return some_negative() != 0 && all_negative() != 0xffffffff; }
  };

  template <bool kSettled>
  void add(int64_t i, NoParams, NoParams, Pairs& to) const {
    const __m512i bits = load_bits(this->x + i);
    to.largest_signed = _mm512_max_epi16(to.largest_signed, bits);
    to.largest = _mm512_max_epu16(to.largest, bits);
    if constexpr (!kSettled) to.least = _mm512_min_epu16(to.least, bits);
    if constexpr (!kAdds) return;
    to.sums.add(bits, this->x + i);
  }

  template <Reach kReach>
  void prefetch_pair(int64_t i) const {
    prefetch_line<kReach>(this->x + i);
  }

  // As finish(), of all lanes together.
  QK_INLINED void totals(const Pairs& from, float* of_run) const {
    const auto halves = [](__m512i a, const auto& merge) {
      const __m256i eight = merge(_mm512_castsi512_si256(a), _mm512_extracti64x4_epi64(a, 1));
      return std::pair{_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1)};
    };
    const auto most = halves(from.largest, [](auto a, auto b) { return _mm256_max_epu16(a, b); });
    const auto most_signed = halves(from.largest_signed, [](auto a, auto b) { return _mm256_max_epi16(a, b); });
    const auto fewest = halves(from.least, [](auto a, auto b) { return _mm256_min_epu16(a, b); });
    // The instruction finds the least unsigned integer of eight.
    const auto least_of = [](__m128i a) { return static_cast<uint16_t>(_mm_cvtsi128_si32(_mm_minpos_epu16(a))); };
    const __m128i all = _mm_set1_epi16(-1), positive = _mm_set1_epi16(0x7fff);
    const uint16_t largest = ~least_of(_mm_xor_si128(_mm_max_epu16(most.first, most.second), all));
    const uint16_t largest_signed =
        least_of(_mm_xor_si128(_mm_max_epi16(most_signed.first, most_signed.second), positive)) ^ 0x7fff;
    const uint16_t least = least_of(_mm_min_epu16(fewest.first, fewest.second));
    const uint32_t minimum = largest & 0x8000 ? largest : least, maximum = largest_signed & 0x8000 ? least : largest_signed;
    const Vec both = widen(_mm256_castsi128_si256(_mm_cvtsi32_si128(static_cast<int>(minimum | maximum << 16))), this->x);
    const __m128 two = _mm512_castps512_ps128(both.v);
    of_run[0] = _mm_cvtss_f32(two);
    of_run[1] = _mm_cvtss_f32(_mm_movehdup_ps(two));
    if constexpr (kAdds) {
      const TwoSums sums = from.sums.totals();
      of_run[2] = sums.first;
      of_run[3] = sums.second;
    } else {
      // As integers, NaNs are beyond infinity on both sides.
      of_run[2] = std::isnan(of_run[0]) ? of_run[0] : std::isnan(of_run[1]) ? of_run[1] : 0.0f;
      of_run[3] = 0.0f;
    }
  }

  QK_INLINED void finish(const Pairs& from, Vec (&sums)[2][ChannelStats<T>::kSums + 1]) const {
    const TwoVecs parts[] = {
        widen(_mm512_mask_blend_epi16(from.some_negative(), from.least, from.largest), this->x),
        widen(_mm512_mask_blend_epi16(from.all_negative(), from.largest_signed, from.least), this->x),
        from.sums.magnitudes(),
        from.sums.squares(),
    };
    unrolled<ChannelStats<T>::kSums>([&](int s) QK_INLINED {
      const TwoVecs part = in_order(parts[s], this->x);
      sums[0][s] = part.first;
      sums[1][s] = part.second;
    });
    if constexpr (kAdds) return;
    // As integers, NaNs are beyond infinity on both sides.
    const Vec zero = splat(0.0f);
    for (Vec* const sum : sums)
      sum[2] = select(equal(sum[0], sum[0]), zero, sum[0]) + select(equal(sum[1], sum[1]), zero, sum[1]);
  }
};
template <bool kAdds>
struct ChannelStatsOfHalves<float, kAdds> : ChannelStats<float> {};
#else
template <class T, bool>
using ChannelStatsOfHalves = ChannelStats<T>;
#endif

template <class T>
struct ConditionalMean {
  static constexpr int kSums = 2;  // sum and count of |x| > threshold
  const T* x;

  template <class Field>
  Vec params(Field field) const {
    return field(0);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, Vec threshold, Vec* sums) const {
    const Vec magnitude = abs(load(x + i, lanes));
    const Mask chosen = less(threshold, magnitude);
    sums[0] = sums[0] + keep(chosen, magnitude);
    sums[1] = sums[1] + keep(chosen, splat(1.0f));
  }
};

inline constexpr int kRangesAtOnce = 4;  // so that their parameters and sums stay in registers

template <class T>
struct RangeErrors {
  static constexpr int kSums = kRangesAtOnce;
  struct Params {
    Vec offset[kSums], step[kSums], inverse[kSums];
  };
  const T* x;
  Vec levels;

  template <class Field>
  Params params(Field field) const {
    Params p;
    for (int j = 0; j < kSums; ++j) {
      p.offset[j] = field(3 * j);
      p.step[j] = field(3 * j + 1);
      p.inverse[j] = field(3 * j + 2);
    }
    return p;
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const Params& p, Vec* sums) const {
    const Vec value = load(x + i, lanes);
    for (int j = 0; j < kSums; ++j) {
      const Vec code = round_to_even(clamp_code((value - p.offset[j]) * p.inverse[j], levels));
      const Vec error = p.offset[j] + p.step[j] * code - value;
      sums[j] = multiply_add(error, error, sums[j]);
    }
  }
};

}  // namespace

void channel_stats(const StatsArgs& args) {
  const Walk walk = walk_of(args.layout, args.dtype);
  const ChannelTable table(args.layout, walk, 0, [](const auto&) {});
  with_type(args.dtype, [&]<class T>(T*) {
    const auto run = [&]<bool kAdds>() { traverse(args.layout, walk, table, ChannelStatsOfHalves<T, kAdds>{{args}}); };
    args.stats ? run.template operator()<true>() : run.template operator()<false>();
  });
}

void conditional_abs_mean(const ConditionalMeanArgs& args) {
  const Walk walk = walk_of(args.layout, args.dtype);
  const ChannelTable table(args.layout, walk, 1,
                           [&](const auto& field) { std::copy_n(args.threshold, args.layout.channels, field(0)); });
  const int64_t channels = args.layout.channels;
  with_type(args.dtype, [&]<class T>(T*) {
    const auto totals = traverse(args.layout, walk, table, ConditionalMean<T>{static_cast<const T*>(args.x)});
    for (int64_t c = 0; c < channels; ++c)
      args.mean[c] = totals[channels + c] > 0 ? static_cast<float>(totals[c] / totals[channels + c]) : 0.0f;
  });
}

void range_errors(const RangeErrorsArgs& args) {
  const Walk walk = walk_of(args.layout, args.dtype);
  const int64_t channels = args.layout.channels, count = args.candidates;
  const float levels = static_cast<float>(args.levels);
  for (int64_t first = 0; first < count; first += kRangesAtOnce) {
    // Past the last candidate the group repeats it.
    const ChannelTable table(args.layout, walk, 3 * kRangesAtOnce, [&](const auto& field) {
      for (int j = 0; j < kRangesAtOnce; ++j)
        for (int64_t c = 0; c < channels; ++c) {
          const float range = args.ranges[c * count + std::min(first + j, count - 1)], step = (range + range) / levels;
          field(3 * j)[c] = -range;
          field(3 * j + 1)[c] = step;
          field(3 * j + 2)[c] = inverse_step(step);
        }
    });
    with_type(args.dtype, [&]<class T>(T*) {
      const auto totals = traverse(args.layout, walk, table, RangeErrors<T>{static_cast<const T*>(args.x), splat(levels)});
      for (int64_t c = 0; c < channels; ++c)
        for (int64_t j = 0; j < std::min<int64_t>(kRangesAtOnce, count - first); ++j)
          args.errors[c * count + first + j] = static_cast<float>(totals[j * channels + c]);
    });
  }
}

}  // namespace qk::cpu::QK_CPU_ISA

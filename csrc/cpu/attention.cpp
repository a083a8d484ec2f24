// q = sum_k a_k Q_k(x) in the domain of codes (DQA, equation 3): q = base + sum_k w_k c_k with base = sum_k a_k offset_k and
// w_k = a_k step_k, so that one element costs a code and a multiply-add a quantizer. Its gradient needs no Q_k either:
// <g, Q_k> = offset_k sum g + step_k sum g c_k.

#include "cpu/attention.h"

#include <numeric>
#include <type_traits>

#include "cpu/grid.h"
#include "cpu/lookup.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

// What the members have in common, from the most to the least. It decides nothing but speed.
enum class Mix {
  kCovered,      // as below, and the range holds every x: nothing needs to be clamped
  kSharedRange,  // uniform, on one range: min-max of one tensor at several widths
  kUniform,
  kAny,
};

constexpr bool on_one_range(Mix mix) { return mix == Mix::kCovered || mix == Mix::kSharedRange; }

// What codes are multiplied by.
enum class Weights {
  kNone,
  kSteps,    // to be what they stand for, beside the offsets
  kMixture,  // by the attention as well, beside the base
};

// Fields of the ChannelTable: no more than are used, for those that are loaded must find room in the first-level cache.
struct Fields {
  int count;  // K
  Mix mix;
  Weights weights;

  int ranges() const { return on_one_range(mix) ? 1 : count; }  // of members that have their own
  bool bounds() const { return mix != Mix::kCovered; }
  int inverse(int k) const { return k; }
  int offset(int k) const { return count + k; }
  int bound(int k) const { return offset(ranges()) + k; }
  int weight(int k) const { return bound(bounds() ? ranges() : 0) + k; }
  int base() const { return weight(count); }
  int size() const {
    return weights == Weights::kMixture ? base() + 1 : weights == Weights::kSteps ? weight(count) : weight(0);
  }
};

// kCount quantizers; 0: any number up to kMaxQuantizers, told at run time. kClamped: nobody asks for a position out of
// range. Clamping commutes with the multiplication by an inverse step that is positive, so members on one range share it.
template <Mix kMix, int kCount, bool kClamped, Weights kWeights>
struct Members {
  static constexpr int kSize = kCount ? kCount : kMaxQuantizers;
  static constexpr bool kOneRange = on_one_range(kMix);
  struct Params {
    Vec base;
    Vec offset[kSize], inverse[kSize], weight[kSize], bound[kSize];
  };

  explicit Members(const AttentionArgs& args) : count_(args.count) {
    for (int k = 0; k < size(); ++k) {
      kinds[k] = args.kinds[k];
      attention[k] = splat(args.attention[k]);
      levels[k] = splat(static_cast<float>(args.levels[k]));
    }
  }

  int size() const { return kCount ? kCount : static_cast<int>(count_); }

  template <class Field>
  Params params(Field field) const {
    const Fields fields{size(), kMix, kWeights};
    Params p;
    if (kWeights == Weights::kMixture) p.base = field(fields.base());
    for (int k = 0; k < size(); ++k) {
      p.inverse[k] = field(fields.inverse(k));
      if (kWeights != Weights::kNone) p.weight[k] = field(fields.weight(k));
      if (k >= fields.ranges()) continue;
      p.offset[k] = field(fields.offset(k));
      if (fields.bounds()) p.bound[k] = field(fields.bound(k));
    }
    return p;
  }

  static Vec shared(Vec x, const Params& p) {
    if constexpr (kMix == Mix::kCovered) return x - p.offset[0];
    if constexpr (kMix != Mix::kSharedRange) return x;
    const Vec distance = multiplier_subtract(x, p.offset[0]);
    return kClamped ? min(p.bound[0], max(splat(0.0f), distance)) : distance;
  }

  // Of a uniform member.
  Vec position(int k, Vec shared, const Params& p) const {
    return (kOneRange ? shared : multiplier_subtract(shared, p.offset[k])) * p.inverse[k];
  }

  // Code of x at its position; of an identity member x itself.
  Vec code(int k, Vec x, Vec shared, const Params& p) const {
    if (kMix != Mix::kAny || kinds[k] == Kind::kUniform) {
      const Vec at = position(k, shared, p);
      return round_to_even(kOneRange && kClamped ? at : clamp_code(at, levels[k]));
    }
    return kinds[k] == Kind::kBinary ? binary_code(x) : kinds[k] == Kind::kTernary ? ternary_code(x, p.bound[k]) : x;
  }

  Kind kinds[kSize];
  Vec attention[kSize], levels[kSize];

 private:
  int64_t count_;
};

const float* grid_row(const AttentionArgs& args, int64_t k, int64_t c) {
  return args.grids + (k * args.layout.channels + c) * kGridColumns;
}

bool no_subnormal_mixtures(const AttentionArgs& args) {
  bool none = true;
  for (int64_t k = 0; k < args.count; ++k)
    none = none && args.kinds[k] != Kind::kIdentity &&
           no_subnormals(grid_row(args, k, 0), args.layout.channels * kGridColumns, args.attention[k]);
  return none;
}

template <Mix kMix, int kCount, class T>
struct Forward : Members<kMix, kCount, true, Weights::kMixture> {
  using Base = Members<kMix, kCount, true, Weights::kMixture>;
  static constexpr int kSums = 0;
  // With whole vectors memory is the limit, and prefetchers do best with four streams of float32.
  static constexpr int kRows = kWholeVectors && std::is_same_v<T, float> ? 2 : 4;
  const T* x;
  Results<T> out;

  Forward(const AttentionArgs& args, const Walk& walk)
      : Base(args),
        x(static_cast<const T*>(args.x)),
        out(args.out, args.layout, walk, kInPairs<T> && no_subnormal_mixtures(args)) {}

  // Of half types, whose conversions take registers, it costs more than it gains.
  template <class Lanes>
  Vec read(int64_t i, Lanes lanes) const
    requires std::is_same_v<T, float>
  {
    return load(x + i, lanes);
  }
  template <class Lanes>
  void write(int64_t i, Lanes lanes, Vec value, const typename Base::Params& p) const {
    out.put(i, mixture(value, p), lanes);
  }
  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const typename Base::Params& p, Vec*) const {
    write(i, lanes, load(x + i, lanes), p);
  }

 protected:
  Vec mixture(Vec value, const typename Base::Params& p) const {
    const Vec shared = Base::shared(value, p);
    Vec q = p.base;
    for (int k = 0; k < this->size(); ++k) q = q + p.weight[k] * this->code(k, value, shared, p);
    return q;
  }
};

#if defined(__AVX512F__)
template <Mix kMix, int kCount>
struct ForwardOfPairs : Forward<kMix, kCount, BFloat16> {
  using Base = Forward<kMix, kCount, BFloat16>;
  using Base::Base;
  struct Pairs {};

  template <bool>
  void add(int64_t i, const typename Base::Params& first, const typename Base::Params& second, Pairs&) const {
    const TwoVecs value = widen(load_bits(this->x + i), this->x);
    this->out.put_two(i, {this->mixture(value.first, first), this->mixture(value.second, second)});
  }
  template <Reach kReach>
  void prefetch_pair(int64_t i) const {
    prefetch_line<kReach>(this->x + i);
  }
};
template <Mix kMix, int kCount, class T>
using ForwardOf = std::conditional_t<kInPairs<T>, ForwardOfPairs<kMix, kCount>, Forward<kMix, kCount, T>>;

// The forward of half types by a table, where a code of the finest member tells the codes of all others. With levels like
// those of 2, 4 and 8 bits, which divide each other to odd numbers, codes of a coarser member change where one of the finest
// does, but for rounding errors. These matter to a few numbers of the half type, which are found out.
template <int kCount, class T>
struct LookupForward : ForwardOf<Mix::kCovered, kCount, T> {
  using Base = ForwardOf<Mix::kCovered, kCount, T>;
  static constexpr int64_t kShortest = 2048;  // elements of a run that are worth a table
  // For each code of the finest member those of all members.
  struct Codes {
    alignas(64) float of[Base::kSize][256];
  };
  struct Params : Base::Params {
    CodeTable table;
    Exceptions<T> exceptions;
    bool usable;
  };

  // codes: filled here, and as long as this one.
  LookupForward(const AttentionArgs& args, const Walk& walk, Codes& codes) : Base(args, walk), codes_(codes) {
    for (int k = 0; k < this->size(); ++k) {
      levels_[k] = static_cast<float>(args.levels[k]);
      if (levels_[k] > levels_[finest_]) finest_ = k;
    }
    for (int k = 0; k < this->size(); ++k) {
      ratio_[k] = splat(levels_[k] / levels_[finest_]);
      for (int code = 0; code <= kMostLevels; code += kLanes)
        store(codes.of[k] + code, following(k, count_from(static_cast<float>(code))));
    }
    // A member changes its code where the leader changes its own: at every such place, or at every third, fifth and so on.
    for (int k = 0; k < this->size(); ++k) {
      leader_[k] = k;
      for (int other = 0; other < this->size(); ++other)
        if (other != finest_ && levels_[other] > levels_[leader_[k]] && odd_multiple(args.levels[other], args.levels[k]))
          leader_[k] = other;
    }
  }

  static bool suits(const AttentionArgs& args, const Walk& walk) {
    const int64_t* const end = args.levels + args.count;
    const int64_t most = *std::max_element(args.levels, end);
    return !walk.by_columns && args.layout.inner >= kShortest &&
           std::all_of(args.levels, end, [&](int64_t n) { return odd_multiple(most, n); });
  }

  template <class Field>
  Params params(Field field) const {
    Params p;
    static_cast<typename Base::Params&>(p) = Base::params(field);
    p.usable = true;
    for (int k = 0; k < this->size(); ++k)
      if (k != finest_ && leader_[k] == k) p.usable = p.usable && follow(k, p);
    if (p.usable) fill(p);
    return p;
  }

  int64_t run(int64_t i, int64_t end, const Params& p) const {
    if (!p.usable) return i;
    const int count = p.exceptions.count;
    return count == 0 ? look_up_all<0>(i, end, p) : count <= 2 ? look_up_all<2>(i, end, p) : look_up_all<4>(i, end, p);
  }

 private:
  static bool odd_multiple(int64_t levels, int64_t of) { return levels % (2 * of) == of; }

  template <int kExceptions>
  int64_t look_up_all(int64_t i, int64_t end, const Params& p) const {
    const auto put = [&](int64_t at, __m512i results) {
      this->out.put_bits(at, p.exceptions.template apply<kExceptions>(results, load_bits(this->x + at)));
    };
    for (; i + kLookup <= end; i += kLookup) {
      const __m512i codes = finest_codes(this->x + i, p);
      const __m512i low = look_up(p.table.low, codes), high = look_up(p.table.high, codes);
      put(i, _mm512_unpacklo_epi8(low, high));
      put(i + kLookup / 2, _mm512_unpackhi_epi8(low, high));
    }
    return i;
  }

  // Of 64 elements, in an order that unpacking makes that of memory: each 128 bits hold eight of the first half and eight of
  // the second.
  QK_INLINED __m512i finest_codes(const T* from, const Params& p) const {
    if constexpr (std::is_same_v<T, Half> && !kWholeVectors) return finest_codes_of_eights(from, p);
    const auto code = [&](Vec value) { return _mm512_cvtps_epi32(this->position(finest_, Base::shared(value, p), p).v); };
    const auto half = [&](const T* at) {
      const TwoVecs values = load_to_pack(at);
      return _mm512_packus_epi32(code(values.first), code(values.second));
    };
    return _mm512_packus_epi16(half(from), half(from + kLookup / 2));
  }
  QK_INLINED __m512i finest_codes_of_eights(const Half* from, const Params& p) const {
    const Vec8 offset = part({p.offset[0], p.offset[0]}, 0), inverse = part({p.inverse[finest_], p.inverse[finest_]}, 0);
    const auto eight = [&](int n) { return _mm256_cvtps_epi32(((load_eight(from + 8 * n) - offset) * inverse).v); };
    const auto half = [&](int n) {
      return _mm512_castsi256_si512(
          _mm256_packus_epi16(_mm256_packus_epi32(eight(n), eight(n + 1)), _mm256_packus_epi32(eight(n + 2), eight(n + 3))));
    };
    const __m512i order = _mm512_set_epi32(23, 19, 7, 3, 22, 18, 6, 2, 21, 17, 5, 1, 20, 16, 4, 0);
    return _mm512_permutex2var_epi32(half(0), order, half(4));
  }

  // Never half-way between two codes, for the ratio is 1 to an odd number.
  Vec following(int k, Vec finest) const { return round_to_even(finest * ratio_[k]); }

  // Whether the codes of this member and of those that it leads follow for all numbers of the half type but a few.
  bool follow(int leader, Params& p) const {
    const auto code = [&](int member, Vec x) { return this->code(member, x, Base::shared(x, p), p); };
    const Vec half = splat(0.5f), inverse = Vec{_mm512_div_ps(splat(1.0f).v, p.inverse[leader].v)};
    bool all = true;
    for (float first = 1; first <= levels_[leader]; first += kLanes) {
      const Vec place = min(splat(levels_[leader]), count_from(first)) - half;
      const Neighbours<T> near(p.offset[0] + place * inverse);
      for (int k = 0; k < this->size(); ++k) {
        if (leader_[k] != leader || k == finest_) continue;
        // This member's code above that place, where it changes there.
        const Vec own = place * splat(levels_[k] / levels_[leader]) + half, codes = round_to_even(own);
        const Mask changes = less(abs(own - codes), splat(0.5f / static_cast<float>(kMostLevels)));
        all = all && rise_together<T>(
                         changes, codes, near, [&](Vec x) { return code(k, x); },
                         [&](Vec x) { return following(k, code(finest_, x)); }, p.exceptions);
      }
    }
    return all;
  }

  void fill(Params& p) const {
    const auto mixtures = [&](int first) QK_INLINED {
      const auto mixture = [&](int code) QK_INLINED {
        Vec q = p.base;
        for (int k = 0; k < this->size(); ++k) q = q + p.weight[k] * load(codes_.of[k] + code);
        return q;
      };
      return this->out.narrow_pair(mixture(first), mixture(first + kLanes));
    };
    for (int first = 0; first <= levels_[finest_]; first += kLookup)
      p.table.set(first, mixtures(first), mixtures(first + 2 * kLanes));
    if (p.exceptions.count > 0) store(p.exceptions.results, this->mixture(load(p.exceptions.numbers), p));
  }

  static constexpr int kMostLevels = 255;

  const Codes& codes_;
  int finest_ = 0, leader_[Base::kSize];
  float levels_[Base::kSize];
  Vec ratio_[Base::kSize];
};
#else
template <Mix kMix, int kCount, class T>
using ForwardOf = Forward<kMix, kCount, T>;
#endif

// Accumulators: sum g; sum g c_k a quantizer (of an identity member sum g x); then what kSte, the most that any member asks
// for, adds a quantizer: below and above, and inside. kStores: grad_x is wanted.
template <Mix kMix, int kCount, Ste kSte, bool kStores, class T>
struct Backward : Members<kMix, kCount, kSte == Ste::kIdentity, kStores ? Weights::kNone : Weights::kSteps> {
  using Base = Members<kMix, kCount, kSte == Ste::kIdentity, kStores ? Weights::kNone : Weights::kSteps>;
  static constexpr int kSize = Base::kSize;
  static constexpr int kRangeSums = kSte == Ste::kFull ? 3 : kSte == Ste::kClip ? 2 : 0;
  static constexpr int kSums = 1 + kSize * (1 + kRangeSums);
  const T* grad;
  const T* x;
  Results<T> out;
  Vec slope;            // without clips the same for every element
  Mask passing[kSize];  // all lanes for members whose estimator passes every gradient

  Backward(const AttentionArgs& args, const Walk& walk)
      : Base(args),
        grad(static_cast<const T*>(args.grad)),
        x(static_cast<const T*>(args.x)),
        out(args.out, args.layout, walk),
        slope(splat(0.0f)) {
    for (int k = 0; k < this->size(); ++k) {
      slope = slope + this->attention[k];
      passing[k] = first_lanes(args.stes[k] == Ste::kIdentity ? kLanes : 0);
    }
  }

  template <Reach kReach>
  void prefetch(int64_t i) const {
    prefetch_line<kReach>(x + i);
    prefetch_line<kReach>(grad + i);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const typename Base::Params& p, Vec* sums) const {
    const Vec g = load(grad + i, lanes), passed = accumulate(g, load(x + i, lanes), p, sums);
    if constexpr (kStores) out.put(i, g * passed, lanes);
  }

 protected:
  // Returns what part of g the members pass.
  Vec accumulate(Vec g, Vec value, const typename Base::Params& p, Vec* sums) const {
    const Vec shared = Base::shared(value, p);
    sums[0] = sums[0] + g;
    Vec passed = kSte == Ste::kIdentity ? slope : splat(0.0f);
    for (int k = 0; k < this->size(); ++k) {
      const Vec code = this->code(k, value, shared, p);
      sums[1 + k] = multiply_add(g, code, sums[1 + k]);
      if constexpr (kSte != Ste::kIdentity)
        passed = add_where(passed, clip(k, g, shared, code, p, sums + 1 + kSize + kRangeSums * k), this->attention[k]);
    }
    return passed;
  }

  // Where the straight-through estimator of member k lets the gradient pass. Sums that member k has no use for are added,
  // too: a branch here would keep all of them out of registers.
  Mask clip(int k, Vec g, Vec shared, Vec code, const typename Base::Params& p, Vec* sums) const {
    const Vec zero = splat(0.0f), levels = this->levels[k], position = this->position(k, shared, p);
    sums[0] = add_where(sums[0], less(position, zero), g);
    sums[1] = add_where(sums[1], less_equal(levels, position), g);
    if constexpr (kSte == Ste::kFull) sums[2] = multiply_add(g, code - clamp_code(position, levels), sums[2]);
    return either(passing[k], both(less_equal(zero, position), less_equal(position, levels)));
  }
};

// Where the gradient of the attention is all that is wanted. In columns its totals are the products <g, Q_k>, but for what
// members on one range have in common, <g, offset>, which comes last.
template <Mix kMix, int kCount, class T>
struct Gradient : Backward<kMix, kCount, Ste::kIdentity, false, T> {
  using Base = Backward<kMix, kCount, Ste::kIdentity, false, T>;
  using Base::Base;
  static constexpr int kTotals = Base::kSize + 1;
  static constexpr int kRows = std::is_same_v<T, Half> && !kWholeVectors ? 6 : 4;

  struct Elements {
    Vec grad, x;
  };
  template <class Lanes>
  Elements read(int64_t i, Lanes lanes) const
    requires(kWholeVectors && std::is_same_v<T, float>)
  {
    return {load_first(this->grad + i, lanes), load_first(this->x + i, lanes)};
  }
  void add_up(Elements from, const typename Base::Params& p, Vec* sums) const {
    this->accumulate(from.grad, from.x, p, sums);
  }

  QK_INLINED void weigh(const typename Base::Params& p, const Vec* sums, Vec* totals) const {
    if (Base::kOneRange) totals[Base::kSize] = multiply_add(sums[0], p.offset[0], totals[Base::kSize]);
    for (int k = 0; k < this->size(); ++k) {
      if (!Base::kOneRange) totals[k] = multiply_add(sums[0], p.offset[k], totals[k]);
      totals[k] = multiply_add(sums[1 + k], p.weight[k], totals[k]);
    }
  }
};

#if defined(__AVX512F__)
// Of half types 32 elements at a time, of Half on one range.
template <Mix kMix, int kCount, class T>
struct GradientOfPairs : Gradient<kMix, kCount, T> {
  using Base = Gradient<kMix, kCount, T>;
  using Params = typename Base::Params;
  using Base::Base;
  static constexpr bool kByHalves = std::is_same_v<T, Half> && !kWholeVectors;
  using Part = std::conditional_t<kByHalves, Vec8, Vec>;
  struct Pairs {
    Part sums[Base::kSums][kByHalves ? kEights : 2]{};
  };

  template <bool>
  void add(int64_t i, const Params& first, const Params& second, Pairs& to) const {
    if constexpr (kByHalves) {
      unrolled<kEights>([&](int q) QK_INLINED {
        const Vec8 g = load_eight(this->grad + i + 8 * q), value = load_eight(this->x + i + 8 * q);
        Vec8 distance = value - part({first.offset[0], second.offset[0]}, q);
        if constexpr (kMix == Mix::kSharedRange)
          distance = min(part({first.bound[0], second.bound[0]}, q), max(Vec8{}, distance));
        to.sums[0][q] = to.sums[0][q] + g;
        for (int k = 0; k < this->size(); ++k) {
          const Vec8 code = round_to_even(distance * part({first.inverse[k], second.inverse[k]}, q));
          to.sums[1 + k][q] = multiply_add(g, code, to.sums[1 + k][q]);
        }
      });
    } else {
      const TwoVecs g = widen(load_bits(this->grad + i), this->grad), value = widen(load_bits(this->x + i), this->x);
      const auto accumulate = [&](int n, Vec g, Vec value, const Params& p) QK_INLINED {
        Vec sums[Base::kSums];
        unrolled<Base::kSums>([&](int s) QK_INLINED { sums[s] = to.sums[s][n]; });
        Base::accumulate(g, value, p, sums);
        unrolled<Base::kSums>([&](int s) QK_INLINED { to.sums[s][n] = sums[s]; });
      };
      accumulate(0, g.first, value.first, first);
      accumulate(1, g.second, value.second, second);
    }
  }
  // In columns parts of Half would need more registers than there are.
  template <Reach kReach>
  void prefetch_pair(int64_t i) const
    requires(!kByHalves)
  {
    prefetch_line<kReach>(this->x + i);
    prefetch_line<kReach>(this->grad + i);
  }
  QK_INLINED void totals(const Pairs& from, float* of_run) const {
    unrolled<(Base::kSums + 1) / 2>([&](int n) QK_INLINED {
      const int s = 2 * n, next = std::min(s + 1, Base::kSums - 1);
      const TwoSums two = lane_sums(sum_of(from.sums[s]), sum_of(from.sums[next]));
      of_run[s] = two.first;
      if (next != s) of_run[next] = two.second;
    });
  }
  QK_INLINED void finish(const Pairs& from, Vec (&sums)[2][Base::kSums + 1]) const {
    unrolled<Base::kSums>([&](int s) QK_INLINED {
      TwoVecs two;
      if constexpr (kByHalves) {
        two = joined(from.sums[s]);
      } else {
        two = in_order({from.sums[s][0], from.sums[s][1]}, this->x);
      }
      sums[0][s] = two.first;
      sums[1][s] = two.second;
    });
  }
};
template <Mix kMix, int kCount, class T>
using GradientOf = std::conditional_t<kInPairs<T> || (std::is_same_v<T, Half> && on_one_range(kMix)),
                                      GradientOfPairs<kMix, kCount, T>, Gradient<kMix, kCount, T>>;
#else
template <Mix kMix, int kCount, class T>
using GradientOf = Gradient<kMix, kCount, T>;
#endif

// The grids column by column, so that what is done for each channel at each call is done for many at a time.
class GridColumns {
 public:
  explicit GridColumns(const AttentionArgs& args)
      : channels_(args.layout.channels), values_(args.count * kGridColumns * channels_) {
    for (int64_t k = 0; k < args.count; ++k) {
      const float* __restrict const grid = args.grids + k * channels_ * kGridColumns;
      float* __restrict const offset = column(k, 0), * __restrict const step = column(k, 1);
      float* __restrict const threshold = column(k, 2);
      for (int64_t c = 0; c < channels_; ++c) {
        offset[c] = grid[c * kGridColumns];
        step[c] = grid[c * kGridColumns + 1];
        threshold[c] = grid[c * kGridColumns + 2];
      }
    }
  }

  const float* offset(int64_t k) const { return column(k, 0); }
  const float* step(int64_t k) const { return column(k, 1); }
  const float* threshold(int64_t k) const { return column(k, 2); }

 private:
  float* column(int64_t k, int64_t which) const { return values_.data() + (k * kGridColumns + which) * channels_; }

  int64_t channels_;
  Buffer<float> values_;
};

// Whether the range of member k begins with that of member 0 in every channel and ends with it, to well within half of its
// step, and whether its steps have inverses. Without branches or divisions: it is done for each channel at each call.
bool shares_range(const AttentionArgs& args, const GridColumns& grids, int64_t k) {
  constexpr float kLeast = std::numeric_limits<float>::min(), kMost = 1.0f / kLeast;
  const float *const offset = grids.offset(k), *const step = grids.step(k);
  const float *const first_offset = grids.offset(0), *const first_step = grids.step(0);
  const auto levels = static_cast<float>(args.levels[k]), first_levels = static_cast<float>(args.levels[0]);
  int apart = 0;
  for (int64_t c = 0; c < args.layout.channels; ++c) {
    const float difference = std::abs(first_step[c] * first_levels - step[c] * levels);
    const bool shared =
        (offset[c] == first_offset[c]) & (step[c] >= kLeast) & (step[c] <= kMost) & (difference < 0.25f * step[c]);
    apart |= !shared;
  }
  return !apart;
}

Mix mix_of(const AttentionArgs& args, const GridColumns& grids) {
  bool shared = true;
  for (int64_t k = 0; k < args.count; ++k) {
    if (args.kinds[k] != Kind::kUniform) return Mix::kAny;
    shared = shared && shares_range(args, grids, k);
  }
  return !shared ? Mix::kUniform : args.covered ? Mix::kCovered : Mix::kSharedRange;
}

ChannelTable members_table(const AttentionArgs& args, const Walk& walk, const GridColumns& grids, const Fields& fields) {
  return ChannelTable(args.layout, walk, fields.size(), [&](const auto& field) {
    const int64_t channels = args.layout.channels;
    const bool mixture = fields.weights == Weights::kMixture;
    if (mixture) std::fill_n(field(fields.base()), channels, 0.0f);
    for (int k = 0; k < args.count; ++k) {
      const float* __restrict const offset = grids.offset(k), * __restrict const step = grids.step(k);
      float* __restrict const inverse = field(fields.inverse(k));
      for (int64_t c = 0; c < channels; ++c) inverse[c] = inverse_step(step[c]);
      const bool identity = args.kinds[k] == Kind::kIdentity;
      if (mixture) {
        const float attention = args.attention[k];
        float* __restrict const base = field(fields.base()), * __restrict const weight = field(fields.weight(k));
        for (int64_t c = 0; c < channels; ++c) base[c] = identity ? base[c] : base[c] + attention * offset[c];
        for (int64_t c = 0; c < channels; ++c) weight[c] = identity ? attention : attention * step[c];
      } else if (fields.weights == Weights::kSteps) {
        float* const weight = field(fields.weight(k));
        identity ? std::fill_n(weight, channels, 1.0f) : std::copy_n(step, channels, weight);
      }
      if (k >= fields.ranges()) continue;
      float* const first = field(fields.offset(k));
      identity ? std::fill_n(first, channels, 0.0f) : std::copy_n(offset, channels, first);
      if (!fields.bounds()) continue;
      float* __restrict const bound = field(fields.bound(k));
      const auto levels = static_cast<float>(args.levels[k]);
      const bool uniform = args.kinds[k] == Kind::kUniform;
      const float* __restrict const threshold = grids.threshold(k);
      for (int64_t c = 0; c < channels; ++c) bound[c] = uniform ? step[c] * levels : threshold[c];
    }
  });
}

// Calls f.template operator()<mix, count>(); counts that the papers use are unrolled.
template <class F>
void with_members(const AttentionArgs& args, Mix mix, const F& f) {
  const auto with_count = [&]<Mix kMix>() {
    switch (args.count) {
      case 2:
        return f.template operator()<kMix, 2>();
      case 3:
        return f.template operator()<kMix, 3>();
      default:
        return f.template operator()<kMix, 0>();
    }
  };
  switch (mix) {
    case Mix::kCovered:
      return with_count.template operator()<Mix::kCovered>();
    case Mix::kSharedRange:
      return with_count.template operator()<Mix::kSharedRange>();
    case Mix::kUniform:
      return with_count.template operator()<Mix::kUniform>();
    case Mix::kAny:
      return with_count.template operator()<Mix::kAny>();
  }
}

// sum_c a[c] * b[c]: several sums, for an addition of doubles takes as long as several of them.
double dot(const float* a, const double* b, int64_t count) {
  constexpr int kSums = 16;
  double sums[kSums] = {};
  int64_t c = 0;
  for (; c + kSums <= count; c += kSums)
    for (int s = 0; s < kSums; ++s) sums[s] += a[c + s] * b[c + s];
  for (; c < count; ++c) sums[0] += a[c] * b[c];
  return std::accumulate(sums, sums + kSums, 0.0);
}

// totals: the accumulators of Backward, [kSums][channels].
void finish_backward(const AttentionArgs& args, const GridColumns& grids, const std::vector<double>& totals, int size,
                     int range_sums) {
  const int64_t channels = args.layout.channels;
  for (int64_t k = 0; k < args.count; ++k) {
    const double* const with_code = totals.data() + (1 + k) * channels;
    const double product = args.kinds[k] == Kind::kIdentity  // <g, Q_k>
                               ? std::accumulate(with_code, with_code + channels, 0.0)
                               : dot(grids.offset(k), totals.data(), channels) + dot(grids.step(k), with_code, channels);
    args.grad_attention[k] = static_cast<float>(product);
    if (!args.sums) continue;
    const int used = args.stes[k] == Ste::kFull ? 3 : args.stes[k] == Ste::kClip ? 2 : 0;
    for (int64_t c = 0; c < channels; ++c)
      for (int s = 0; s < 3; ++s)
        args.sums[(k * channels + c) * 3 + s] =
            s < used ? static_cast<float>(totals[(1 + size + range_sums * k + s) * channels + c]) : 0.0f;
  }
}

// totals: of Gradient in columns.
void finish_gradient(const AttentionArgs& args, const std::vector<double>& totals, int size) {
  for (int64_t k = 0; k < args.count; ++k) args.grad_attention[k] = static_cast<float>(totals[k] + totals[size]);
}

}  // namespace

void attention_quantize_forward(const AttentionArgs& args) {
  const Walk walk = walk_of(args.layout, args.dtype);
  const GridColumns grids(args);
  const Mix mix = mix_of(args, grids);
  const ChannelTable table = members_table(args, walk, grids, {static_cast<int>(args.count), mix, Weights::kMixture});
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, mix, [&]<Mix kMix, int kCount>() {
      const auto run = [&](const auto& op) { traverse(args.layout, walk, table, op); };
#if defined(__AVX512F__)
      if constexpr (kMix == Mix::kCovered && !std::is_same_v<T, float>) {
        using Op = LookupForward<kCount, T>;
        if (Op::suits(args, walk)) {
          typename Op::Codes codes;
          return run(Op(args, walk, codes));
        }
      }
#endif
      run(ForwardOf<kMix, kCount, T>(args, walk));
    });
  });
}

void attention_quantize_backward(const AttentionArgs& args) {
  const Walk walk = walk_of(args.layout, args.dtype);
  const GridColumns grids(args);
  const Mix mix = mix_of(args, grids);
  const Weights weights = args.out ? Weights::kNone : Weights::kSteps;
  const ChannelTable table = members_table(args, walk, grids, {static_cast<int>(args.count), mix, weights});
  const Ste most = *std::max_element(args.stes, args.stes + args.count);
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, mix, [&]<Mix kMix, int kCount>() {
      const auto run_op = [&]<class Op>(Op*) {
        const std::vector<double> totals = traverse(args.layout, walk, table, Op(args, walk));
        if (Weighs<Op> && walk.by_columns) return finish_gradient(args, totals, Op::kSize);
        finish_backward(args, grids, totals, Op::kSize, Op::kRangeSums);
      };
      const auto run = [&]<Ste kSte>() { run_op(static_cast<Backward<kMix, kCount, kSte, true, T>*>(nullptr)); };
      if (!args.out) return run_op(static_cast<GradientOf<kMix, kCount, T>*>(nullptr));
      if constexpr (kMix != Mix::kCovered) switch (most) {
          case Ste::kIdentity:
            return run.template operator()<Ste::kIdentity>();
          case Ste::kClip:
            return run.template operator()<Ste::kClip>();
          case Ste::kFull:
            return run.template operator()<Ste::kFull>();
        }
    });
  });
}

}  // namespace qk::cpu::QK_CPU_ISA

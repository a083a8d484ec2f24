// q = sum_k a_k Q_k(x) in the domain of codes (DQA, equation 3): q = base + sum_k w_k c_k with base = sum_k a_k offset_k and
// w_k = a_k step_k, so that one element costs a code and a multiply-add a quantizer. Its gradient needs no Q_k either:
// <g, Q_k> = offset_k sum g + step_k sum g c_k.

#include "cpu/attention.h"

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

// Fields of the ChannelTable: base, then four a quantizer.
inline constexpr int kFields = 4;

// kCount quantizers; 0: any number up to kMaxQuantizers, told at run time. kClamped: nobody asks for a position out of
// range. Clamping commutes with the multiplication by an inverse step that is positive, so members on one range share it.
template <Mix kMix, int kCount, bool kClamped>
struct Members {
  static constexpr int kSize = kCount ? kCount : kMaxQuantizers;
  static constexpr bool kOneRange = kMix == Mix::kCovered || kMix == Mix::kSharedRange;
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
    Params p;
    p.base = field(0);
    for (int k = 0; k < size(); ++k) {
      p.offset[k] = field(1 + kFields * k);
      p.inverse[k] = field(2 + kFields * k);
      p.weight[k] = field(3 + kFields * k);
      p.bound[k] = field(4 + kFields * k);
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
           no_subnormals(grid_row(args, k, 0), args.layout.channels, args.attention[k]);
  return none;
}

template <Mix kMix, int kCount, class T>
struct Forward : Members<kMix, kCount, true> {
  using Base = Members<kMix, kCount, true>;
  static constexpr int kSums = 0;
  const T* x;
  Results<T> out;

  Forward(const AttentionArgs& args, const Walk& walk)
      : Base(args),
        x(static_cast<const T*>(args.x)),
        out(args.out, args.layout, walk, kInPairs<T> && no_subnormal_mixtures(args)) {}

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const typename Base::Params& p, Vec*) const {
    out.put(i, mixture(load(x + i, lanes), p), lanes);
  }

  void pair(int64_t i, const typename Base::Params& p, Vec*, Vec*) const
    requires kInPairs<T>
  {
    out.put_pair(i, mixture(load(x + i), p), mixture(load(x + i + kLanes), p));
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
// The forward of half types by a table, where a code of the finest member tells the codes of all others. With levels like
// those of 2, 4 and 8 bits, which divide each other to odd numbers, codes of a coarser member change where one of the finest
// does, but for rounding errors. These matter to a few numbers of the half type, which are found out.
template <int kCount, class T>
struct LookupForward : Forward<Mix::kCovered, kCount, T> {
  using Base = Forward<Mix::kCovered, kCount, T>;
  static constexpr int64_t kShortest = 2048;  // elements of a run that are worth a table
  struct Params : Base::Params {
    CodeTable table;
    Exceptions<T> exceptions;
    bool usable;
  };

  LookupForward(const AttentionArgs& args, const Walk& walk) : Base(args, walk) {
    for (int k = 0; k < this->size(); ++k) {
      levels_[k] = static_cast<float>(args.levels[k]);
      if (levels_[k] > levels_[finest_]) finest_ = k;
    }
    for (int k = 0; k < this->size(); ++k) ratio_[k] = splat(levels_[k] / levels_[finest_]);
  }

  static bool suits(const AttentionArgs& args, const Walk& walk) {
    const int64_t* const end = args.levels + args.count;
    const int64_t most = *std::max_element(args.levels, end);
    return !walk.by_columns && args.layout.inner >= kShortest &&
           std::all_of(args.levels, end, [&](int64_t n) { return n == most || most % (2 * n) == n; });
  }

  template <class Field>
  Params params(Field field) const {
    Params p;
    static_cast<typename Base::Params&>(p) = Base::params(field);
    p.usable = true;
    for (int k = 0; k < this->size(); ++k) p.usable = p.usable && follows(k, p);
    if (p.usable) fill(p);
    return p;
  }

  int64_t run(int64_t i, int64_t end, const Params& p) const {
    if (!p.usable) return i;
    const int count = p.exceptions.count;
    return count == 0 ? look_up_all<0>(i, end, p) : count <= 2 ? look_up_all<2>(i, end, p) : look_up_all<4>(i, end, p);
  }

 private:
  template <int kExceptions>
  int64_t look_up_all(int64_t i, int64_t end, const Params& p) const {
    const auto put = [&](int64_t at, __m512i packed) {
      this->out.put_bits(at, p.exceptions.template apply<kExceptions>(in_order(packed, this->x), load_bits(this->x + at)));
    };
    constexpr int64_t kHalf = kLookup / 2;
    for (; i + kLookup <= end; i += kLookup) {
      const __m512i codes = _mm512_packus_epi16(finest_codes(i, p), finest_codes(i + kHalf, p));
      const __m512i low = look_up(p.table.low, codes), high = look_up(p.table.high, codes);
      put(i, _mm512_unpacklo_epi8(low, high));
      put(i + kHalf, _mm512_unpackhi_epi8(low, high));
    }
    return i;
  }

  // Of 32 elements, packed.
  QK_INLINED __m512i finest_codes(int64_t i, const Params& p) const {
    const auto values = load_to_pack(this->x + i);
    const auto code = [&](Vec value) { return _mm512_cvtps_epi32(this->position(finest_, Base::shared(value, p), p).v); };
    return _mm512_packus_epi32(code(values.first), code(values.second));
  }

  // Never half-way between two codes, for the ratio is 1 to an odd number.
  Vec following(int k, Vec finest) const { return round_to_even(finest * ratio_[k]); }

  // Whether the codes of member k follow for all numbers of the half type but a few.
  bool follows(int k, Params& p) const {
    const auto code = [&](int member, Vec x) { return this->code(member, x, Base::shared(x, p), p); };
    bool all = true;
    for (float first = 1; first <= levels_[k] && k != finest_; first += kLanes) {
      const Vec codes = min(splat(levels_[k]), count_from(first));
      const Vec boundary = p.offset[k] + (codes - splat(0.5f)) * (p.bound[k] * splat(1.0f / levels_[k]));
      all = all && rise_together<T>(
                       codes, boundary, [&](Vec x) { return code(k, x); },
                       [&](Vec x) { return following(k, code(finest_, x)); }, p.exceptions);
    }
    return all;
  }

  Vec mixture_at(Vec finest, const Params& p) const {
    Vec q = p.base;
    for (int k = 0; k < this->size(); ++k) q = q + p.weight[k] * (k == finest_ ? finest : following(k, finest));
    return q;
  }

  void fill(Params& p) const {
    T results[2 * kLanes];
    Results<T> into = this->out;
    into.data = results;
    into.streams = false;
    for (int first = 0; first <= levels_[finest_]; first += 2 * kLanes) {
      const float code = static_cast<float>(first);
      into.put_pair(0, mixture_at(count_from(code), p), mixture_at(count_from(code + kLanes), p));
      p.table.set(first, load_bits(results));
    }
    Exceptions<T>& own = p.exceptions;
    std::fill(own.numbers + own.count, own.numbers + kLanes, own.count ? own.numbers[0] : T{});
    store(own.results, this->mixture(load(own.numbers), p));
  }

  int finest_ = 0;
  float levels_[Base::kSize];
  Vec ratio_[Base::kSize];
};
#endif

// Accumulators: sum g; sum g c_k a quantizer (of an identity member sum g x); then what kSte, the most that any member asks
// for, adds a quantizer: below and above, and inside. kStores: grad_x is wanted.
template <Mix kMix, int kCount, Ste kSte, bool kStores, class T>
struct Backward : Members<kMix, kCount, kSte == Ste::kIdentity> {
  using Base = Members<kMix, kCount, kSte == Ste::kIdentity>;
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

  template <int kVectors>
  void prefetch(int64_t i) const {
    prefetch_elements<kVectors * kLanes>(x + i);
    prefetch_elements<kVectors * kLanes>(grad + i);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const typename Base::Params& p, Vec* sums) const {
    const Vec g = load(grad + i, lanes), passed = accumulate(g, load(x + i, lanes), p, sums);
    if constexpr (kStores) out.put(i, g * passed, lanes);
  }

  void pair(int64_t i, const typename Base::Params& p, Vec* sums, Vec* more_sums) const
    requires(kInPairs<T> && !kStores)
  {
    const auto g = widen(load_bits(grad + i), grad), value = widen(load_bits(x + i), x);
    accumulate(g.first, value.first, p, sums);
    accumulate(g.second, value.second, p, more_sums);
  }

 private:
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

float range_of(const AttentionArgs& args, int64_t k, int64_t c) {
  return grid_row(args, k, c)[1] * static_cast<float>(args.levels[k]);
}

// Whether the range of member k begins with that of member 0 in every channel and ends with it, to well within half of its
// step, and whether its steps have inverses. Without branches or divisions: it is done for each channel at each call.
bool shares_range(const AttentionArgs& args, int64_t k) {
  constexpr float kLeast = std::numeric_limits<float>::min(), kMost = 1.0f / kLeast;
  bool shared = true;
  for (int64_t c = 0; c < args.layout.channels; ++c) {
    const float offset = grid_row(args, k, c)[0], step = grid_row(args, k, c)[1];
    const bool ends = std::abs(range_of(args, 0, c) - range_of(args, k, c)) < 0.25f * step;
    shared &= (offset == grid_row(args, 0, c)[0]) & (step >= kLeast) & (step <= kMost) & ends;
  }
  return shared;
}

ChannelTable members_table(const AttentionArgs& args, const Walk& walk) {
  const int fields = 1 + kFields * static_cast<int>(args.count);
  return ChannelTable(args.layout, walk, fields, [&](const auto& field) {
    const int64_t channels = args.layout.channels;
    float* const base = field(0);  // the table begins with zeros
    for (int64_t k = 0; k < args.count; ++k) {
      const int first = 1 + kFields * static_cast<int>(k);
      float *const offset = field(first), *const inverse = field(first + 1), *const weight = field(first + 2);
      float* const bound = field(first + 3);
      const float attention = args.attention[k];
      const bool identity = args.kinds[k] == Kind::kIdentity, uniform = args.kinds[k] == Kind::kUniform;
      for (int64_t c = 0; c < channels; ++c) {
        const float* const row = grid_row(args, k, c);
        if (!identity) base[c] = base[c] + attention * row[0];
        offset[c] = row[0];
        inverse[c] = inverse_step(row[1]);
        weight[c] = identity ? attention : attention * row[1];
        bound[c] = uniform ? range_of(args, k, c) : row[2];
      }
    }
  });
}

Mix mix_of(const AttentionArgs& args) {
  bool shared = true;
  for (int64_t k = 0; k < args.count; ++k) {
    if (args.kinds[k] != Kind::kUniform) return Mix::kAny;
    shared = shared && shares_range(args, k);
  }
  return !shared ? Mix::kUniform : args.covered ? Mix::kCovered : Mix::kSharedRange;
}

// Calls f.template operator()<mix, count>(); counts that the papers use are unrolled.
template <class F>
void with_members(const AttentionArgs& args, const F& f) {
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
  switch (mix_of(args)) {
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

// totals: the accumulators of Backward, [kSums][channels].
void finish_backward(const AttentionArgs& args, const std::vector<double>& totals, int size, int range_sums) {
  const int64_t channels = args.layout.channels;
  for (int64_t k = 0; k < args.count; ++k) {
    double product = 0.0;  // <g, Q_k>
    for (int64_t c = 0; c < channels; ++c) {
      const float* const row = grid_row(args, k, c);
      const double with_code = totals[(1 + k) * channels + c];
      product += args.kinds[k] == Kind::kIdentity ? with_code : row[0] * totals[c] + row[1] * with_code;
      if (!args.sums) continue;
      const int used = args.stes[k] == Ste::kFull ? 3 : args.stes[k] == Ste::kClip ? 2 : 0;
      for (int s = 0; s < 3; ++s)
        args.sums[(k * channels + c) * 3 + s] =
            s < used ? static_cast<float>(totals[(1 + size + range_sums * k + s) * channels + c]) : 0.0f;
    }
    args.grad_attention[k] = static_cast<float>(product);
  }
}

}  // namespace

void attention_quantize_forward(const AttentionArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = members_table(args, walk);
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, [&]<Mix kMix, int kCount>() {
      const auto run = [&]<class Op>(Op*) { traverse(args.layout, walk, table, Op(args, walk)); };
#if defined(__AVX512F__)
      if constexpr (kMix == Mix::kCovered && !std::is_same_v<T, float>) {
        using Op = LookupForward<kCount, T>;
        if (Op::suits(args, walk)) return run(static_cast<Op*>(nullptr));
      }
#endif
      run(static_cast<Forward<kMix, kCount, T>*>(nullptr));
    });
  });
}

void attention_quantize_backward(const AttentionArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = members_table(args, walk);
  const Ste most = *std::max_element(args.stes, args.stes + args.count);
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, [&]<Mix kMix, int kCount>() {
      const auto run = [&]<Ste kSte, bool kStores = true>() {
        using Op = Backward<kMix, kCount, kSte, kStores, T>;
        finish_backward(args, traverse(args.layout, walk, table, Op(args, walk)), Op::kSize, Op::kRangeSums);
      };
      if (!args.out) return run.template operator()<Ste::kIdentity, false>();
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

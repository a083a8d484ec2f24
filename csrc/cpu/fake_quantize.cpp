// q = offset + step * code(x), and its straight-through gradient with the three sums that every range gradient is made of.

#include "cpu/fake_quantize.h"

#include <atomic>
#include <bit>

#include "core/bitplanes.h"
#include "cpu/grid.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

template <Kind kKind, class T>
struct Forward {
  static constexpr int kSums = 0;
  const T* x;
  Results<T> out;
  Vec levels;

  template <class Field>
  GridVec params(Field field) const {
    return grid_params(field);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const GridVec& grid, Vec*) const {
    out.put(i, quantized(i, lanes, grid), lanes);
  }

  void pair(int64_t i, const GridVec& low, const GridVec& high) const
    requires kInPairs<T>
  {
    out.put_pair(i, quantized(i, Whole{}, low), quantized(i + kLanes, Whole{}, high));
  }

 private:
  template <class Lanes>
  Vec quantized(int64_t i, Lanes lanes, const GridVec& grid) const {
    return grid.offset + grid.step * code_of<kKind>(load(x + i, lanes), grid, levels);
  }
};

template <Ste kSte, bool kAdds, class T>
struct Backward {
  static constexpr int kSums = !kAdds ? 0 : kSte == Ste::kFull ? 3 : kSte == Ste::kClip ? 2 : 0;  // below, above, inside
  const T* grad;
  const T* x;
  Results<T> out;
  Vec levels;

  template <class Field>
  GridVec params(Field field) const {
    return grid_params(field);
  }

  template <Reach kReach>
  void prefetch(int64_t i) const {
    prefetch_line<kReach>(x + i);
    prefetch_line<kReach>(grad + i);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const GridVec& grid, Vec* sums) const {
    const Vec g = load(grad + i, lanes), zero = splat(0.0f);
    if constexpr (kSte == Ste::kIdentity) return out.put(i, g, lanes);
    const Vec position = position_of(load(x + i, lanes), grid);
    if constexpr (kSums >= 2) {
      sums[0] = add_where(sums[0], less(position, zero), g);
      sums[1] = add_where(sums[1], less_equal(levels, position), g);
    }
    if constexpr (kSums == 3) {
      // Outside the range the clamped position is a whole number, so this term vanishes there by itself.
      const Vec clamped = clamp_code(position, levels);
      sums[2] = multiply_add(g, round_to_even(clamped) - clamped, sums[2]);
    }
    out.put_where(i, both(less_equal(zero, position), less_equal(position, levels)), grad + i, lanes);
  }
};

static_assert(std::endian::native == std::endian::little, "byte i / 8 of the words holds bit i");

// One bit an element, in memory order. Vectors that begin at whole bytes write theirs; where channels end inside a byte, its
// writers are several, and set bits in words that are zero before.
class Bits {
 public:
  Bits(int32_t* words, const Layout& layout, const Walk& walk)
      : words_(reinterpret_cast<uint32_t*>(words)), bytes_(reinterpret_cast<uint8_t*>(words)) {
    whole_bytes_ = walk.rows == 1 || (walk.by_columns ? walk.period : layout.inner) % 8 == 0;
    const int64_t count = words_of(layout.numel());
    if (whole_bytes_) {
      words_[count - 1] = 0;  // its last bytes may be nobody's
    } else {
      std::fill_n(words_, count, 0);
    }
  }

  void put(int64_t i, uint32_t bits, Whole) const {
    if (whole_bytes_) {
      std::memcpy(bytes_ + (i >> 3), &bits, kLanes / 8);
    } else {
      set(i, bits);
    }
  }
  void put(int64_t i, uint32_t bits, First lanes) const {
    bits &= (1u << lanes.n) - 1;
    if (whole_bytes_) {
      std::memcpy(bytes_ + (i >> 3), &bits, (lanes.n + 7) / 8);
    } else {
      set(i, bits);
    }
  }

 private:
  void set(int64_t i, uint32_t bits) const {
    const uint64_t both = uint64_t{bits} << i % kWordBits;
    const auto low = static_cast<uint32_t>(both), high = static_cast<uint32_t>(both >> kWordBits);
    uint32_t* const word = words_ + i / kWordBits;
    if (low) std::atomic_ref<uint32_t>(word[0]).fetch_or(low, std::memory_order_relaxed);
    if (high) std::atomic_ref<uint32_t>(word[1]).fetch_or(high, std::memory_order_relaxed);
  }

  uint32_t* words_;
  uint8_t* bytes_;
  bool whole_bytes_;
};

template <class T>
struct MaskedForward {
  static constexpr int kSums = 0;
  const T* x;
  Results<T> out;
  Bits bits;
  Vec levels;

  template <class Field>
  GridVec params(Field field) const {
    return grid_params(field);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const GridVec& grid, Vec*) const {
    out.ask_ahead(x + i);
    out.put(i, quantized(i, lanes, grid), lanes);
  }

  void pair(int64_t i, const GridVec& low, const GridVec& high) const
    requires kInPairs<T>
  {
    out.ask_ahead(x + i);
    const Vec first = quantized(i, Whole{}, low), second = quantized(i + kLanes, Whole{}, high);
    out.put_pair(i, first, second);
  }

 private:
  template <class Lanes>
  Vec quantized(int64_t i, Lanes lanes, const GridVec& grid) const {
    const Vec position = position_of(load(x + i, lanes), grid), clamped = clamp_code(position, levels);
    bits.put(i, bits_of(equal(position, clamped)), lanes);  // never of a NaN
    return grid.offset + grid.step * round_to_even(clamped);
  }
};

// T: an unsigned integer as wide as an element, for nothing is computed.
template <class T>
void apply_mask_to(const ApplyMaskArgs& args) {
  constexpr int kElements = sizeof(Vec) / sizeof(T), kElementsALane = sizeof(float) / sizeof(T);
  const Layout flat{1, 1, args.numel / kElementsALane};  // of lanes
  const Walk walk = walk_of(flat);
  const int64_t count = (args.numel + kPiece - 1) / kPiece;
  parallel_for(count, 1, [&](int64_t begin, int64_t end) {
    const Results<float> out(args.out, flat, walk);
    const T* const grad = static_cast<const T*>(args.grad);
    const auto* const bytes = reinterpret_cast<const uint8_t*>(args.mask);
    const int64_t last = std::min(end * kPiece, args.numel);
    int64_t i = begin * kPiece;
#pragma GCC unroll 4
    for (; i + kElements <= last; i += kElements) {
      out.ask_ahead(reinterpret_cast<const float*>(grad + i));
      uint32_t bits = 0;
      std::memcpy(&bits, bytes + i / 8, kElements / 8);
      out.put(i / kElementsALane, load_where(grad + i, bits), Whole{});
    }
    for (; i < last; ++i) static_cast<T*>(args.out)[i] = bytes[i / 8] >> i % 8 & 1 ? grad[i] : T{0};
    finish_streams();
  });
}

template <class T>
Results<T> quantized_results(const FakeQuantizeArgs& args, const Walk& walk) {
  // Of whole rows: thresholds as well, for the sake of vectors.
  return {args.out, args.layout, walk, kInPairs<T> && no_subnormals(args.grid, args.layout.channels * kGridColumns)};
}

}  // namespace

void fake_quantize_forward(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = grid_table(args.layout, walk, args.grid);
  const Vec levels = splat(static_cast<float>(args.levels));
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      traverse(args.layout, walk, table,
               Forward<kKind, T>{static_cast<const T*>(args.x), quantized_results<T>(args, walk), levels});
    });
  });
}

void fake_quantize_backward(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = grid_table(args.layout, walk, args.grid);
  const Vec levels = splat(static_cast<float>(args.levels));
  with_type(args.dtype, [&]<class T>(T*) {
    const auto run = [&]<Ste kSte, bool kAdds = true>() {
      using Op = Backward<kSte, kAdds, T>;
      const std::vector<double> totals = traverse(args.layout, walk, table,
                                                  Op{static_cast<const T*>(args.grad), static_cast<const T*>(args.x),
                                                     Results<T>(args.out, args.layout, walk), levels});
      if (!args.sums) return;
      for (int64_t c = 0; c < args.layout.channels; ++c)
        for (int s = 0; s < 3; ++s)
          args.sums[c * 3 + s] = s < Op::kSums ? static_cast<float>(totals[s * args.layout.channels + c]) : 0.0f;
    };
    if (!args.sums && args.ste != Ste::kIdentity) return run.template operator()<Ste::kClip, false>();
    switch (args.ste) {
      case Ste::kIdentity:
        return run.template operator()<Ste::kIdentity>();
      case Ste::kClip:
        return run.template operator()<Ste::kClip>();
      case Ste::kFull:
        return run.template operator()<Ste::kFull>();
    }
  });
}

void fake_quantize_masked(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = grid_table(args.layout, walk, args.grid);
  const Vec levels = splat(static_cast<float>(args.levels));
  with_type(args.dtype, [&]<class T>(T*) {
    traverse(args.layout, walk, table,
             MaskedForward<T>{static_cast<const T*>(args.x), quantized_results<T>(args, walk),
                              Bits(args.mask, args.layout, walk), levels});
  });
}

void apply_mask(const ApplyMaskArgs& args) {
  args.dtype == DType::kFloat32 ? apply_mask_to<uint32_t>(args) : apply_mask_to<uint16_t>(args);
}

}  // namespace qk::cpu::QK_CPU_ISA

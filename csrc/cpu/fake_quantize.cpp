// q = offset + step * code(x), and its straight-through gradient with the three sums that every range gradient is made of.

#include "cpu/fake_quantize.h"

#include "cpu/traverse.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

// A grid as vectors: the same in every lane, or one channel a lane.
struct GridVec {
  Vec offset, step, inverse, threshold;
};

template <Kind kKind>
inline Vec code_of(Vec x, Vec position, const GridVec& grid, Vec levels) {
  const Vec zero = splat(0.0f), one = splat(1.0f);
  if constexpr (kKind == Kind::kUniform) {
    return round_to_even(clamp_code(position, levels));
  } else if constexpr (kKind == Kind::kBinary) {
    return keep(less_equal(zero, x), one);
  } else {
    return keep(less(zero - grid.threshold, x), one) + keep(less(grid.threshold, x), one);
  }
}

// Parameter tables: one entry a channel, or a column when lanes differ.
class GridTables {
 public:
  GridTables(const Layout& layout, const Walk& walk, const float* grid)
      : offset_(expand(layout, walk, [&](int64_t c) { return grid[c * kGridColumns]; })),
        step_(expand(layout, walk, [&](int64_t c) { return grid[c * kGridColumns + 1]; })),
        inverse_(expand(layout, walk, [&](int64_t c) { return inverse_step(grid[c * kGridColumns + 1]); })),
        threshold_(expand(layout, walk, [&](int64_t c) { return grid[c * kGridColumns + 2]; })) {}

  GridVec broadcast(int64_t c) const { return {splat(offset_[c]), splat(step_[c]), splat(inverse_[c]), splat(threshold_[c])}; }
  GridVec at(int64_t i) const { return {load(&offset_[i]), load(&step_[i]), load(&inverse_[i]), load(&threshold_[i])}; }
  GridVec at(int64_t i, int n) const {
    return {load(&offset_[i], n), load(&step_[i], n), load(&inverse_[i], n), load(&threshold_[i], n)};
  }

 private:
  std::vector<float> offset_, step_, inverse_, threshold_;
};

template <Kind kKind>
struct Forward : GridTables {
  Forward(const FakeQuantizeArgs& args, const Walk& walk)
      : GridTables(args.layout, walk, args.grid), levels(splat(static_cast<float>(args.levels))) {}

  Vec operator()(Vec x, const GridVec& grid) const {
    const Vec position = (x - grid.offset) * grid.inverse;
    return grid.offset + grid.step * code_of<kKind>(x, position, grid, levels);
  }

  Vec levels;
};

template <Ste kSte>
struct Backward : GridTables {
  Backward(const FakeQuantizeArgs& args, const Walk& walk)
      : GridTables(args.layout, walk, args.grid), levels(splat(static_cast<float>(args.levels))) {}

  Vec operator()(Vec g, Vec x, const GridVec& grid, Vec (&sums)[3]) const {
    if constexpr (kSte == Ste::kIdentity) return g;
    const Vec zero = splat(0.0f);
    const Vec position = (x - grid.offset) * grid.inverse;
    const Vec below = keep(less(position, zero), g), above = keep(less_equal(levels, position), g);
    sums[0] = sums[0] + below;
    sums[1] = sums[1] + above;
    if constexpr (kSte == Ste::kFull) {
      // Outside the range the clamped position is a whole number, so this term vanishes there by itself.
      const Vec clamped = clamp_code(position, levels);
      sums[2] = multiply_add(g, round_to_even(clamped) - clamped, sums[2]);
    }
    return keep(both(less_equal(zero, position), less_equal(position, levels)), g);
  }

  Vec levels;
};

}  // namespace

void fake_quantize_forward(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  with_type(args.dtype, [&]<class T>(T*) {
    const auto run = [&](const auto& op) {
      map_elements(args.layout, walk, op, static_cast<const T*>(args.x), static_cast<T*>(args.out));
    };
    switch (args.kind) {
      case Kind::kUniform: return run(Forward<Kind::kUniform>(args, walk));
      case Kind::kBinary: return run(Forward<Kind::kBinary>(args, walk));
      case Kind::kTernary: return run(Forward<Kind::kTernary>(args, walk));
      case Kind::kIdentity: return;  // refused by csrc/ops
    }
  });
}

void fake_quantize_backward(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  with_type(args.dtype, [&]<class T>(T*) {
    const auto run = [&](const auto& op) {
      map_and_reduce<3>(args.layout, walk, op, static_cast<const T*>(args.grad), static_cast<const T*>(args.x),
                        static_cast<T*>(args.out), args.sums);
    };
    switch (args.ste) {
      case Ste::kIdentity: return run(Backward<Ste::kIdentity>(args, walk));
      case Ste::kClip: return run(Backward<Ste::kClip>(args, walk));
      case Ste::kFull: return run(Backward<Ste::kFull>(args, walk));
    }
  });
}

}  // namespace qk::cpu::QK_CPU_ISA

// q = offset + step * code(x), and its straight-through gradient with the three sums that every range gradient is made of.

#include "cpu/fake_quantize.h"

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
    const Vec value = load(x + i, lanes);
    out.put(i, grid.offset + grid.step * code_of<kKind>(value, grid, levels), lanes);
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
    out.put(i, keep(both(less_equal(zero, position), less_equal(position, levels)), g), lanes);
  }
};

}  // namespace

void fake_quantize_forward(const FakeQuantizeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = grid_table(args.layout, walk, args.grid);
  const Vec levels = splat(static_cast<float>(args.levels));
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      traverse(args.layout, walk, table,
               Forward<kKind, T>{static_cast<const T*>(args.x), Results<T>(args.out, args.layout, walk), levels});
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

}  // namespace qk::cpu::QK_CPU_ISA

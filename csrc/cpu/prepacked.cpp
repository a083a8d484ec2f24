#include "cpu/prepacked.h"

#include "cpu/parallel.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

namespace {

// A panel of `vectors` vectors, `steps` of them, to as few bytes as it takes.
void pack_panel(const Weight* panel, int64_t steps, int64_t vectors, int width, uint8_t* to) {
  const int shared = 8 / width;
  const int64_t row = vectors * kLanes * kDepth;
  for (int64_t step = 0; step < steps; step += shared, to += row)
    for (int64_t at = 0; at < row; at += 64) {
      __m512i packed = _mm512_setzero_si512();
      for (int s = 0; s < shared && step + s < steps; ++s) {
        const __m512i codes = _mm512_load_si512(panel + (step + s) * row + at);
        packed = _mm512_or_si512(packed, _mm512_sll_epi16(codes, _mm_cvtsi32_si128(s * width)));
      }
      _mm512_storeu_si512(to + at, packed);
    }
}

template <int kWidth>
void unpack_panel(const uint8_t* from, int64_t steps, int64_t vectors, Weight* to) {
  constexpr int kShared = 8 / kWidth;
  const int64_t row = vectors * kLanes * kDepth;
  for (; steps > 0; steps -= kShared, from += row, to += kShared * row) {
    const int64_t there = std::min<int64_t>(kShared, steps);
    for (int64_t at = 0; at < row; at += 64) {
      const __m512i packed = _mm512_loadu_si512(from + at);
      unrolled<kShared>([&](int s) QK_INLINED {
        if (s < there) _mm512_store_si512(to + s * row + at, codes_of<kWidth>(packed, s));
      });
    }
  }
}

}  // namespace

const Weight* Prepacked::expanded(int64_t group, int64_t index, int64_t vectors, Weight* scratch) const {
  const uint8_t* const from = panel(group, index);
  if (width_ == 8) return reinterpret_cast<const Weight*>(from);
  with_width(width_, [&]<int kWidth>() {
    if constexpr (kWidth < 8) unpack_panel<kWidth>(from, steps_, vectors, scratch);
  });
  return scratch;
}

int64_t prepacked_bytes(const LowbitArgs& args) {
  const Plan plan = plan_of(args);
  return Prepacked::suits(args, plan) ? Prepacked(args, plan).bytes() : 0;
}

void prepack(const LowbitArgs& args, uint8_t* to) {
  const Plan plan = plan_of(args);
  const Prepacked layout(args, plan);
  Weights weights;
  weights.zero = zero_of(args);
  weights.tap_sums = Buffer<int64_t>(args.geometry.kernel_height * args.geometry.kernel_width * plan.slots());
  weights.tap_sums.clear();
  parallel_for(plan.groups * plan.panels(), 1, [&](int64_t begin, int64_t end) {
    const TurnedPlanes turned(args);
    const Buffer<Weight> panel(kPanelLanes * plan.steps() * kDepth);
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / plan.panels(), index = i % plan.panels();
      expand_panel(args, plan, group, index, turned, panel.data(), weights);
      pack_panel(panel.data(), plan.steps(), plan.panel_vectors(index), layout.width(), to + layout.panel_at(group, index));
    }
  });
  std::memset(to, 0, layout.sums_bytes());
  std::memcpy(to, weights.tap_sums.data(), layout.sums_count() * sizeof(int64_t));
}

#else

int64_t prepacked_bytes(const LowbitArgs&) { return 0; }
void prepack(const LowbitArgs&, uint8_t*) {}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

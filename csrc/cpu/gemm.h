#pragma once
// Rows of activation codes times panels of weights, from the codes to the finished output.
//
// A Source provides the rows: fill(first pixel, pixels, group, Rows&) sets rows.row[i] to plan.steps() * kDepth readable
// codes. What is read past K meets weights of zero.

#include <algorithm>

#include "cpu/lowbit.h"
#include "cpu/parallel.h"

namespace qk::cpu::QK_CPU_ISA {

struct Rows {
  explicit Rows(const Plan& plan, bool gathered)
      : row(plan.block),
        sum(plan.block),
        window_class(plan.block),
        gathered(gathered ? plan.block * plan.steps() * kDepth : 0) {
    this->gathered.clear();  // the codes past K stay zero
  }

  Buffer<const Activation*> row;  // [block]
  Buffer<int64_t> sum;            // [block]: SA
  Buffer<int64_t> window_class;   // [block]
  Buffer<Activation> gathered;    // [block][steps * kDepth], or empty
};

// One tile: R rows by the vectors of a panel. Sum is int64_t where K may overflow int32.
template <class Sum>
void multiply_tile(const Plan& plan, const Activation* const* rows, int count, const Weight* panel, int vectors, Sum* dots) {
  if constexpr (sizeof(Sum) == sizeof(int32_t)) {
    dot_tile_of(count, vectors)(rows, panel, plan.steps(), dots);
  } else {
    constexpr int64_t kSteps = kMaxDepth / kDepth;
    const int n = count * vectors * kLanes;
    int32_t partial[kTileRows * kPanelLanes];
    const Activation* at[kTileRows];
    std::fill(dots, dots + n, 0);
    for (int64_t step = 0; step < plan.steps(); step += kSteps) {
      for (int r = 0; r < count; ++r) at[r] = rows[r] + step * kDepth;
      dot_tile_of(count, vectors)(at, panel + step * vectors * kLanes * kDepth, std::min(kSteps, plan.steps() - step),
                                  partial);
      for (int i = 0; i < n; ++i) dots[i] += partial[i];
    }
  }
}

template <class Sum, class Source>
void multiply(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue& epilogue,
              const Source& source) {
  const Output output(args);
  const int64_t pixels = args.geometry.batch * args.geometry.out_height * args.geometry.out_width;
  const int64_t blocks = (pixels + plan.block - 1) / plan.block, chunks = (plan.panels() + plan.chunk - 1) / plan.chunk;
  parallel_for(plan.groups * blocks * chunks, 1, [&](int64_t begin, int64_t end) {
    Rows rows(plan, Source::kGathers);
    const int64_t padded = (plan.block + kLanes - 1) / kLanes * kLanes;
    Buffer<float> staged(padded * kPanelLanes), turned(padded * kPanelLanes);
    Sum dots[kTileRows * kPanelLanes];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, block = task / chunks % blocks, group = task / chunks / blocks;
      const int64_t pixel = block * plan.block, count = std::min(plan.block, pixels - pixel);
      if (task == begin || chunk == 0) source.fill(pixel, count, group, rows);
      for (int64_t index = chunk * plan.chunk; index < std::min((chunk + 1) * plan.chunk, plan.panels()); ++index) {
        const int vectors = static_cast<int>(std::min<int64_t>(kTileVectors, plan.group_vectors - index * kTileVectors));
        const int64_t slot = (group * plan.group_vectors + index * kTileVectors) * kLanes;
        for (int64_t first = 0; first < count; first += kTileRows) {
          const int tile = static_cast<int>(std::min<int64_t>(kTileRows, count - first));
          multiply_tile(plan, rows.row.data() + first, tile, weights.panel(plan, group, index), vectors, dots);
          for (int r = 0; r < tile; ++r) {
            const Sum activations = static_cast<Sum>(rows.sum[first + r]);
            epilogue.finish<Sum, 0>(dots + r * vectors * kLanes, &activations, weights.zero, rows.window_class[first + r],
                                    slot, vectors * kLanes, staged.data() + (first + r) * kPanelLanes);
          }
        }
        const int64_t column = index * kPanelLanes;
        output.write(staged.data(), pixel, count, group * plan.group_channels + column,
                     std::min<int64_t>(kPanelLanes, plan.group_channels - column), turned.data());
      }
    }
  });
}

template <class Source>
void run_gemm(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue& epilogue,
              const Source& source) {
  plan.wide ? multiply<int64_t>(args, plan, weights, epilogue, source)
            : multiply<int32_t>(args, plan, weights, epilogue, source);
}

}  // namespace qk::cpu::QK_CPU_ISA

// Launches of the products on the tensor cores: one kernel a tile shape, and the sums of the splits.

#include "cuda/gemm.cuh"

#include <algorithm>

#include "cuda/lowbit.h"

namespace qk::cuda {
namespace {

// Pairs of planes; the last digit of the weight, or the first, goes with each plane of the activation once. Heaviest first,
// or where a basis is learned by the weight's digits and then the activation's.
int list_pairs(const LowbitArgs& args, BitPair (&pairs)[kMostPairs]) {
  const int x_bits = bits_of(args.x_kind, args.x_levels);
  const bool learned = has_learned_basis(args);
  const auto exponent = [](Kind kind, int bits, int plane) { return kind == Kind::kTernary ? 0 : bits - 1 - plane; };
  const auto exponent_of = [&](const BitPair& pair) {
    return exponent(args.w_kind, args.w_bits, pair.w_plane) + exponent(args.x_kind, x_bits, pair.x_plane);
  };
  int count = 0;
  for (int w = 0; w < args.w_bits; ++w)
    for (int x = 0; x < x_bits; ++x)
      pairs[count++] = {static_cast<int8_t>(learned ? plane_of_digit(args.w_kind, args.w_bits, w) : w),
                        static_cast<int8_t>(learned ? plane_of_digit(args.x_kind, x_bits, x) : x), 0,
                        w == (learned ? 0 : args.w_bits - 1)};
  if (learned) return count;
  std::stable_sort(pairs, pairs + count,
                   [&](const BitPair& a, const BitPair& b) { return exponent_of(a) > exponent_of(b); });
  for (int i = 1; i < count; ++i)
    pairs[i].doublings = static_cast<int8_t>(exponent_of(pairs[i - 1]) - exponent_of(pairs[i]));
  return count;
}

template <class Tile, bool kBitProduct, int kCopy, class Sum>
void launch_gemm(const GemmArgs& args, const ProductPlan& plan, const Context& context) {
  const int shared = Gemm<Tile, kBitProduct, kCopy, Sum>::shared_bytes(args.lowbit.w_bits);
  const dim3 grid = blocks(plan.tiles, plan.splits);
  launch_shared(context, grid, kGemmThreads, shared, gemm_kernel<Tile, kBitProduct, kCopy, Sum>, args);
}

using Wide = Tile<4, 128>;
using Tall = Tile<2, 64>;
using Narrow = Tile<4, 32>;

template <bool kBitProduct, class Sum>
void launch_tile(const GemmArgs& args, const ProductPlan& plan, const Context& context) {
  if (plan.chunk != kChunk) return launch_gemm<Tall, kBitProduct, kBitProduct ? 4 : 1, Sum>(args, plan, context);
  if (plan.tile == TileShape::k64x128) return launch_gemm<Tall, kBitProduct, kChunk, Sum>(args, plan, context);
  if (plan.tile == TileShape::k128x32) return launch_gemm<Narrow, kBitProduct, kChunk, Sum>(args, plan, context);
  // Floats would need registers that it does not have: plan_product never asks for it.
  if constexpr (std::is_same_v<Sum, int32_t>) launch_gemm<Wide, kBitProduct, kChunk, Sum>(args, plan, context);
}

}  // namespace

void run_gemm(const LowbitArgs& lowbit, const ProductPlan& plan, const Context& context) {
  const ConvGeometry& g = lowbit.geometry;
  const bool bits = plan.engine == Engine::kBits, learned = has_learned_basis(lowbit);
  const PreparedActivation activation = prepare_activation(lowbit, plan, context);
  const int64_t pixels = g.batch * g.out_height * g.out_width;
  GemmArgs args{};
  args.window_terms = window_terms(lowbit, context);
  args.lowbit = learned ? align_taps(lowbit, context) : lowbit;
  args.x = activation.rows;
  args.x_plane = activation.plane_bytes;
  args.tap_bytes = static_cast<uint32_t>(activation.tap_bytes);
  args.pixel_bytes = g.groups * activation.tap_bytes;
  args.taps = static_cast<uint32_t>(g.kernel_height * g.kernel_width);
  args.by_tap_bytes = Divider(std::max(args.tap_bytes, 1u));
  args.by_kernel_width = Divider(static_cast<uint32_t>(g.kernel_width));
  args.aligned_planes = args.lowbit.words % 4 == 0 && reinterpret_cast<uintptr_t>(args.lowbit.planes) % kCopyBytes == 0;
  args.steps = plan.steps;
  args.steps_per_split = divide_up(plan.steps, plan.splits);
  args.channel_tiles = divide_up(g.out_channels / g.groups, int64_t{channels_of(plan.tile)});
  args.pixel_tiles = divide_up(pixels, int64_t{pixels_of(plan.tile)});
  args.splits = plan.splits;
  args.pair_count = 1;
  if (bits) args.pair_count = list_pairs(lowbit, args.pairs);
  if (plan.splits > 1) {
    args.partial_dots = reinterpret_cast<int32_t*>(context.workspace(plan.splits * pixels * g.out_channels));
    args.partial_sums = reinterpret_cast<int32_t*>(context.workspace(plan.splits * pixels * g.groups));
  }
  learned ? launch_tile<true, float>(args, plan, context)
  : bits  ? launch_tile<true, int32_t>(args, plan, context)
          : launch_tile<false, int32_t>(args, plan, context);
  if (plan.splits > 1) {
    const int64_t tiles = g.groups * divide_up(g.out_channels / g.groups, int64_t{kFinishChannels});
    launch(context, blocks(tiles * divide_up(pixels, int64_t{kFinishPixels})), kGemmThreads, finish_kernel, args);
  }
}

}  // namespace qk::cuda

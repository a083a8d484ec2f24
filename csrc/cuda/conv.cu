// lowbit_conv2d: an implicit matrix product, or directly where channels stand alone.

#include "cuda/conv.cuh"

#include "cuda/lowbit.h"

namespace qk::cuda {
namespace {

void run_depthwise(const LowbitArgs& lowbit, const ProductPlan& plan, const Context& context) {
  const ConvGeometry& g = lowbit.geometry;
  const int64_t multiple = g.out_channels / g.groups, pixels = g.out_height * g.out_width;
  const int64_t taps = g.kernel_height * g.kernel_width;
  const int64_t most = int64_t{context.multiprocessors} * kBlocksPerMultiprocessor;
  auto* const weights = reinterpret_cast<uint8_t*>(context.workspace(divide_up(taps * g.out_channels, int64_t{4})));
  launch(context, blocks(std::min(divide_up(taps * g.out_channels, int64_t{kThreads}), most)), kThreads, tap_codes_kernel,
         lowbit, weights);
  const uint8_t* const x = prepare_activation(lowbit, plan, context).rows;
  const int64_t pack = multiple == 1 && g.out_channels % 4 == 0 ? 4 : 1, packs = g.out_channels / pack;
  const DepthwiseArgs args{lowbit,
                           x,
                           weights,
                           window_terms(lowbit, context),
                           static_cast<uint32_t>(pixels * packs),
                           lowbit.out_stride[1] != 1,
                           Divider(static_cast<uint32_t>(packs)),
                           Divider(static_cast<uint32_t>(pixels)),
                           Divider(static_cast<uint32_t>(g.out_width)),
                           Divider(static_cast<uint32_t>(multiple))};
  const dim3 grid = blocks(divide_up(int64_t{args.items}, int64_t{kThreads}), std::min<int64_t>(g.batch, 65535));
  const bool learned = has_learned_basis(lowbit);
  const auto kernel = pack == 4 ? (learned ? depthwise_kernel<4, true> : depthwise_kernel<4, false>)
                                : (learned ? depthwise_kernel<1, true> : depthwise_kernel<1, false>);
  launch(context, grid, kThreads, kernel, args);
}

void run_conv(const LowbitArgs& args, const Context& context) {
  const ProductPlan plan = plan_of(args, context);
  plan.engine == Engine::kDepthwise ? run_depthwise(args, plan, context) : run_gemm(args, plan, context);
}

}  // namespace

void lowbit_conv2d(const LowbitArgs& args, const Context& context) {
  const Engine engine = plan_of(args, context).engine;
  const bool linear = engine == Engine::kDotProduct || engine == Engine::kPlaneProduct;
  linear ? lowbit_linear(args, context) : run_learned(args, context, run_conv);
}

}  // namespace qk::cuda

// lowbit_linear: few rows stream the weights, more go to the tensor cores.

#include "cuda/matmul.cuh"

#include "cuda/lowbit.h"

namespace qk::cuda {
namespace {

void run_dot_product(const LowbitArgs& args, const ProductPlan& plan, const Context& context) {
  const ConvGeometry& g = args.geometry;
  const PreparedActivation activation = prepare_activation(args, plan, context);
  const dim3 grid = blocks(divide_up(g.out_channels, int64_t{kDotThreads / 32}));
  g.batch == 1 ? launch(context, grid, kDotThreads, dot_product_kernel<1>, args, activation.rows, activation.tap_bytes)
               : launch(context, grid, kDotThreads, dot_product_kernel<kDotProductPixels>, args, activation.rows,
                        activation.tap_bytes);
}

}  // namespace

void lowbit_linear(const LowbitArgs& args, const Context& context) {
  const ProductPlan plan = plan_of(args, context);
  plan.engine == Engine::kDotProduct ? run_dot_product(args, plan, context) : run_gemm(args, plan, context);
}

}  // namespace qk::cuda

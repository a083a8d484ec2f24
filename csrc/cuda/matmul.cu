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

void run_plane_product(const LowbitArgs& args, const ProductPlan& plan, const Context& context) {
  const auto* const x = reinterpret_cast<const uint32_t*>(prepare_activation(args, plan, context).rows);
  const dim3 grid = blocks(divide_up(args.geometry.out_channels, int64_t{kDotThreads / 32}));
  const int x_bits = bits_of(args.x_kind, args.x_levels);
  args.geometry.batch == 1 ? launch(context, grid, kDotThreads, plane_product_kernel<1>, args, x, x_bits)
                           : launch(context, grid, kDotThreads, plane_product_kernel<kDotProductPixels>, args, x, x_bits);
}

void run_linear(const LowbitArgs& args, const Context& context) {
  const ProductPlan plan = plan_of(args, context);
  if (plan.engine == Engine::kPlaneProduct) return run_plane_product(args, plan, context);
  plan.engine == Engine::kDotProduct ? run_dot_product(args, plan, context) : run_gemm(args, plan, context);
}

}  // namespace

void lowbit_linear(const LowbitArgs& args, const Context& context) { run_learned(args, context, run_linear); }

}  // namespace qk::cuda

#pragma once
// The steps of a low-bit product on the device, as the families matmul and conv put them together.

#include "cuda/kernels.h"
#include "cuda/plan.h"

namespace qk::cuda {

// The activation as a kernel reads it.
struct PreparedActivation {
  const uint8_t* rows;  // [planes or 1, input pixels, groups, tap_bytes]: codes, or words of bit-planes
  int64_t plane_bytes;
  int64_t tap_bytes;
};

// Runs a product with what is learned about it brought to what the kernels take: floats of the activation to codes; for a
// learned output the table of its levels, or where no operand is learned floats, which become codes after it.
void run_learned(const LowbitArgs& args, const Context& context, void (*run)(const LowbitArgs&, const Context&));

// The same weights, taps beginning with words.
LowbitArgs align_taps(const LowbitArgs& args, const Context& context);

PreparedActivation prepare_activation(const LowbitArgs& args, const ProductPlan& plan, const Context& context);

// oa*(sw*SW + ow*V): [classes of windows, out_channels].
const float* window_terms(const LowbitArgs& args, const Context& context);

ProductPlan plan_of(const LowbitArgs& args, const Context& context);

// Engines kBytes and kBits.
void run_gemm(const LowbitArgs& args, const ProductPlan& plan, const Context& context);

}  // namespace qk::cuda

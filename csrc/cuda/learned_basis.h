#pragma once
// What products need of a learned basis.

#include "cuda/kernels.h"

namespace qk::cuda {

// The table (tile/levels.cuh) of one quantizer with grid [1 + bits].
const float* level_table(const float* grid, int bits, const Context& context);

}  // namespace qk::cuda

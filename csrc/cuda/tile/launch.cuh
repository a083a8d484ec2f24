#pragma once
// Launches, by the run-time library's own function: the emulator has one of the same name.

#include <cuda_runtime.h>

#include <utility>

#include "cuda/kernels.h"

namespace qk::cuda {

template <class... Expected, class... Actual>
void launch(const Context& context, dim3 grid, int threads, void (*kernel)(Expected...), Actual&&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);  // errors: last_error()
}

inline dim3 blocks(int64_t x, int64_t y = 1) { return dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), 1}; }

}  // namespace qk::cuda

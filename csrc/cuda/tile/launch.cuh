#pragma once
// Launches, by the run-time library's own function: the emulator has one of the same name.

#include <cuda_runtime.h>

#include <utility>

#include "cuda/kernels.h"

namespace qk::cuda {

// bytes: of dynamic shared memory, up to what the device has. Errors: last_error().
template <class... Expected, class... Actual>
void launch_shared(const Context& context, dim3 grid, int threads, int bytes, void (*kernel)(Expected...),
                   Actual&&... arguments) {
  constexpr int kWithoutAsking = 48 << 10;
  if (bytes > kWithoutAsking) cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  cudaLaunchConfig_t config{};
  config.gridDim = grid;
  config.blockDim = dim3{static_cast<unsigned>(threads), 1, 1};
  config.dynamicSmemBytes = static_cast<size_t>(bytes);
  config.stream = static_cast<cudaStream_t>(context.stream);
  cudaLaunchKernelEx(&config, kernel, std::forward<Actual>(arguments)...);
}

template <class... Expected, class... Actual>
void launch(const Context& context, dim3 grid, int threads, void (*kernel)(Expected...), Actual&&... arguments) {
  launch_shared(context, grid, threads, 0, kernel, std::forward<Actual>(arguments)...);
}

inline dim3 blocks(int64_t x, int64_t y = 1) { return dim3{static_cast<unsigned>(x), static_cast<unsigned>(y), 1}; }

}  // namespace qk::cuda

#include <cuda_runtime.h>

#include "cuda/kernels.h"

namespace qk::cuda {

namespace {

int attribute(cudaDeviceAttr which) {
  int device = 0, value = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&value, which, device);
  return value;
}

}  // namespace

int multiprocessors() {
  const int count = attribute(cudaDevAttrMultiProcessorCount);
  return count > 0 ? count : 1;
}

int architecture() {
  return 10 * attribute(cudaDevAttrComputeCapabilityMajor) + attribute(cudaDevAttrComputeCapabilityMinor);
}

const char* last_error() {
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace qk::cuda

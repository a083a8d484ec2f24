// Small kernels, right and wrong, for the emulator's own tests: each wrong one has the bug that its name says.
// Usage: planted NAME prints "result: N" or "error: TEXT".

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/tile/shared.cuh"

namespace planted {

using qk::cuda::dynamic_shared;
constexpr int kThreads = 96;

// Every thread reads its neighbour's value.
template <bool kBarrier>
__global__ void neighbour(int* out) {
  __shared__ int values[kThreads];
  values[threadIdx.x] = static_cast<int>(threadIdx.x);
  if constexpr (kBarrier) __syncthreads();
  out[threadIdx.x] = values[(threadIdx.x + 1) % kThreads];
}

__global__ void barrier_in_a_branch(int* out) {
  if (threadIdx.x < 64)
    __syncthreads();
  else
    __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void barrier_after_exit(int* out) {
  if (threadIdx.x == 70) return;
  __syncthreads();
  out[threadIdx.x] = 0;
}

__global__ void static_shared_index(int* out, int offset) {
  __shared__ int values[kThreads];
  values[threadIdx.x + offset] = 1;
  __syncthreads();
  out[threadIdx.x] = values[threadIdx.x];
}

__global__ void dynamic_shared_write(int* out, int offset) {
  int* const values = dynamic_shared<int>();
  values[threadIdx.x + offset] = 1;
  __syncthreads();
  out[threadIdx.x] = 1;
}

__global__ void uninitialised_shared(int* out) {
  __shared__ int values[kThreads];
  if (threadIdx.x % 2 == 0) values[threadIdx.x] = 0;
  out[threadIdx.x] = values[threadIdx.x];
}

// A two-stage pipeline: the second group may still be under way when the first is read.
template <int kGroupsInFlight>
__global__ void copy_async(int* out, const int* in) {
  alignas(16) __shared__ int stage[2][4 * kThreads];
  for (int s = 0; s < 2; ++s) {
    qk::cuda::ptx::cp_async_16(&stage[s][4 * threadIdx.x], in + 4 * (s * kThreads + threadIdx.x));
    qk::cuda::ptx::cp_async_commit();
  }
  qk::cuda::ptx::cp_async_wait<kGroupsInFlight>();
  __syncthreads();
  out[threadIdx.x] = stage[0][threadIdx.x];
}

__global__ void warp_sum(int* out, unsigned mask) {
  int value = static_cast<int>(threadIdx.x);
  for (int offset = 16; offset > 0; offset /= 2) value += __shfl_xor_sync(mask, value, offset);
  out[threadIdx.x] = value;
}

// Half of the warp is elsewhere, but the mask names all of it.
__global__ void ballot_in_a_branch(int* out) {
  out[threadIdx.x] = 0;
  if (threadIdx.x % 2 == 0) out[threadIdx.x] = static_cast<int>(__ballot_sync(0xffffffffu, 1));
}

__global__ void shuffle_from_outside_the_mask(int* out) {
  if (threadIdx.x % 32 < 16) out[threadIdx.x] = __shfl_down_sync(0x0000ffffu, 1, 8);
}

__global__ void votes(int* out) {
  const int lane = static_cast<int>(threadIdx.x % 32);
  const unsigned even = __ballot_sync(0xffffffffu, lane % 2 == 0);
  const unsigned total = __reduce_add_sync(0xffffffffu, 1u);
  __syncwarp();
  if (lane < 8) out[threadIdx.x] = __shfl_up_sync(0xffu, lane, 1, 8) + static_cast<int>(total);
  if (lane >= 8) out[threadIdx.x] = __all_sync(0xffffff00u, even == 0x55555555u) + __any_sync(0xffffff00u, lane == 9);
}

__global__ void count(int* out) { atomicAdd(out, 1); }

template <class... Expected, class... Actual>
void launch(size_t shared, void (*kernel)(Expected...), Actual... actual) {
  cudaLaunchConfig_t config{};
  config.gridDim = {2, 1, 1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = shared;
  cudaLaunchKernelEx(&config, kernel, actual...);
}

bool run(const char* name, int* out, const int* in) {
  const auto is = [&](const char* other) { return std::strcmp(name, other) == 0; };
  if (is("neighbour")) return launch(0, neighbour<true>, out), true;
  if (is("missing_barrier")) return launch(0, neighbour<false>, out), true;
  if (is("barrier_in_a_branch")) return launch(0, barrier_in_a_branch, out), true;
  if (is("barrier_after_exit")) return launch(0, barrier_after_exit, out), true;
  if (is("static_shared")) return launch(0, static_shared_index, out, 0), true;
  if (is("static_shared_out_of_bounds")) return launch(0, static_shared_index, out, 1), true;
  if (is("dynamic_shared")) return launch(kThreads * sizeof(int), dynamic_shared_write, out, 0), true;
  if (is("dynamic_shared_out_of_bounds")) return launch(kThreads * sizeof(int), dynamic_shared_write, out, 1), true;
  if (is("uninitialised_shared")) return launch(0, uninitialised_shared, out), true;
  if (is("copy_async")) return launch(0, copy_async<1>, out, in), true;
  if (is("missing_copy_wait")) return launch(0, copy_async<2>, out, in), true;
  if (is("warp_sum")) return launch(0, warp_sum, out, 0xffffffffu), true;
  if (is("wrong_shuffle_mask")) return launch(0, warp_sum, out, 0x0000ffffu), true;
  if (is("ballot_in_a_branch")) return launch(0, ballot_in_a_branch, out), true;
  if (is("shuffle_from_outside_the_mask")) return launch(0, shuffle_from_outside_the_mask, out), true;
  if (is("votes")) return launch(0, votes, out), true;
  if (is("count")) return launch(0, count, out), true;
  return false;
}

}  // namespace planted

int main(int argc, char** argv) {
  std::vector<int> out(planted::kThreads), in(8 * planted::kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  if (argc != 2 || !planted::run(argv[1], out.data(), in.data())) return 2;
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(error));
    return 0;
  }
  long long weighted = 0;
  for (int i = 0; i < planted::kThreads; ++i) weighted += static_cast<long long>(i + 1) * out[i];
  std::printf("result: %lld\n", weighted);
}

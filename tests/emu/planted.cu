// Small kernels, right and wrong, for the emulator's own tests: each wrong one has the bug that its name says.
// Usage: planted NAME prints "result: N" or "error: TEXT".

#include <cuda_runtime.h>

#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
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

// Registers that look random; test_emulator.py knows the rule.
__device__ uint32_t scramble(uint32_t i) { return (i + 1) * 2654435761u; }

template <bool kBits>
__global__ void mma(int* out) {
  uint32_t a[4], b[2];
  int32_t d[4];
  for (uint32_t r = 0; r < 4; ++r) a[r] = scramble(10 * threadIdx.x + r), d[r] = static_cast<int32_t>(threadIdx.x + r);
  for (uint32_t r = 0; r < 2; ++r) b[r] = scramble(10 * threadIdx.x + 4 + r);
  kBits ? qk::cuda::ptx::mma_b1(d, a, b) : qk::cuda::ptx::mma_u8(d, a, b);
  out[threadIdx.x] = d[0] + 3 * d[1] + 5 * d[2] + 7 * d[3];
}

// A lane stays away.
__global__ void mma_in_a_branch(int* out) {
  uint32_t a[4]{}, b[2]{};
  int32_t d[4]{};
  if (threadIdx.x % 32 != 5) qk::cuda::ptx::mma_u8(d, a, b);
  out[threadIdx.x] = d[0];
}

__global__ void byte_instructions(int* out) {
  const uint32_t a = scramble(threadIdx.x), b = scramble(threadIdx.x + 1000), selector = scramble(threadIdx.x + 2000);
  out[threadIdx.x] = static_cast<int>((__dp4a(a, b, 17u) ^ __byte_perm(a, b, selector)) >> 8);
}

// Every third copy is of zeros.
__global__ void copy_or_zero(int* out, const int* in) {
  alignas(16) __shared__ int words[kThreads];
  qk::cuda::ptx::cp_async_or_zero<4>(&words[threadIdx.x], in + threadIdx.x, threadIdx.x % 3 != 0);
  qk::cuda::ptx::cp_async_commit();
  qk::cuda::ptx::cp_async_wait<0>();
  __syncthreads();
  out[threadIdx.x] = words[threadIdx.x];
}

// A warp's stores `stride` words apart: stride 2 fills every other bank twice.
__global__ void strided(int* out, int stride) {
  __shared__ int words[4 * kThreads];
  qk::cuda::ptx::store_shared(&words[stride * threadIdx.x], 1);
  out[threadIdx.x] = words[stride * threadIdx.x];
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
  if (is("mma_bytes")) return launch(0, mma<false>, out), true;
  if (is("mma_bits")) return launch(0, mma<true>, out), true;
  if (is("mma_in_a_branch")) return launch(0, mma_in_a_branch, out), true;
  if (is("byte_instructions")) return launch(0, byte_instructions, out), true;
  if (is("copy_or_zero")) return launch(0, copy_or_zero, out, in), true;
  if (is("stride_1")) return launch(0, strided, out, 1), true;
  if (is("stride_4")) return launch(0, strided, out, 4), true;
  if (is("count")) return launch(0, count, out), true;
  return false;
}

}  // namespace planted

extern "C" const char* qk_emu_count_banks(int on);

int main(int argc, char** argv) {
  std::vector<int> out(planted::kThreads), in(8 * planted::kThreads);
  for (size_t i = 0; i < in.size(); ++i) in[i] = static_cast<int>(i);
  qk_emu_count_banks(1);
  if (argc != 2 || !planted::run(argv[1], out.data(), in.data())) return 2;
  if (const cudaError_t error = cudaGetLastError(); error != cudaSuccess) {
    std::printf("error: %s\n", cudaGetErrorString(error));
    return 0;
  }
  std::printf("%s", qk_emu_count_banks(0));  // a line for each place in the code that told the emulator
  long long weighted = 0;
  for (int i = 0; i < planted::kThreads; ++i) weighted += static_cast<long long>(i + 1) * out[i];
  std::printf("result: %lld\n", weighted);
}

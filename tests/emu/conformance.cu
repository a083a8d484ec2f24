// What every wrapper of csrc/cuda/ptx, and every stand-in of csrc/emu/include, computes: compiled by nvcc for a device and
// by the host's compiler for the emulator, it must print the same lines. A new wrapper is one entry of CASES.

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "cuda/ptx/clamp.cuh"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/logic.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/ptx/store.cuh"
#include "cuda/tile/shared.cuh"

namespace conformance {

using namespace qk::cuda;
constexpr int kThreads = 128;
constexpr int kWords = 4 * kThreads;  // of input and of output

__device__ __forceinline__ float as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}
__device__ __forceinline__ uint32_t as_bits(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Each thread: 4 words in, 4 words out.
using Kernel = void (*)(const uint32_t*, uint32_t*);

__global__ void max_nan(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords; i += kThreads)
    out[i] = as_bits(ptx::max_nan(as_float(in[i]), as_float(in[(i * 7 + 3) % kWords])));
}

__global__ void min_nan(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords; i += kThreads)
    out[i] = as_bits(ptx::min_nan(as_float(in[i]), as_float(in[(i * 7 + 3) % kWords])));
}

__global__ void store_16(const uint32_t* in, uint32_t* out) {
  const uint32_t* const mine = in + 4 * threadIdx.x;
  ptx::store_16(out + 4 * threadIdx.x, uint4{mine[3], mine[0], mine[2], mine[1]});
}

// Two stages: the second is under way when the first is read.
__global__ void cp_async(const uint32_t* in, uint32_t* out) {
  uint32_t* const stages = dynamic_shared<uint32_t>();
  const int thread = static_cast<int>(threadIdx.x), other = (thread + 37) % kThreads;
  for (int stage = 0; stage < 2; ++stage) {
    ptx::cp_async_16(stages + stage * kWords + 4 * thread, in + 4 * ((thread + stage * 5) % kThreads));
    ptx::cp_async_commit();
  }
  ptx::cp_async_wait<1>();
  __syncthreads();
  uint32_t first[4];
  for (int w = 0; w < 4; ++w) first[w] = stages[4 * other + w];
  ptx::cp_async_wait<0>();
  __syncthreads();
  for (int w = 0; w < 4; ++w) out[4 * thread + w] = first[w] + 3 * stages[kWords + 4 * other + w];
}

__global__ void half_conversions(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    const __half rounded = __float2half_rn(as_float(in[i]));
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    out[i] = bits ^ as_bits(__half2float(rounded));
  }
}

__global__ void bfloat16_conversions(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    const __nv_bfloat16 rounded = __float2bfloat16_rn(as_float(in[i]));
    uint16_t bits;
    memcpy(&bits, &rounded, sizeof bits);
    out[i] = bits ^ as_bits(__bfloat162float(rounded));
  }
}

__global__ void warp_collectives(const uint32_t* in, uint32_t* out) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % 32;
  const uint32_t mine = in[thread];
  out[4 * thread] = __shfl_down_sync(0xffffffffu, mine, 5) + 3 * __shfl_up_sync(0xffffffffu, mine, 3, 8);
  out[4 * thread + 1] = __shfl_xor_sync(0xffffffffu, mine, 9, 16) ^ __shfl_sync(0xffffffffu, mine, 21);
  out[4 * thread + 2] = __ballot_sync(0xffffffffu, static_cast<int>(mine >> lane & 1u));
  out[4 * thread + 3] = __reduce_add_sync(0xffffffffu, mine) + static_cast<uint32_t>(__popc(mine));
}

// Inside or not, by a bit of the input; 16 bytes, then 4.
__global__ void cp_async_or_zero(const uint32_t* in, uint32_t* out) {
  uint32_t* const stages = dynamic_shared<uint32_t>();
  const int thread = static_cast<int>(threadIdx.x);
  const uint32_t mine = in[thread];
  ptx::cp_async_or_zero<16>(stages + 4 * thread, in + 4 * ((thread + 9) % kThreads), mine & 1u);
  ptx::cp_async_or_zero<4>(stages + kWords + thread, in + (thread + 50) % kWords, mine & 2u);
  ptx::cp_async_commit();
  ptx::cp_async_wait<0>();
  __syncthreads();
  const auto pack = ptx::load_shared<uint4>(stages + 4 * thread);
  out[4 * thread] = pack.x, out[4 * thread + 1] = pack.y, out[4 * thread + 2] = pack.z ^ pack.w;
  out[4 * thread + 3] = ptx::load_shared<uint32_t>(stages + kWords + thread);
}

__global__ void shared_accesses(const uint32_t* in, uint32_t* out) {
  uint32_t* const words = dynamic_shared<uint32_t>();
  const int thread = static_cast<int>(threadIdx.x);
  ptx::store_shared(words + 4 * thread, uint4{in[thread], in[thread + 100], in[thread + 200], in[thread + 300]});
  __syncthreads();
  for (int i = thread; i < kWords; i += kThreads) out[i] = ptx::load_shared<uint32_t>(words + (i * 5 + 7) % kWords);
}

__global__ void bytes_and_bits(const uint32_t* in, uint32_t* out) {
  for (int i = threadIdx.x; i < kWords; i += kThreads) {
    const uint32_t a = in[i], b = in[(i * 7 + 3) % kWords], c = in[(i * 5 + 1) % kWords];
    out[i] = __dp4a(a, b, c) + 3 * __byte_perm(a, b, c) + 5 * ptx::select_bits(a, b, c);
  }
}

template <class Product>
__device__ __forceinline__ void multiply(const uint32_t* in, uint32_t* out, const Product& product) {
  const int thread = static_cast<int>(threadIdx.x);
  uint32_t a[4], b[2];
  int32_t d[4];
  for (int r = 0; r < 4; ++r) a[r] = in[4 * thread + r], d[r] = static_cast<int32_t>(in[(4 * thread + r + 77) % kWords]);
  for (int r = 0; r < 2; ++r) b[r] = in[(2 * thread + r + 300) % kWords];
  product(d, a, b);
  for (int r = 0; r < 4; ++r) out[4 * thread + r] = static_cast<uint32_t>(d[r]);
}

__global__ void mma_u8(const uint32_t* in, uint32_t* out) {
  multiply(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_u8(d, a, b); });
}

__global__ void mma_b1(const uint32_t* in, uint32_t* out) {
  multiply(in, out, [](auto& d, const auto& a, const auto& b) { ptx::mma_b1(d, a, b); });
}

struct Case {
  const char* name;
  Kernel kernel;
};
const Case CASES[] = {
    {"max_nan", max_nan},
    {"min_nan", min_nan},
    {"store_16", store_16},
    {"cp_async", cp_async},
    {"half_conversions", half_conversions},
    {"bfloat16_conversions", bfloat16_conversions},
    {"warp_collectives", warp_collectives},
    {"cp_async_or_zero", cp_async_or_zero},
    {"shared_accesses", shared_accesses},
    {"bytes_and_bits", bytes_and_bits},
    {"mma_u8", mma_u8},
    {"mma_b1", mma_b1},
};

// Every class of float, values around the halves' ends, then random bits.
std::vector<uint32_t> inputs() {
  std::vector<uint32_t> words = {0x00000000u, 0x80000000u, 0x7f800000u, 0xff800000u, 0x7fc00000u, 0xffc12345u, 0x7f812345u,
                                 0x00000001u, 0x80000001u, 0x007fffffu, 0x00800000u, 0x7f7fffffu, 0xff7fffffu, 0x477fe000u,
                                 0x477fefffu, 0x477ff000u, 0x33000000u, 0x33000001u, 0x33800000u, 0x387fc000u, 0x38800000u,
                                 0x3f800000u, 0x3f801000u, 0x3f803000u, 0x3f808000u, 0x3f818000u, 0x7f7f8000u, 0xbf800000u};
  uint32_t state = 2463534242u;
  while (words.size() < kWords) {
    state ^= state << 13, state ^= state >> 17, state ^= state << 5;
    words.push_back(words.size() % 2 ? state : 0x30000000u + state % 0x20000000u);
  }
  return words;
}

const char* run(Kernel kernel, const std::vector<uint32_t>& in, std::vector<uint32_t>& out) {
  const size_t bytes = kWords * sizeof(uint32_t);
  cudaLaunchConfig_t config{};
  config.gridDim = {1, 1, 1};
  config.blockDim = {kThreads, 1, 1};
  config.dynamicSmemBytes = 2 * bytes;
#if defined(QK_EMULATOR)
  alignas(16) static uint32_t from[kWords], to[kWords];
  std::memcpy(from, in.data(), bytes);
  std::memset(to, 0xff, bytes);
  cudaLaunchKernelEx(&config, kernel, from, to);
  std::memcpy(out.data(), to, bytes);
#else
  uint32_t *from = nullptr, *to = nullptr;
  cudaMalloc(&from, bytes);
  cudaMalloc(&to, bytes);
  cudaMemcpy(from, in.data(), bytes, cudaMemcpyHostToDevice);
  cudaMemset(to, 0xff, bytes);
  cudaLaunchKernelEx(&config, kernel, static_cast<const uint32_t*>(from), to);
  cudaMemcpy(out.data(), to, bytes, cudaMemcpyDeviceToHost);
  cudaFree(from);
  cudaFree(to);
#endif
  const cudaError_t error = cudaGetLastError();
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace conformance

// "name: " and the output in hexadecimal, a line a case.
int main() {
  const std::vector<uint32_t> in = conformance::inputs();
  std::vector<uint32_t> out(conformance::kWords);
  for (const auto& [name, kernel] : conformance::CASES) {
    if (const char* error = conformance::run(kernel, in, out)) {
      std::printf("%s: error: %s\n", name, error);
      return 1;
    }
    std::printf("%s:", name);
    for (const uint32_t word : out) std::printf(" %08x", word);
    std::printf("\n");
  }
}

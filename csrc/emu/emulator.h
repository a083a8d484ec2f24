#pragma once
// CUDA threads on the CPU: every thread of a block is a fiber, blocks run one after another, and everything that CUDA leaves
// undefined is an error with the names of the kernel, the block and the thread. The kernels are those of csrc/cuda,
// unmodified; csrc/emu/include stands in for CUDA's own headers.
//
// What is watched:
//   barriers            all threads of the block must wait at the same __syncthreads
//   warp collectives    every lane of the mask must arrive at the same call with the same mask; no lane may be read outside
//   it shared memory       0xff at block start, so that a read before the write shows; arrays are indexed within their
//   bounds;
//                       the space around dynamic shared memory is intact when the block ends
//   cp.async            bytes arrive when they are waited for, not before
//   bank conflicts      of accesses by csrc/cuda/ptx/shared.cuh, counted by line of code (csrc/emu/banks.cpp)
//   order of threads    random, by QK_EMU_SEED: a result that needs a barrier that is not there changes with the seed

#include <cstddef>
#include <cstdint>
#include <source_location>
#include <string>

#include "emu/types.h"

namespace qk::emu {

using Where = std::source_location;

inline constexpr int kWarp = 32;

// What one warp collective is about: the values that the lanes of `mask` brought, by lane.
struct Exchange {
  unsigned mask;
  uint64_t value[kWarp];
  int argument[kWarp];  // lane, delta or xor mask of a shuffle
  int width[kWarp];
};
// The result for `lane`. Returns false if the lane reads one that is not in the mask.
using Resolve = bool (*)(const Exchange& exchange, int lane, uint64_t* result);

// Runs body(context) for every thread of the grid. Returns false after an error, which last_error() then tells.
bool run(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel, void (*body)(void*), void* context);

// The error of the last failed launch, or an empty text. Clears it.
std::string take_error();
bool has_error();

// For the thread that is running.
void sync_threads(const Where& where);
uint64_t exchange(unsigned mask, uint64_t value, int argument, int width, Resolve resolve, const Where& where);
unsigned active_mask();
void* dynamic_shared();
void copy_async(void* shared, const void* global, size_t bytes);
void commit_copies();
void wait_copies(int groups_in_flight);

// Bank conflicts: a warp's accesses from one line of code, the n-th of every lane together, are one instruction. Its bytes
// should take as few passes over the 32 banks of 4 bytes as they fill; every pass beyond is a conflict.
void shared_access(const void* shared, size_t bytes, const Where& where);

// Ends the launch: "kernel, block (x, y, z), thread (x, y, z): what, at file:line".
[[noreturn]] void fail(const std::string& what, const char* file, unsigned line);

// QK_EMU_SEED, 0 by default.
uint64_t seed();
// QK_EMU_ARCH, 90 by default: the compute capability that the emulated device reports.
int architecture();

}  // namespace qk::emu

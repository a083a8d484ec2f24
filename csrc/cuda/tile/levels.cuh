#pragma once
// The nearest level of a learned basis: a walk down the search tree of core/learned_basis.h, which lies in the caches.

#include <cuda_runtime.h>

#include "core/learned_basis.h"

namespace qk::cuda {

// Floats of a channel's table: thresholds and levels by node, then the codes of the levels, as ints.
QK_HOST_DEVICE int64_t table_size(int bits) { return int64_t{3} << bits; }

__device__ __forceinline__ int child_of(const float* __restrict__ table, int node, float x) {
  return 2 * node + (x > table[node] ? 1 : 0);
}

// Of a value in the table of its channel. That of a NaN is the lowest.
__device__ __forceinline__ int nearest_leaf(const float* __restrict__ table, int bits, float x) {
  int node = 1;
  for (int depth = 0; depth < bits; ++depth) node = child_of(table, node, x);
  return node;
}

__device__ __forceinline__ int code_at(const float* table, int bits, int leaf) {
  return reinterpret_cast<const int32_t*>(table)[(1 << bits) + leaf];
}

}  // namespace qk::cuda

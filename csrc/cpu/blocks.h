#pragma once
// Memory for the results of ops: a block that is given back is kept, and the last one of a size is the first to be taken
// again. A loop then writes where its caches and page tables already reach, which malloc does not care for: blocks of
// several MiB wander through its heap, and those of 32 MiB and more are returned to the system at each free.

#include <cstddef>

namespace qk::cpu {

inline constexpr size_t kSmallestBlock = 64 << 10;  // what is smaller malloc keeps well itself

// A block of at least `bytes`, aligned to a page, with whatever its last user left. Null where there is no memory.
void* take_block(size_t bytes);
// The size it was taken with.
void give_block(void* block, size_t bytes);
// Bytes that are kept at most, of all sizes together: QK_CPU_CACHE_MB, or 256 MiB.
size_t kept_limit();
// Returns what is kept to the system, and how much that was.
size_t release_blocks();

}  // namespace qk::cpu

#pragma once
// What this processor can do at most: loops whose only work is the instruction, or the traffic, that a kernel is judged by.

#include <cstddef>
#include <cstdint>

namespace qk::cpu {

enum class Unit {
  kFp32,      // float32 multiply-add: two operations an element
  kInt8,      // 8-bit multiply-add into int32 (VNNI, maddubs, or plain): two operations an element
  kPopcount,  // AND and population count of bits: two operations a bit
  kLookup     // a byte found in a table, the sum of some of four codes: two operations a code
};

// Seconds of a monotonic clock around the loop alone, so that threads can be laid over each other, and the operations done
// in it.
struct PeakRun {
  double begin;
  double end;
  double operations;
};

PeakRun run_peak(Unit unit, int64_t rounds);

// Buffers of whole 64-byte cache lines, and aligned to them.

// Reads source[0, bytes) `repeats` times.
PeakRun run_read(const void* source, size_t bytes, int64_t repeats);

// Copies it to destination; bytes read and bytes written both count. `bypass` writes around the caches where the
// instruction set can.
PeakRun run_copy(void* destination, const void* source, size_t bytes, int64_t repeats, bool bypass);

}  // namespace qk::cpu

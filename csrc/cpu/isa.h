#pragma once
// Which instruction set's kernels run: the best this processor has, or another one named by QK_CPU_ISA.

namespace qk::cpu {

// kZen4 is kAvx512 on a processor that takes 512 bits in two halves, whose element-wise kernels have other limits.
enum class Isa { kPortable, kAvx2, kZen4, kAvx512 };

Isa chosen_isa();
const char* name_of(Isa isa);

// Whether the processor has an instruction that rounds to bfloat16, which AVX-512 alone does not promise.
bool rounds_to_bfloat16();

}  // namespace qk::cpu

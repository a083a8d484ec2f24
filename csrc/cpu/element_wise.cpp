// This instruction set's kernels that walk tensors, for csrc/cpu/dispatch.cpp to choose from.

#include "cpu/attention.h"
#include "cpu/fake_quantize.h"
#include "cpu/kernels.h"
#include "cpu/learned_basis.h"
#include "cpu/stats.h"

namespace qk::cpu::QK_CPU_ISA {

extern const ElementWise kElementWise;
const ElementWise kElementWise = {
    .channel_stats = channel_stats,
    .conditional_abs_mean = conditional_abs_mean,
    .range_errors = range_errors,
    .fake_quantize_forward = fake_quantize_forward,
    .fake_quantize_backward = fake_quantize_backward,
    .fake_quantize_masked = fake_quantize_masked,
    .apply_mask = apply_mask,
    .attention_quantize_forward = attention_quantize_forward,
    .attention_quantize_backward = attention_quantize_backward,
    .learned_basis_forward = learned_basis_forward,
    .learned_basis_backward = learned_basis_backward,
    .learned_basis_encode = learned_basis_encode,
};

}  // namespace qk::cpu::QK_CPU_ISA

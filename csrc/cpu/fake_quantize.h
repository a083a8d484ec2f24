#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

void fake_quantize_forward(const FakeQuantizeArgs& args);
void fake_quantize_backward(const FakeQuantizeArgs& args);
void fake_quantize_masked(const FakeQuantizeArgs& args);
void apply_mask(const ApplyMaskArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

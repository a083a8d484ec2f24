#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

void attention_quantize_forward(const AttentionArgs& args);
void attention_quantize_backward(const AttentionArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

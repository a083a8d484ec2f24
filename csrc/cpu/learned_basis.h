#pragma once
#include "core/learned_basis.h"

namespace qk::cpu::QK_CPU_ISA {

void learned_basis_forward(const LearnedBasisArgs& args);
void learned_basis_backward(const LearnedBasisArgs& args);
void learned_basis_encode(const LearnedEncodeArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

void lowbit_conv2d(const LowbitArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

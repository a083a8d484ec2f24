#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

// args.geometry: a 1 x 1 convolution of 1 x 1 images, one image a row.
void lowbit_linear(const LowbitArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

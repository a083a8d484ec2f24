// A linear layer on codes is the smallest convolution, and runs as one: every row is a pixel of its own image.

#include "cpu/matmul.h"

#include "cpu/conv.h"

namespace qk::cpu::QK_CPU_ISA {

void lowbit_linear(const LowbitArgs& args) { lowbit_conv2d(args); }

}  // namespace qk::cpu::QK_CPU_ISA

// This instruction set's kernels, for csrc/cpu/dispatch.cpp to choose from.

#include "cpu/conv.h"
#include "cpu/fake_quantize.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"

namespace qk::cpu::QK_CPU_ISA {

extern const Kernels kKernels;
const Kernels kKernels = {
    .fake_quantize_forward = fake_quantize_forward,
    .fake_quantize_backward = fake_quantize_backward,
    .lowbit_linear = lowbit_linear,
    .lowbit_conv2d = lowbit_conv2d,
};

}  // namespace qk::cpu::QK_CPU_ISA

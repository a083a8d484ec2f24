// This instruction set's kernels for codes and products of them, for csrc/cpu/dispatch.cpp to choose from.

#include "cpu/bitplanes.h"
#include "cpu/conv.h"
#include "cpu/kernels.h"
#include "cpu/matmul.h"
#include "cpu/prepacked.h"

namespace qk::cpu::QK_CPU_ISA {

extern const LowBit kLowBit;
const LowBit kLowBit = {
    .encode = encode,
    .pack_bitplanes = pack_bitplanes,
    .unpack_bitplanes = unpack_bitplanes,
    .quantize_pack = quantize_pack,
    .lowbit_linear = lowbit_linear,
    .lowbit_conv2d = lowbit_conv2d,
    .prepacked_bytes = prepacked_bytes,
    .prepack = prepack,
};

}  // namespace qk::cpu::QK_CPU_ISA

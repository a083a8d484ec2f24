#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

void encode(const EncodeArgs& args);
void pack_bitplanes(const PackArgs& args);
void unpack_bitplanes(const UnpackArgs& args);
void quantize_pack(const QuantizePackArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

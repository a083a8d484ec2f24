#pragma once
// The CPU backend as csrc/ops sees it: one table of kernels, chosen once by what the processor can do.

#include "core/args.h"
#include "core/learned_basis.h"

namespace qk::cpu {

// What walks a tensor by cpu/traverse.h.
struct ElementWise {
  void (*channel_stats)(const StatsArgs&);
  void (*conditional_abs_mean)(const ConditionalMeanArgs&);
  void (*range_errors)(const RangeErrorsArgs&);
  void (*fake_quantize_forward)(const FakeQuantizeArgs&);
  void (*fake_quantize_backward)(const FakeQuantizeArgs&);
  void (*fake_quantize_masked)(const FakeQuantizeArgs&);
  void (*apply_mask)(const ApplyMaskArgs&);
  void (*attention_quantize_forward)(const AttentionArgs&);
  void (*attention_quantize_backward)(const AttentionArgs&);
  void (*learned_basis_forward)(const LearnedBasisArgs&);
  void (*learned_basis_backward)(const LearnedBasisArgs&);
  void (*learned_basis_encode)(const LearnedEncodeArgs&);
};

// Codes, bit planes and products of them.
struct LowBit {
  void (*encode)(const EncodeArgs&);
  void (*pack_bitplanes)(const PackArgs&);
  void (*unpack_bitplanes)(const UnpackArgs&);
  void (*quantize_pack)(const QuantizePackArgs&);
  void (*lowbit_linear)(const LowbitArgs&);
  void (*lowbit_conv2d)(const LowbitArgs&);
  int64_t (*prepacked_bytes)(const LowbitArgs&);
  void (*prepack)(const LowbitArgs&, uint8_t* to);
};

struct Kernels : ElementWise, LowBit {};

// Those of chosen_isa() (cpu/isa.h).
const Kernels& kernels();

}  // namespace qk::cpu

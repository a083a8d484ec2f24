#pragma once
// The CPU backend as csrc/ops sees it: one table of kernels, chosen once by what the processor can do.

#include "core/args.h"

namespace qk::cpu {

struct Kernels {
  void (*fake_quantize_forward)(const FakeQuantizeArgs&);
  void (*fake_quantize_backward)(const FakeQuantizeArgs&);
  void (*lowbit_linear)(const LowbitArgs&);
  void (*lowbit_conv2d)(const LowbitArgs&);
};

// Those of chosen_isa() (cpu/isa.h).
const Kernels& kernels();

}  // namespace qk::cpu

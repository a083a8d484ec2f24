// The CPU backend: csrc/cpu behind the shared checks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "ops/conv.h"
#include "ops/fake_quantize.h"
#include "ops/matmul.h"

namespace qk::ops {
namespace {

// Kernels split their work through torch's thread pool, so torch.set_num_threads holds for them too.
[[maybe_unused]] const bool kParallelSet = [] {
  cpu::set_parallel_for([](int64_t count, int64_t grain, void* context, cpu::Body body) {
    torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) { body(context, begin, end); });
  });
  return true;
}();

struct Cpu {
  static void fake_quantize_forward(const FakeQuantizeArgs& args, const Tensor&) { cpu::kernels().fake_quantize_forward(args); }
  static void fake_quantize_backward(const FakeQuantizeArgs& args, const Tensor&) { cpu::kernels().fake_quantize_backward(args); }
  static void lowbit_linear(const LowbitArgs& args) { cpu::kernels().lowbit_linear(args); }
  static void lowbit_conv2d(const LowbitArgs& args) { cpu::kernels().lowbit_conv2d(args); }
};

}  // namespace
}  // namespace qk::ops

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) {
  using namespace qk::ops;
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<Cpu>));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward<Cpu>));
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear<Cpu>));
  m.impl("lowbit_conv2d", TORCH_BOX(&lowbit_conv2d<Cpu>));
}

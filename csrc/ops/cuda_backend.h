#pragma once
// The kernels of csrc/cuda behind the shared checks, for a device and for the emulator. A Runner says where they run:
//
//   template <class F> static void run(const char* op, const Tensor& x, F f)
//       calls f(cuda::Context) for the device that x is on, and throws what went wrong with the op's name

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <vector>

#include "cuda/kernels.h"
#include "ops/attention.h"
#include "ops/bitplanes.h"
#include "ops/conv.h"
#include "ops/fake_quantize.h"
#include "ops/learned_basis.h"
#include "ops/matmul.h"
#include "ops/stats.h"

namespace qk::ops {

// Memory from torch's allocator, given back when the call is over: what the stream runs next may use it again.
class Workspace {
 public:
  explicit Workspace(const Tensor& x) : like_(x) {}
  float* operator()(int64_t floats) {
    held_.push_back(new_tensor(like_, {floats}, ScalarType::Float));
    return static_cast<float*>(held_.back().mutable_data_ptr());
  }

 private:
  const Tensor& like_;
  std::vector<Tensor> held_;
};

inline void check_launch(const char* op) {
  const char* error = cuda::last_error();
  STD_TORCH_CHECK(!error, op, ": the CUDA launch failed: ", error ? error : "");
}

template <class Runner>
struct CudaBackend {
  template <class Args>
  static void run(const char* op, const Tensor& x, void (*kernel)(const Args&, const cuda::Context&), const Args& args) {
    Runner::run(op, x, [&](const cuda::Context& context) { kernel(args, context); });
  }

  static void channel_stats(const StatsArgs& args, const Tensor& x) { run("channel_stats", x, cuda::channel_stats, args); }
  static void conditional_abs_mean(const ConditionalMeanArgs& args, const Tensor& x) {
    run("conditional_abs_mean", x, cuda::conditional_abs_mean, args);
  }
  static void range_errors(const RangeErrorsArgs& args, const Tensor& x) {
    run("range_errors", x, cuda::range_errors, args);
  }
  static void fake_quantize_forward(const FakeQuantizeArgs& args, const Tensor& x) {
    run("fake_quantize", x, cuda::fake_quantize_forward, args);
  }
  static void fake_quantize_backward(const FakeQuantizeArgs& args, const Tensor& x) {
    run("fake_quantize_backward", x, cuda::fake_quantize_backward, args);
  }
  static void fake_quantize_masked(const FakeQuantizeArgs& args, const Tensor& x) {
    run("fake_quantize_masked", x, cuda::fake_quantize_masked, args);
  }
  static void apply_mask(const ApplyMaskArgs& args, const Tensor& grad) { run("apply_mask", grad, cuda::apply_mask, args); }
  static void attention_quantize_forward(const AttentionArgs& args, const Tensor& x) {
    run("attention_quantize", x, cuda::attention_quantize_forward, args);
  }
  static void attention_quantize_backward(const AttentionArgs& args, const Tensor& x) {
    run("attention_quantize_backward", x, cuda::attention_quantize_backward, args);
  }
  static void learned_basis_forward(const LearnedBasisArgs& args, const Tensor& x) {
    run("learned_basis_quantize", x, cuda::learned_basis_forward, args);
  }
  static void learned_basis_backward(const LearnedBasisArgs& args, const Tensor& x) {
    run("learned_basis_quantize_backward", x, cuda::learned_basis_backward, args);
  }
  static void learned_basis_encode(const LearnedEncodeArgs& args, const Tensor& x) {
    run("learned_basis_encode", x, cuda::learned_basis_encode, args);
  }
  static void encode(const EncodeArgs& args, const Tensor& x) { run("encode", x, cuda::encode, args); }
  static void pack_bitplanes(const PackArgs& args, const Tensor& codes) {
    run("pack_bitplanes", codes, cuda::pack_bitplanes, args);
  }
  static void unpack_bitplanes(const UnpackArgs& args, const Tensor& planes) {
    run("unpack_bitplanes", planes, cuda::unpack_bitplanes, args);
  }
  static void quantize_pack(const QuantizePackArgs& args, const Tensor& x) {
    run("quantize_pack", x, cuda::quantize_pack, args);
  }
  static void lowbit_linear(const LowbitArgs& args, const Tensor& x) { run("lowbit_linear", x, cuda::lowbit_linear, args); }
  static void lowbit_conv2d(const LowbitArgs& args, const Tensor& x) { run("lowbit_conv2d", x, cuda::lowbit_conv2d, args); }
  // Planes are unpacked in registers, where they cost little.
  static int64_t prepacked_bytes(const LowbitArgs&) { return 0; }
  static void prepack(const LowbitArgs&, uint8_t*) {}
};

template <class Runner>
void implement(torch::stable::detail::StableLibrary& m) {
  using Kernels = CudaBackend<Runner>;
  m.impl("channel_stats", TORCH_BOX(&channel_stats<Kernels>));
  m.impl("minmax_grids", TORCH_BOX(&minmax_grids<Kernels>));
  m.impl("conditional_abs_mean", TORCH_BOX(&conditional_abs_mean<Kernels>));
  m.impl("range_errors", TORCH_BOX(&range_errors<Kernels>));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<Kernels>));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward<Kernels>));
  m.impl("fake_quantize_masked", TORCH_BOX(&fake_quantize_masked<Kernels>));
  m.impl("apply_mask", TORCH_BOX(&apply_mask<Kernels>));
  m.impl("attention_quantize", TORCH_BOX(&attention_quantize<Kernels>));
  m.impl("minmax_attention_quantize", TORCH_BOX(&minmax_attention_quantize<Kernels>));
  m.impl("attention_quantize_backward", TORCH_BOX(&attention_quantize_backward<Kernels>));
  m.impl("attention_gradient", TORCH_BOX(&attention_gradient<Kernels>));
  m.impl("learned_basis_quantize", TORCH_BOX(&learned_basis_quantize<Kernels>));
  m.impl("learned_basis_quantize_backward", TORCH_BOX(&learned_basis_quantize_backward<Kernels>));
  m.impl("learned_basis_encode", TORCH_BOX(&learned_basis_encode<Kernels>));
  m.impl("encode", TORCH_BOX(&encode<Kernels>));
  m.impl("pack_bitplanes", TORCH_BOX(&pack_bitplanes<Kernels>));
  m.impl("unpack_bitplanes", TORCH_BOX(&unpack_bitplanes<Kernels>));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack<Kernels>));
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear<Kernels>));
  m.impl("lowbit_conv2d", TORCH_BOX(&lowbit_conv2d<Kernels>));
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight<Kernels>));
}

}  // namespace qk::ops

// The CUDA backend: csrc/cuda behind the shared checks, on torch's current stream.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels.h"
#include "ops/fake_quantize.h"

namespace qk::ops {
namespace {

// Device guard, current stream, and the launch's error as an exception with the op's name.
template <class F>
void launch(const char* op, const Tensor& x, F kernel) {
  const auto device = static_cast<int32_t>(x.get_device_index());
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  kernel(cuda::Context{stream, cuda::multiprocessors()});
  const char* error = cuda::last_error();
  STD_TORCH_CHECK(!error, op, ": the CUDA launch failed: ", error ? error : "");
}

struct Cuda {
  static void fake_quantize_forward(const FakeQuantizeArgs& args, const Tensor& x) {
    launch("fake_quantize", x, [&](const cuda::Context& context) { cuda::fake_quantize_forward(args, context); });
  }

  static void fake_quantize_backward(const FakeQuantizeArgs& args, const Tensor& x) {
    launch("fake_quantize_backward", x, [&](const cuda::Context& context) {
      const Tensor workspace =
          torch::stable::new_empty(x, {cuda::fake_quantize_workspace(args, context)}, ScalarType::Float);
      cuda::fake_quantize_backward(args, context, static_cast<float*>(workspace.mutable_data_ptr()));
    });
  }
};

}  // namespace
}  // namespace qk::ops

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) {
  using namespace qk::ops;
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<Cuda>));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward<Cuda>));
}

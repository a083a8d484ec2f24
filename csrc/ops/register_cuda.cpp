// The CUDA backend: torch's current stream on the tensor's device.

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "ops/cuda_backend.h"

namespace qk::ops {
namespace {

struct OnDevice {
  template <class F>
  static void run(const char* op, const Tensor& x, F kernel) {
    const auto device = static_cast<int32_t>(x.get_device_index());
    const torch::stable::accelerator::DeviceGuard guard(device);
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
    Workspace workspace(x);
    kernel(cuda::Context{stream, cuda::multiprocessors(), cuda::architecture(), std::ref(workspace)});
    check_launch(op);
  }
};

}  // namespace
}  // namespace qk::ops

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CUDA, m) { qk::ops::implement<qk::ops::OnDevice>(m); }

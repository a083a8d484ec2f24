// The emulator: the CUDA kernels on CPU tensors, in a namespace of their own.

#include "ops/cuda_backend.h"
#include "ops/schemas.h"

namespace qk::ops {
namespace {

struct OnEmulator {
  template <class F>
  static void run(const char* op, const Tensor& x, F kernel) {
    Workspace workspace(x);
    kernel(cuda::Context{nullptr, cuda::multiprocessors(), cuda::architecture(), std::ref(workspace)});
    check_launch(op);
  }
};

}  // namespace
}  // namespace qk::ops

STABLE_TORCH_LIBRARY(quantkernels_emu, m) { qk::ops::define_schemas(m); }

STABLE_TORCH_LIBRARY_IMPL(quantkernels_emu, CPU, m) { qk::ops::implement<qk::ops::OnEmulator>(m); }

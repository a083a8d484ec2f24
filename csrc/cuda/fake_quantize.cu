// Launches of fake_quantize: which kernel a layout is given, and how large a grid.

#include "cuda/fake_quantize.cuh"

#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/kernels.h"

namespace qk::cuda {
namespace {

constexpr int kBlocksPerMultiprocessor = 8;  // 8 * 256 threads fill a multiprocessor of every target
constexpr int64_t kMinRun = 32;              // shorter runs leave most lanes of a warp in other channels

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool aligned(const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; }

struct BackwardPlan {
  bool by_columns;
  int64_t slices;    // blocks that share a channel or a group of columns
  int64_t partials;  // partial sums a channel
};

// A function of the layout and the chip alone, so the order of additions never changes between runs.
BackwardPlan plan_backward(const Layout& layout, const Context& context) {
  const int64_t blocks = static_cast<int64_t>(context.multiprocessors) * kBlocksPerMultiprocessor;
  BackwardPlan plan{};
  plan.by_columns = layout.channels > 1 && layout.inner < kMinRun;
  if (plan.by_columns) {
    const int64_t groups = divide_up(layout.channels * layout.inner, kColumnWidth);
    plan.slices = std::clamp<int64_t>(blocks / groups, 1, divide_up(layout.outer, kColumnRows));
    plan.partials = layout.inner * plan.slices;
  } else {
    plan.slices = std::clamp<int64_t>(blocks / layout.channels, 1, divide_up(layout.outer * layout.inner, kThreads));
    plan.partials = plan.slices;
  }
  return plan;
}

template <class T, Kind kKind>
void launch_forward(const FakeQuantizeArgs& args, const Context& context) {
  const Layout& layout = args.layout;
  const bool packed = aligned(args.x) && aligned(args.out) && (layout.channels == 1 || layout.inner % Pack<T>::kSize == 0);
  const int64_t units = divide_up(layout.numel(), packed ? Pack<T>::kSize : 1);
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(
      divide_up(units, kThreads), static_cast<int64_t>(context.multiprocessors) * kBlocksPerMultiprocessor));
  auto* kernel = packed ? fake_quantize_forward_kernel<T, kKind, true> : fake_quantize_forward_kernel<T, kKind, false>;
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(context.stream)>>>(
      static_cast<const T*>(args.x), static_cast<T*>(args.out), args.grid, layout, static_cast<float>(args.levels));
}

template <class T, Ste kSte>
void launch_backward(const FakeQuantizeArgs& args, const Context& context, float* workspace) {
  const Layout& layout = args.layout;
  const BackwardPlan plan = plan_backward(layout, context);
  const auto stream = static_cast<cudaStream_t>(context.stream);
  const int64_t groups = plan.by_columns ? divide_up(layout.channels * layout.inner, kColumnWidth) : layout.channels;
  auto* kernel =
      plan.by_columns ? fake_quantize_backward_column_kernel<T, kSte> : fake_quantize_backward_run_kernel<T, kSte>;
  kernel<<<dim3(static_cast<unsigned>(groups), static_cast<unsigned>(plan.slices)), kThreads, 0, stream>>>(
      static_cast<const T*>(args.grad), static_cast<const T*>(args.x), static_cast<T*>(args.out), args.grid, workspace,
      layout, static_cast<float>(args.levels));
  fake_quantize_reduce_kernel<<<static_cast<unsigned>(layout.channels), kThreads, 0, stream>>>(workspace, args.sums,
                                                                                               plan.partials);
}

}  // namespace

void fake_quantize_forward(const FakeQuantizeArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    switch (args.kind) {
      case Kind::kUniform:
        return launch_forward<T, Kind::kUniform>(args, context);
      case Kind::kBinary:
        return launch_forward<T, Kind::kBinary>(args, context);
      case Kind::kTernary:
        return launch_forward<T, Kind::kTernary>(args, context);
      case Kind::kIdentity:
        return;  // refused by csrc/ops
    }
  });
}

int64_t fake_quantize_workspace(const FakeQuantizeArgs& args, const Context& context) {
  return args.layout.channels * plan_backward(args.layout, context).partials * 3;
}

void fake_quantize_backward(const FakeQuantizeArgs& args, const Context& context, float* workspace) {
  with_type(args.dtype, [&]<class T>(T*) {
    switch (args.ste) {
      case Ste::kIdentity:
        return launch_backward<T, Ste::kIdentity>(args, context, workspace);
      case Ste::kClip:
        return launch_backward<T, Ste::kClip>(args, context, workspace);
      case Ste::kFull:
        return launch_backward<T, Ste::kFull>(args, context, workspace);
    }
  });
}

}  // namespace qk::cuda

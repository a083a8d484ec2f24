// fake_quantize and encode: one pass forward; backward one pass that reduces as it goes.

#include "cuda/fake_quantize.cuh"

namespace qk::cuda {

void fake_quantize_forward(const FakeQuantizeArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      traverse(
          context, args.layout,
          FakeQuantizeForward<T, kKind>{
              {static_cast<const T*>(args.x)}, static_cast<T*>(args.out), args.grid, static_cast<float>(args.levels), {}});
    });
  });
}

void fake_quantize_backward(const FakeQuantizeArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    if (!args.sums && args.ste != Ste::kIdentity)
      return traverse(context, args.layout,
                      FakeQuantizeClip<T>{{static_cast<const T*>(args.grad), static_cast<const T*>(args.x)},
                                          static_cast<T*>(args.out),
                                          args.grid,
                                          static_cast<float>(args.levels),
                                          {}});
    const auto run = [&]<bool kInsideSum>() {
      traverse(context, args.layout,
               FakeQuantizeBackward<T, kInsideSum>{{static_cast<const T*>(args.grad), static_cast<const T*>(args.x)},
                                                   static_cast<T*>(args.out),
                                                   args.grid,
                                                   static_cast<float>(args.levels),
                                                   {{}, args.sums}});
    };
    switch (args.ste) {
      case Ste::kIdentity: {
        const auto stream = static_cast<cudaStream_t>(context.stream);
        cudaMemcpyAsync(args.out, args.grad, args.layout.numel() * sizeof(T), cudaMemcpyDeviceToDevice, stream);
        if (args.sums) cudaMemsetAsync(args.sums, 0, args.layout.channels * 3 * sizeof(float), stream);
        return;
      }
      case Ste::kClip:
        return run.template operator()<false>();
      case Ste::kFull:
        return run.template operator()<true>();
    }
  });
}

void encode(const EncodeArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      traverse(context, args.layout,
               FakeQuantizeForward<T, kKind, uint8_t>{
                   {static_cast<const T*>(args.x)}, args.codes, args.grid, static_cast<float>(args.levels), {}});
    });
  });
}

}  // namespace qk::cuda

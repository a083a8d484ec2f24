// fake_quantize and encode: one pass forward; backward one pass that reduces as it goes.

#include "cuda/fake_quantize.cuh"

namespace qk::cuda {
namespace {

bool multiples_of_16(const void* a, const void* b) {
  return (reinterpret_cast<uintptr_t>(a) | reinterpret_cast<uintptr_t>(b)) % 16 == 0;
}

// For kernels that walk a tensor in memory order, a pack a thread.
template <class T>
dim3 blocks_of_packs(const Context& context, int64_t numel) {
  const int64_t most = int64_t{context.multiprocessors} * kBlocksPerMultiprocessor;
  return blocks(std::min(most, divide_up(numel, int64_t{kThreads} * kPackSize<T>)));
}

}  // namespace

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

void fake_quantize_masked(const FakeQuantizeArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    const auto kernel =
        args.layout.channels == 1 ? fake_quantize_masked_kernel<T, true> : fake_quantize_masked_kernel<T, false>;
    launch(context, blocks_of_packs<T>(context, args.layout.numel()), kThreads, kernel, static_cast<const T*>(args.x),
           args.grid, static_cast<T*>(args.out), args.mask, args.layout, static_cast<float>(args.levels),
           multiples_of_16(args.x, args.out));
  });
}

void apply_mask(const ApplyMaskArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    launch(context, blocks_of_packs<T>(context, args.numel), kThreads, apply_mask_kernel<T>,
           static_cast<const T*>(args.grad), args.mask, static_cast<T*>(args.out), args.numel,
           multiples_of_16(args.grad, args.out));
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

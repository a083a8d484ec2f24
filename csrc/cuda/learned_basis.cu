// learned_basis_quantize: the levels of every channel, then one pass over the tensor.

#include "cuda/learned_basis.cuh"

#include "cuda/learned_basis.h"

namespace qk::cuda {
namespace {

// [channels, table_size]
const float* level_tables(const LevelSource& source, int64_t channels, const Context& context) {
  float* const tables = context.workspace(channels * table_size(source.bits));
  launch(context, blocks(divide_up(channels << source.bits, kThreads)), kThreads, level_table_kernel, source, tables,
         channels);
  return tables;
}

const float* level_tables(const LearnedBasisArgs& args, const Context& context) {
  return level_tables({nullptr, args.basis, args.bits, args.encoding}, args.layout.channels, context);
}

template <class T, int kMax>
void train(const LearnedBasisArgs& args, const float* tables, const Context& context) {
  traverse(context, args.layout,
           LearnedBasisTrain<T, kMax>{{static_cast<const T*>(args.x)},
                                      static_cast<T*>(args.out),
                                      tables,
                                      args.encoding == Encoding::kSigned ? -1.0f : 0.0f,
                                      {{}, args.bits, args.gram, args.product}});
}

}  // namespace

const float* level_table(const float* grid, int bits, const Context& context) {
  return level_tables({grid, nullptr, bits, Encoding::kUnsigned}, 1, context);
}

void learned_basis_forward(const LearnedBasisArgs& args, const Context& context) {
  const float* const tables = level_tables(args, context);
  with_type(args.dtype, [&]<class T>(T*) {
    if (args.gram) {
      args.bits <= 2   ? train<T, 2>(args, tables, context)
      : args.bits <= 4 ? train<T, 4>(args, tables, context)
                       : train<T, kMaxBits>(args, tables, context);
    } else {
      traverse(context, args.layout,
               LearnedBasisForward<T>{{static_cast<const T*>(args.x)}, static_cast<T*>(args.out), tables, args.bits, {}});
    }
  });
}

void learned_basis_backward(const LearnedBasisArgs& args, const Context& context) {
  const float* const tables = level_tables(args, context);
  with_type(args.dtype, [&]<class T>(T*) {
    traverse(context, args.layout,
             LearnedBasisBackward<T>{{static_cast<const T*>(args.grad), static_cast<const T*>(args.x)},
                                     static_cast<T*>(args.out),
                                     tables,
                                     args.bits,
                                     {}});
  });
}

void learned_basis_encode(const LearnedEncodeArgs& args, const Context& context) {
  const LevelSource source{args.grid, nullptr, args.bits, Encoding::kUnsigned};
  const float* const tables = level_tables(source, args.layout.channels, context);
  with_type(args.dtype, [&]<class T>(T*) {
    traverse(context, args.layout,
             LearnedBasisForward<T, uint8_t>{{static_cast<const T*>(args.x)}, args.codes, tables, args.bits, {}});
  });
}

}  // namespace qk::cuda

// Packing, unpacking, and quantize-and-pack, which never stores the codes.

#include "cuda/bitplanes.cuh"

namespace qk::cuda {
namespace {

int64_t warps_of(const Context& context) { return int64_t{context.multiprocessors} * kBlocksPerMultiprocessor * kWarps; }

template <class Source>
void pack(const Context& context, const Source& source, Packing packing, int32_t* planes, int32_t* plane_sums) {
  packing.slices = std::clamp<int64_t>(warps_of(context) / packing.rows, 1, divide_up(packing.words, int64_t{kWordsAtOnce}));
  if (plane_sums && packing.slices > 1)
    cudaMemsetAsync(plane_sums, 0, packing.bits * packing.rows * sizeof(int32_t), static_cast<cudaStream_t>(context.stream));
  launch(context, blocks(divide_up(packing.rows * packing.slices, kWarps)), kThreads, pack_kernel<Source>, source, packing,
         planes, plane_sums);
}

}  // namespace

void pack_bitplanes(const PackArgs& args, const Context& context) {
  pack(context, StoredCodes{args.codes, args.kind}, {args.rows, args.columns, args.words, 1, args.bits}, args.planes,
       nullptr);
}

void quantize_pack(const QuantizePackArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    const QuantizedCodes<T> source{static_cast<const T*>(args.x), args.kind, args.grid, args.per_row,
                                   static_cast<float>(args.levels)};
    pack(context, source, {args.rows, args.columns, args.words, 1, args.bits}, args.planes, args.plane_sums);
  });
}

void unpack_bitplanes(const UnpackArgs& args, const Context& context) {
  const int64_t words = args.rows * args.words;
  // Fresh memory is aligned; rows are if their length is.
  const bool aligned = args.columns % 16 == 0 && reinterpret_cast<uintptr_t>(args.codes) % 16 == 0;
  launch(context, blocks(std::min(divide_up(words, kThreads), warps_of(context) / kWarps)), kThreads, unpack_kernel,
         args.planes, args.codes, args.rows, args.columns, args.words, args.kind, args.bits, aligned);
}

}  // namespace qk::cuda

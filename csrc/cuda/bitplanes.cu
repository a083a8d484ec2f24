// Packing, unpacking, and quantize-and-pack, which never stores the codes.

#include "cuda/bitplanes.cuh"

namespace qk::cuda {
namespace {

int64_t warps_of(const Context& context) { return int64_t{context.multiprocessors} * kBlocksPerMultiprocessor * kWarps; }

// alike: rows have the same parameters. Those that end with their words are then one long row, of which no lane idles.
template <Kind kKind, class Source>
void pack(const Context& context, const Source& source, bool alike, Packing packing, int32_t* planes, int32_t* plane_sums) {
  if (alike && !plane_sums && packing.columns % kWordBits == 0) {
    packing.columns *= packing.rows, packing.words *= packing.rows;
    packing.rows = 1;
  }
  const auto multiple = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  packing.slices = std::clamp<int64_t>(warps_of(context) / packing.rows, 1, divide_up(packing.words, int64_t{kWordsAWarp}));
  packing.aligned = packing.columns % kCodesALane == 0 && multiple(source.x, kCodesALane * sizeof(*source.x));
  packing.aligned_words = packing.words % kWordsALane == 0 && multiple(planes, kWordsALane * sizeof(int32_t));
  if (plane_sums && packing.slices > 1)
    cudaMemsetAsync(plane_sums, 0, packing.bits * packing.rows * sizeof(int32_t), static_cast<cudaStream_t>(context.stream));
  launch(context, blocks(divide_up(packing.rows * packing.slices, kWarps)), kThreads, pack_kernel<kKind, Source>, source,
         packing, planes, plane_sums);
}

}  // namespace

void pack_bitplanes(const PackArgs& args, const Context& context) {
  with_kind(args.kind, [&]<Kind kKind>() {
    pack<kKind>(context, StoredCodes<kKind>{args.codes}, true,
                {args.rows, args.columns, args.words, 1, args.bits, false, false}, args.planes, nullptr);
  });
}

void quantize_pack(const QuantizePackArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      const QuantizedCodes<T, kKind> source{static_cast<const T*>(args.x), args.grid, args.per_row,
                                            static_cast<float>(args.levels)};
      pack<kKind>(context, source, !args.per_row, {args.rows, args.columns, args.words, 1, args.bits, false, false},
                  args.planes, args.plane_sums);
    });
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

// What comes before a low-bit product: codes of the activation, terms of the weights.

#include "cuda/lowbit.cuh"

#include "cuda/learned_basis.h"
#include "cuda/lowbit.h"

namespace qk::cuda {
namespace {

uint8_t* bytes(const Context& context, int64_t count) {
  return reinterpret_cast<uint8_t*>(context.workspace(divide_up(count, int64_t{4})));
}

bool is_channels_last(const LowbitArgs& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t* const stride = args.x_stride;
  return (g.in_channels == 1 || stride[1] == 1) && (g.in_width == 1 || stride[3] == g.in_channels) &&
         (g.in_height == 1 || stride[2] == g.in_width * g.in_channels);
}

int64_t input_pixels(const ConvGeometry& g) { return g.batch * g.in_height * g.in_width; }

template <class T>
void encode_rows(const LowbitArgs& args, int64_t tap_bytes, uint8_t* codes, const Context& context) {
  const ConvGeometry& g = args.geometry;
  // As [images, pixels]: what lies channels-last is one image.
  const bool last = is_channels_last(args);
  const int64_t pixels = g.in_height * g.in_width;
  const EncodeRows rows{args.x_kind,
                        static_cast<float>(args.x_levels),
                        args.epilogue.x_grid,
                        last ? 1 : g.batch,
                        last ? g.batch * pixels : pixels,
                        g.groups,
                        g.in_channels / g.groups,
                        tap_bytes,
                        g.in_channels * pixels,
                        last ? 1 : pixels,
                        last ? g.in_channels : 1};
  const int64_t tiles =
      rows.images * divide_up(rows.pixels, int64_t{kEncodeTile}) * divide_up(g.groups * tap_bytes, int64_t{kEncodeTile});
  const dim3 grid = blocks(std::min(tiles, int64_t{context.multiprocessors} * kBlocksPerMultiprocessor * 4));
  const T* const x = static_cast<const T*>(args.x);
  last ? launch(context, grid, kThreads, encode_rows_kernel<T, false>, rows, x, codes)
       : launch(context, grid, kThreads, encode_rows_kernel<T, true>, rows, x, codes);
}

// Codes [pixels, groups, tap_bytes]: those of the caller where they lie right.
const uint8_t* prepare_codes(const LowbitArgs& args, int64_t tap_bytes, const Context& context) {
  const ConvGeometry& g = args.geometry;
  const int64_t numel = input_pixels(g) * g.in_channels;
  const bool unpadded = tap_bytes * g.groups == g.in_channels, last = is_channels_last(args);
  const bool codes = args.x_dtype == DType::kUInt8;
  if (numel == 0 || (codes && unpadded && last && reinterpret_cast<uintptr_t>(args.x) % kCopyBytes == 0))
    return static_cast<const uint8_t*>(args.x);
  uint8_t* const out = bytes(context, input_pixels(g) * g.groups * tap_bytes);
  if (codes) {
    encode_rows<uint8_t>(args, tap_bytes, out, context);
  } else if (unpadded && last) {
    encode({{1, 1, numel}, args.x_dtype, args.x_kind, args.x_levels, args.epilogue.x_grid, args.x, out}, context);
  } else {
    with_type(args.x_dtype, [&]<class T>(T*) { encode_rows<T>(args, tap_bytes, out, context); });
  }
  return out;
}

}  // namespace

ProductPlan plan_of(const LowbitArgs& args, const Context& context) {
  return plan_product(args.geometry, bits_of(args.x_kind, args.x_levels), args.w_bits, has_learned_basis(args),
                      {context.architecture, context.multiprocessors});
}

void run_learned(const LowbitArgs& args, const Context& context, void (*run)(const LowbitArgs&, const Context&)) {
  LowbitArgs prepared = args;
  const ConvGeometry& g = args.geometry;
  const int64_t numel = input_pixels(g) * g.in_channels;
  if (args.x_kind == Kind::kLearned && args.x_dtype != DType::kUInt8 && numel > 0) {
    uint8_t* const codes = bytes(context, numel);
    const int bits = bits_of(args.x_kind, args.x_levels);
    learned_basis_encode({{1, 1, numel}, args.x_dtype, bits, args.epilogue.x_grid, args.x, codes}, context);
    prepared.x_dtype = DType::kUInt8;
    prepared.x = codes;
  }
  EpilogueArgs& e = prepared.epilogue;
  if (!e.out_grid || e.out_kind != Kind::kLearned) return run(prepared, context);
  const int bits = bits_of(e.out_kind, e.out_levels);
  if (has_learned_basis(args)) {
    e.out_grid = level_table(e.out_grid, bits, context);
    return run(prepared, context);
  }
  const int64_t count = g.batch * g.out_height * g.out_width * g.out_channels;
  prepared.out = context.workspace(count);
  e.out_grid = nullptr;
  e.out_dtype = DType::kFloat32;
  run(prepared, context);
  learned_basis_encode(
      {{1, 1, count}, DType::kFloat32, bits, args.epilogue.out_grid, prepared.out, static_cast<uint8_t*>(args.out)},
      context);
}

LowbitArgs align_taps(const LowbitArgs& args, const Context& context) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, channels = g.in_channels / g.groups;
  if (taps == 1 || channels % kWordBits == 0) return args;
  LowbitArgs aligned = args;
  aligned.words = taps * words_of(channels);
  const int64_t count = args.w_bits * g.out_channels * aligned.words;
  auto* const planes = reinterpret_cast<int32_t*>(context.workspace(count));
  const int64_t most = int64_t{context.multiprocessors} * kBlocksPerMultiprocessor;
  launch(context, blocks(std::min(divide_up(count, int64_t{kThreads}), most)), kThreads, align_taps_kernel, args, planes,
         count);
  aligned.planes = planes;
  return aligned;
}

PreparedActivation prepare_activation(const LowbitArgs& args, const ProductPlan& plan, const Context& context) {
  const ConvGeometry& g = args.geometry;
  const int64_t tap_bytes = tap_bytes_of(g, plan.engine);
  if (!takes_planes(plan.engine)) return {prepare_codes(args, tap_bytes, context), 0, tap_bytes};
  const int64_t channels = g.in_channels / g.groups, rows = input_pixels(g) * g.groups;
  const int bits = bits_of(args.x_kind, args.x_levels);
  uint8_t* const planes = bytes(context, bits * rows * tap_bytes);
  if (rows > 0 && args.x_dtype != DType::kUInt8 && is_channels_last(args)) {
    quantize_pack({rows, channels, words_of(channels), args.x_dtype, args.x_kind, args.x_levels, bits, false,
                   args.epilogue.x_grid, args.x, reinterpret_cast<int32_t*>(planes), nullptr},
                  context);
    return {planes, rows * tap_bytes, tap_bytes};
  }
  const uint8_t* const codes = prepare_codes(args, channels, context);
  const Kind kind = args.x_kind == Kind::kLearned ? Kind::kUniform : args.x_kind;  // of the same planes
  if (rows > 0)
    pack_bitplanes(
        {rows, channels, words_of(channels), kind, args.x_levels, bits, codes, reinterpret_cast<int32_t*>(planes)}, context);
  return {planes, rows * tap_bytes, tap_bytes};
}

const float* window_terms(const LowbitArgs& args, const Context& context) {
  const ConvGeometry& g = args.geometry;
  const int64_t count = row_axis(g).classes() * column_axis(g).classes() * g.out_channels;
  float* const terms = context.workspace(count);
  const int64_t most = int64_t{context.multiprocessors} * kBlocksPerMultiprocessor;
  launch(context, blocks(std::min(divide_up(count, int64_t{kWarps}), most)), kThreads, window_terms_kernel, args, terms);
  return terms;
}

}  // namespace qk::cuda

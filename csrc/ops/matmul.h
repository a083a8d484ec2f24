#pragma once
// lowbit_linear, and what it shares with lowbit_conv2d: checks and allocation, the same for every backend.

#include <cstring>
#include <vector>

#include "core/algebra.h"
#include "ops/fake_quantize.h"

namespace qk::ops {

// The tensors behind the pointers of LowbitArgs, alive as long as the call.
struct LowbitTensors {
  Tensor x, x_grid, planes, w_grid;
  std::optional<Tensor> bias, scale, shift, out_grid, prepacked;
};

// Arguments that the two ops have in common.
struct LowbitCall {
  const char* op;
  const Tensor& x;
  const Tensor& x_grid;
  int64_t x_kind, x_levels;
  const Tensor& planes;
  const Tensor& w_grid;
  int64_t w_kind, w_levels;
  const std::optional<Tensor>& bias;
  const std::optional<Tensor>& scale;
  const std::optional<Tensor>& shift;
  double lower, upper;
  const std::optional<Tensor>& out_grid;
  int64_t out_kind, out_levels;
  std::optional<ScalarType> out_dtype;
  const std::optional<Tensor>& prepacked;
};

inline const void* data_of(const std::optional<Tensor>& t) { return t ? t->const_data_ptr() : nullptr; }

inline std::optional<Tensor> optional_parameters(const char* op, const char* argument, const std::optional<Tensor>& t,
                                                 const Tensor& x, std::initializer_list<int64_t> shape) {
  if (!t) return std::nullopt;
  return parameters(op, argument, *t, x, shape);
}

// Kinds that have codes.
inline Kind check_coded_kind(const char* op, const char* argument, int64_t kind) {
  QK_CHECK(kind >= 0 && kind <= static_cast<int64_t>(Kind::kLearned) && kind != static_cast<int64_t>(Kind::kIdentity), op,
           argument, "0 (uniform), 1 (binary), 2 (ternary), 4 (learned)", kind);
  return static_cast<Kind>(kind);
}

// planes [bits, rows, words] for rows of `columns` codes.
inline void check_planes(const char* op, const Tensor& planes, Kind kind, int64_t levels, int64_t columns) {
  check_type(op, "planes", planes, ScalarType::Int);
  QK_CHECK(planes.dim() == 3, op, "planes", "of shape [bits, out_channels, words]", shape_of(planes));
  const int64_t bits = bits_of(kind, levels), words = (columns + 31) / 32;
  QK_CHECK(planes.size(0) == bits && planes.size(2) == words, op, "planes",
           "of shape [" + std::to_string(bits) + ", out_channels, " + std::to_string(words) + "] for rows of " +
               std::to_string(columns) + " codes with w_levels " + std::to_string(levels),
           shape_of(planes));
}

inline ScalarType check_out_dtype(const LowbitCall& call) {
  const ScalarType type = call.x.scalar_type();
  if (call.out_grid) {
    const ScalarType codes = call.out_dtype.value_or(ScalarType::Byte);
    QK_CHECK(codes == ScalarType::Byte, call.op, "out_dtype", "None or uint8 where out_grid asks for codes", codes);
    return codes;
  }
  const ScalarType out = call.out_dtype.value_or(type == ScalarType::Byte ? ScalarType::Float : type);
  QK_CHECK(out == ScalarType::Float || out == ScalarType::Half || out == ScalarType::BFloat16, call.op, "out_dtype",
           "None, float32, float16 or bfloat16 without out_grid", out);
  return out;
}

inline void check_range(const LowbitCall& call) {
  const float lower = static_cast<float>(call.lower), upper = static_cast<float>(call.upper);
  QK_CHECK(lower <= upper, call.op, "lower", "at most upper (" + text_of(upper) + ")", lower);
}

// Everything but x's strides, the geometry, and the output. `columns`: codes a weight row. The tensors that args points into
// go to `tensors`.
inline LowbitArgs lowbit_args(const LowbitCall& call, int64_t columns, LowbitTensors& tensors) {
  const char* const op = call.op;
  LowbitArgs args{};
  args.x_kind = check_coded_kind(op, "x_kind", call.x_kind);
  args.x_levels = check_levels(op, "x_levels", args.x_kind, call.x_levels);
  args.w_kind = check_coded_kind(op, "w_kind", call.w_kind);
  args.w_levels = check_levels(op, "w_levels", args.w_kind, call.w_levels);
  check_planes(op, call.planes, args.w_kind, args.w_levels, columns);
  check_same_device(op, "planes", call.planes, call.x);
  const int64_t out_channels = call.planes.size(1);
  check_range(call);
  QK_CHECK(call.scale.has_value() == call.shift.has_value(), op, "shift", "given exactly where scale is",
           call.shift ? "shift alone" : "scale alone");

  const Tensor& x = call.x;
  tensors.planes = as_contiguous(call.planes);
  const int x_columns = grid_columns(args.x_kind, bits_of(args.x_kind, args.x_levels));
  const int w_columns = grid_columns(args.w_kind, bits_of(args.w_kind, args.w_levels));
  tensors.x_grid = parameters(op, "x_grid", call.x_grid, x, {1, x_columns});
  const bool per_channel = !(call.w_grid.dim() == 2 && call.w_grid.size(0) == 1);
  tensors.w_grid = parameters(op, "w_grid", call.w_grid, x, {per_channel ? out_channels : 1, w_columns});
  tensors.bias = optional_parameters(op, "bias", call.bias, x, {out_channels});
  tensors.scale = optional_parameters(op, "scale", call.scale, x, {out_channels});
  tensors.shift = optional_parameters(op, "shift", call.shift, x, {out_channels});

  args.geometry.out_channels = out_channels;
  args.x_dtype = dtype_of(x);
  args.w_bits = bits_of(args.w_kind, args.w_levels);
  args.words = call.planes.size(2);
  args.planes = static_cast<const int32_t*>(tensors.planes.const_data_ptr());
  EpilogueArgs& epilogue = args.epilogue;
  epilogue.x_grid = static_cast<const float*>(tensors.x_grid.const_data_ptr());
  epilogue.w_grid = static_cast<const float*>(tensors.w_grid.const_data_ptr());
  epilogue.w_columns = w_columns;
  epilogue.w_per_channel = per_channel;
  epilogue.plane_pairs = has_learned_basis(args);
  epilogue.bias = static_cast<const float*>(data_of(tensors.bias));
  epilogue.scale = static_cast<const float*>(data_of(tensors.scale));
  epilogue.shift = static_cast<const float*>(data_of(tensors.shift));
  epilogue.lower = static_cast<float>(call.lower);
  epilogue.upper = static_cast<float>(call.upper);
  if (call.out_grid) {
    epilogue.out_kind = check_coded_kind(op, "out_kind", call.out_kind);
    epilogue.out_levels = check_levels(op, "out_levels", epilogue.out_kind, call.out_levels);
    const int columns = grid_columns(epilogue.out_kind, bits_of(epilogue.out_kind, epilogue.out_levels));
    tensors.out_grid = optional_parameters(op, "out_grid", call.out_grid, x, {1, columns});
    epilogue.out_grid = static_cast<const float*>(data_of(tensors.out_grid));
  }
  return args;
}

// What a prepacked weight begins with, so that it is not taken for another one or for another version's.
struct PrepackedHeader {
  static constexpr int64_t kLayout = 1;  // of what backends write behind it
  static constexpr int64_t kBytes = 64;

  explicit PrepackedHeader(const LowbitArgs& args)
      : fields{kLayout,
               static_cast<int64_t>(args.w_kind),
               args.w_levels,
               args.geometry.kernel_height,
               args.geometry.kernel_width,
               args.geometry.in_channels,
               args.geometry.out_channels,
               args.geometry.groups} {}

  int64_t fields[8];
};
static_assert(sizeof(PrepackedHeader) == PrepackedHeader::kBytes);

// The weight as prepack_weight() of the same backend arranged it. args: complete but for x and the output.
template <class Backend>
void take_prepacked(const LowbitCall& call, LowbitArgs& args, LowbitTensors& tensors) {
  if (!call.prepacked || call.prepacked->numel() == 0) return;
  check_type(call.op, "prepacked", *call.prepacked, ScalarType::Byte);
  check_same_device(call.op, "prepacked", *call.prepacked, call.x);
  const int64_t bytes = Backend::prepacked_bytes(args);
  if (bytes == 0) return;
  QK_CHECK(call.prepacked->numel() == PrepackedHeader::kBytes + bytes, call.op, "prepacked",
           "what prepack_weight makes of these planes (" + std::to_string(PrepackedHeader::kBytes + bytes) + " bytes)",
           call.prepacked->numel());
  tensors.prepacked = as_contiguous(*call.prepacked);
  const uint8_t* const data = static_cast<const uint8_t*>(tensors.prepacked->const_data_ptr());
  const PrepackedHeader header(args);
  QK_CHECK(std::memcmp(data, &header, sizeof header) == 0, call.op, "prepacked",
           "what this version's prepack_weight makes of these planes", "that of another weight or version");
  args.prepacked = data + PrepackedHeader::kBytes;
}

inline void check_activation(const char* op, const Tensor& x) {
  if (x.scalar_type() == ScalarType::Byte) return;
  const ScalarType type = x.scalar_type();
  QK_CHECK(type == ScalarType::Float || type == ScalarType::Half || type == ScalarType::BFloat16, op, "x",
           "float32, float16, bfloat16, or uint8 codes", type);
}

// A convolution of one window that fills its image; of a kernel of 1 x 1 a linear layer of one row.
inline ConvGeometry one_window(int64_t in_channels, int64_t out_channels, int64_t kernel_height, int64_t kernel_width,
                               int64_t groups) {
  return {.batch = 1,
          .in_channels = in_channels,
          .in_height = kernel_height,
          .in_width = kernel_width,
          .out_channels = out_channels,
          .out_height = 1,
          .out_width = 1,
          .kernel_height = kernel_height,
          .kernel_width = kernel_width,
          .stride_height = 1,
          .stride_width = 1,
          .pad_top = 0,
          .pad_left = 0,
          .dilation_height = 1,
          .dilation_width = 1,
          .groups = groups};
}

template <class Backend>
Tensor lowbit_linear(const Tensor& x, const Tensor& x_grid, int64_t x_kind, int64_t x_levels, const Tensor& planes,
                     const Tensor& w_grid, int64_t w_kind, int64_t w_levels, const std::optional<Tensor>& bias,
                     const std::optional<Tensor>& scale, const std::optional<Tensor>& shift, double lower, double upper,
                     const std::optional<Tensor>& out_grid, int64_t out_kind, int64_t out_levels,
                     std::optional<ScalarType> out_dtype, const std::optional<Tensor>& prepacked) {
  const LowbitCall call{"lowbit_linear", x,     x_grid, x_kind, x_levels, planes,   w_grid,     w_kind,    w_levels, bias,
                        scale,           shift, lower,  upper,  out_grid, out_kind, out_levels, out_dtype, prepacked};
  check_activation(call.op, x);
  QK_CHECK(x.dim() >= 1, call.op, "x", "of shape [..., in_features]", shape_of(x));
  const int64_t features = x.size(x.dim() - 1);
  LowbitTensors tensors;
  LowbitArgs args = lowbit_args(call, features, tensors);
  tensors.x = as_contiguous(x);

  ConvGeometry& g = args.geometry;
  g = one_window(features, g.out_channels, 1, 1, 1);
  std::vector<int64_t> shape;
  for (int64_t d = 0; d + 1 < x.dim(); ++d) {
    g.batch *= x.size(d);
    shape.push_back(x.size(d));
  }
  shape.push_back(g.out_channels);
  take_prepacked<Backend>(call, args, tensors);
  Tensor out = new_tensor(x, shape, check_out_dtype(call));
  args.epilogue.out_dtype = dtype_of(out);
  args.x = tensors.x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  const int64_t x_stride[4] = {features, 1, features, features};
  const int64_t out_stride[4] = {g.out_channels, 1, g.out_channels, g.out_channels};
  std::copy(x_stride, x_stride + 4, args.x_stride);
  std::copy(out_stride, out_stride + 4, args.out_stride);
  if (out.numel() > 0) Backend::lowbit_linear(args, tensors.x);
  return out;
}

}  // namespace qk::ops

#pragma once
// lowbit_conv2d: checks and allocation, the same for every backend.

#include "ops/matmul.h"

namespace qk::ops {

// Sizes beyond this are mistakes, and below it no product of the checks overflows.
inline constexpr int64_t kMaxExtent = (int64_t{1} << 31) - 1;

inline void check_extents(const char* op, const char* argument, const std::vector<int64_t>& values, size_t count,
                          int64_t least) {
  std::string got = "[";
  bool ok = values.size() == count;
  for (const int64_t value : values) {
    got += (got.size() > 1 ? ", " : "") + std::to_string(value);
    ok = ok && value >= least && value <= kMaxExtent;
  }
  QK_CHECK(ok, op, argument, std::to_string(count) + " numbers from " + std::to_string(least) + " to 2147483647", got + "]");
}

inline int64_t output_extent(const char* op, const char* dimension, int64_t size, int64_t padding, int64_t kernel,
                             int64_t stride, int64_t dilation) {
  const int64_t reach = dilation * (kernel - 1) + 1, padded = size + padding;
  QK_CHECK(padded >= reach, op, "x",
           "at least as large as the dilated kernel (" + std::to_string(reach) + ") in " + dimension + " with its padding",
           padded);
  return (padded - reach) / stride + 1;
}

// Strides of a dense [n, c, h, w] tensor.
inline void set_strides(int64_t channels, int64_t height, int64_t width, bool channels_last, int64_t (&stride)[4]) {
  const int64_t last[4] = {channels * height * width, 1, width * channels, channels};
  const int64_t first[4] = {channels * height * width, height * width, width, 1};
  std::copy(channels_last ? last : first, (channels_last ? last : first) + 4, stride);
}

// As torch's is_contiguous(memory_format=channels_last): strides of dimensions of size 1 do not matter.
inline bool is_channels_last(const Tensor& x) {
  int64_t stride[4];
  set_strides(x.size(1), x.size(2), x.size(3), true, stride);
  for (int64_t d = 0; d < 4; ++d)
    if (x.size(d) != 1 && x.stride(d) != stride[d]) return false;
  return true;
}

inline ConvGeometry conv_geometry(const char* op, const Tensor& x, int64_t out_channels, const std::vector<int64_t>& kernel,
                                  const std::vector<int64_t>& stride, const std::vector<int64_t>& padding,
                                  const std::vector<int64_t>& dilation, int64_t groups) {
  ConvGeometry g{};
  g.batch = x.size(0);
  g.in_channels = x.size(1);
  g.in_height = x.size(2);
  g.in_width = x.size(3);
  g.out_channels = out_channels;
  g.kernel_height = kernel[0];
  g.kernel_width = kernel[1];
  g.stride_height = stride[0];
  g.stride_width = stride[1];
  g.pad_top = padding[0];
  g.pad_left = padding[2];
  g.dilation_height = dilation[0];
  g.dilation_width = dilation[1];
  g.groups = groups;
  g.out_height = output_extent(op, "height", g.in_height, padding[0] + padding[1], kernel[0], stride[0], dilation[0]);
  g.out_width = output_extent(op, "width", g.in_width, padding[2] + padding[3], kernel[1], stride[1], dilation[1]);
  return g;
}

template <class Backend>
Tensor lowbit_conv2d(const Tensor& x, const Tensor& x_grid, int64_t x_kind, int64_t x_levels, const Tensor& planes,
                     const Tensor& w_grid, int64_t w_kind, int64_t w_levels, std::vector<int64_t> kernel_size,
                     std::vector<int64_t> stride, std::vector<int64_t> padding, std::vector<int64_t> dilation,
                     int64_t groups, const std::optional<Tensor>& bias, const std::optional<Tensor>& scale,
                     const std::optional<Tensor>& shift, double lower, double upper, const std::optional<Tensor>& out_grid,
                     int64_t out_kind, int64_t out_levels, std::optional<ScalarType> out_dtype,
                     const std::optional<Tensor>& prepacked) {
  const LowbitCall call{"lowbit_conv2d", x,     x_grid, x_kind, x_levels, planes,   w_grid,     w_kind,    w_levels, bias,
                        scale,           shift, lower,  upper,  out_grid, out_kind, out_levels, out_dtype, prepacked};
  const char* const op = call.op;
  check_activation(op, x);
  QK_CHECK(x.dim() == 4, op, "x", "of shape [batch, channels, height, width]", shape_of(x));
  check_extents(op, "kernel_size", kernel_size, 2, 1);
  check_extents(op, "stride", stride, 2, 1);
  check_extents(op, "padding", padding, 4, 0);
  check_extents(op, "dilation", dilation, 2, 1);
  QK_CHECK(groups >= 1 && x.size(1) % groups == 0, op, "groups",
           "a divisor of x's " + std::to_string(x.size(1)) + " channels", groups);
  const int64_t taps = kernel_size[0] * kernel_size[1], channels = x.size(1) / groups;
  QK_CHECK(taps <= kMaxExtent && taps * channels <= kMaxExtent, op, "kernel_size",
           "of at most 2147483647 weights an output channel",
           std::to_string(kernel_size[0]) + " x " + std::to_string(kernel_size[1]));
  LowbitTensors tensors;
  LowbitArgs args = lowbit_args(call, taps * channels, tensors);
  QK_CHECK(planes.size(1) % groups == 0, op, "planes",
           "of a number of output channels that groups (" + std::to_string(groups) + ") divides", planes.size(1));
  args.geometry = conv_geometry(op, x, planes.size(1), kernel_size, stride, padding, dilation, groups);

  take_prepacked<Backend>(call, args, tensors);

  const bool channels_last = !x.is_contiguous() && is_channels_last(x);
  tensors.x = channels_last ? x : as_contiguous(x);
  const ConvGeometry& g = args.geometry;
  Tensor out = new_images(x, {g.batch, g.out_channels, g.out_height, g.out_width}, check_out_dtype(call), channels_last);
  set_strides(g.in_channels, g.in_height, g.in_width, channels_last, args.x_stride);
  set_strides(g.out_channels, g.out_height, g.out_width, channels_last, args.out_stride);
  args.epilogue.out_dtype = dtype_of(out);
  args.x = tensors.x.const_data_ptr();
  args.out = out.mutable_data_ptr();
  if (out.numel() > 0) Backend::lowbit_conv2d(args, tensors.x);
  return out;
}

// The weight of either op arranged once for all calls, as the backend likes it: uint8 [n], of a linear layer with a kernel
// of 1 x 1. Empty where that is of no use.
template <class Backend>
Tensor prepack_weight(const Tensor& planes_in, int64_t w_kind, int64_t w_levels, int64_t channels,
                      std::vector<int64_t> kernel_size, int64_t groups) {
  constexpr const char* op = "prepack_weight";
  LowbitArgs args{};
  args.w_kind = check_coded_kind(op, "w_kind", w_kind);
  args.w_levels = check_levels(op, "w_levels", args.w_kind, w_levels);
  args.w_bits = bits_of(args.w_kind, args.w_levels);
  check_extents(op, "kernel_size", kernel_size, 2, 1);
  QK_CHECK(channels >= 0 && channels <= kMaxExtent, op, "channels", "from 0 to 2147483647", channels);
  const int64_t taps = kernel_size[0] * kernel_size[1];
  QK_CHECK(taps <= kMaxExtent && taps * channels <= kMaxExtent, op, "kernel_size",
           "of at most 2147483647 weights an output channel",
           std::to_string(kernel_size[0]) + " x " + std::to_string(kernel_size[1]));
  check_planes(op, planes_in, args.w_kind, args.w_levels, taps * channels);
  const int64_t out_channels = planes_in.size(1);
  QK_CHECK(groups >= 1 && out_channels % groups == 0, op, "groups",
           "a divisor of the " + std::to_string(out_channels) + " output channels", groups);
  const Tensor planes = as_contiguous(planes_in);
  args.planes = static_cast<const int32_t*>(planes.const_data_ptr());
  args.words = planes.size(2);
  args.x_kind = Kind::kUniform;
  args.x_levels = 1;
  args.geometry = one_window(channels * groups, out_channels, kernel_size[0], kernel_size[1], groups);
  const int64_t bytes = Backend::prepacked_bytes(args);
  Tensor out = new_tensor(planes, {bytes > 0 ? PrepackedHeader::kBytes + bytes : 0}, ScalarType::Byte);
  if (bytes == 0) return out;
  uint8_t* const data = static_cast<uint8_t*>(out.mutable_data_ptr());
  const PrepackedHeader header(args);
  std::memcpy(data, &header, sizeof header);
  Backend::prepack(args, data + PrepackedHeader::kBytes);
  return out;
}

}  // namespace qk::ops

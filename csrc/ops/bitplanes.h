#pragma once
// Codes and bit-planes: checks and allocation, the same for every backend.

#include <tuple>

#include "core/bitplanes.h"
#include "ops/dispatch.h"
#include "ops/fake_quantize.h"

namespace qk::ops {

inline void check_rows(const char* op, const char* argument, const Tensor& t, const char* shape, int64_t dim) {
  QK_CHECK(t.dim() == dim, op, argument, std::string("of shape ") + shape, shape_of(t));
}

template <class Backend>
Tensor encode(const Tensor& x_in, const Tensor& grid_in, int64_t kind, int64_t levels, std::optional<int64_t> axis) {
  constexpr const char* op = "encode";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  EncodeArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.kind = check_kind(op, "kind", kind, Kind::kTernary);
  args.levels = check_levels(op, "levels", args.kind, levels);
  const Tensor grid = parameters(op, "grid", grid_in, x, {args.layout.channels, kGridColumns});
  Tensor codes = new_like(x, ScalarType::Byte);
  args.grid = static_cast<const float*>(grid.const_data_ptr());
  args.x = x.const_data_ptr();
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  if (x.numel() > 0) Backend::encode(args, x);
  return codes;
}

template <class Backend>
Tensor pack_bitplanes(const Tensor& codes_in, int64_t kind, int64_t levels) {
  constexpr const char* op = "pack_bitplanes";
  check_type(op, "codes", codes_in, ScalarType::Byte);
  check_rows(op, "codes", codes_in, "[rows, columns]", 2);
  const Tensor codes = as_contiguous(codes_in);
  PackArgs args{};
  args.rows = codes.size(0);
  args.columns = codes.size(1);
  args.words = words_of(args.columns);
  args.kind = check_kind(op, "kind", kind, Kind::kTernary);
  args.levels = check_levels(op, "levels", args.kind, levels);
  args.bits = bits_of(args.kind, args.levels);
  Tensor planes = new_tensor(codes, {args.bits, args.rows, args.words}, ScalarType::Int);
  args.codes = static_cast<const uint8_t*>(codes.const_data_ptr());
  args.planes = static_cast<int32_t*>(planes.mutable_data_ptr());
  if (codes.numel() > 0) Backend::pack_bitplanes(args, codes);
  return planes;
}

template <class Backend>
Tensor unpack_bitplanes(const Tensor& planes_in, int64_t kind, int64_t columns) {
  constexpr const char* op = "unpack_bitplanes";
  check_type(op, "planes", planes_in, ScalarType::Int);
  check_rows(op, "planes", planes_in, "[bits, rows, words]", 3);
  const Tensor planes = as_contiguous(planes_in);
  UnpackArgs args{};
  args.kind = check_kind(op, "kind", kind, Kind::kTernary);
  args.bits = static_cast<int>(planes.size(0));
  const char* const bits = args.kind == Kind::kUniform  ? "of 1 to 8 planes"
                           : args.kind == Kind::kBinary ? "of 1 plane"
                                                        : "of 2 planes";
  const bool fits = args.kind == Kind::kUniform ? args.bits >= 1 && args.bits <= kMaxBits
                                                : args.bits == (args.kind == Kind::kBinary ? 1 : 2);
  QK_CHECK(fits, op, "planes", bits, shape_of(planes));
  args.rows = planes.size(1);
  args.words = planes.size(2);
  args.columns = columns;
  QK_CHECK(columns >= 0 && words_of(columns) == args.words, op, "columns",
           "a row length of " + std::to_string(args.words) + " words of 32 elements", columns);
  Tensor codes = new_tensor(planes, {args.rows, args.columns}, ScalarType::Byte);
  args.planes = static_cast<const int32_t*>(planes.const_data_ptr());
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  if (codes.numel() > 0) Backend::unpack_bitplanes(args, planes);
  return codes;
}

template <class Backend>
std::tuple<Tensor, Tensor> quantize_pack(const Tensor& x_in, const Tensor& grid_in, int64_t kind, int64_t levels,
                                         std::optional<int64_t> axis) {
  constexpr const char* op = "quantize_pack";
  check_float(op, "x", x_in);
  check_rows(op, "x", x_in, "[rows, columns]", 2);
  const Tensor x = as_contiguous(x_in);
  QuantizePackArgs args{};
  args.rows = x.size(0);
  args.columns = x.size(1);
  args.words = words_of(args.columns);
  args.dtype = dtype_of(x);
  args.kind = check_kind(op, "kind", kind, Kind::kTernary);
  args.levels = check_levels(op, "levels", args.kind, levels);
  args.bits = bits_of(args.kind, args.levels);
  args.per_row = axis.has_value();
  if (axis) QK_CHECK(axis_of(op, x, *axis) == 0, op, "axis", "None or 0", *axis);
  const Tensor grid = parameters(op, "grid", grid_in, x, {args.per_row ? args.rows : 1, kGridColumns});
  Tensor planes = new_tensor(x, {args.bits, args.rows, args.words}, ScalarType::Int);
  const bool empty = x.numel() == 0;
  Tensor plane_sums = empty ? torch::stable::new_zeros(x, {args.bits, args.rows}, ScalarType::Int)
                            : new_tensor(x, {args.bits, args.rows}, ScalarType::Int);
  args.grid = static_cast<const float*>(grid.const_data_ptr());
  args.x = x.const_data_ptr();
  args.planes = static_cast<int32_t*>(planes.mutable_data_ptr());
  args.plane_sums = static_cast<int32_t*>(plane_sums.mutable_data_ptr());
  if (!empty) Backend::quantize_pack(args, x);
  return {planes, plane_sums};
}

}  // namespace qk::ops

#pragma once
// fake_quantize: checks and allocation, the same for every backend.

#include <tuple>

#include "core/bitplanes.h"
#include "ops/dispatch.h"

namespace qk::ops {

inline Kind check_kind(const char* op, const char* argument, int64_t kind, Kind last) {
  QK_CHECK(kind >= 0 && kind <= static_cast<int64_t>(last), op, argument,
           "0 (uniform), 1 (binary)" + std::string(last >= Kind::kTernary ? ", 2 (ternary)" : "") +
               (last >= Kind::kIdentity ? ", 3 (identity)" : ""),
           kind);
  return static_cast<Kind>(kind);
}

inline int64_t check_levels(const char* op, const char* argument, Kind kind, int64_t levels) {
  if (kind == Kind::kBinary) QK_CHECK(levels == 1, op, argument, "1 for a binary quantizer", levels);
  if (kind == Kind::kTernary) QK_CHECK(levels == 2, op, argument, "2 for a ternary quantizer", levels);
  if (kind == Kind::kUniform || kind == Kind::kLearned)
    QK_CHECK(
        levels >= 1 && levels <= kMaxLevels && (levels & (levels + 1)) == 0, op, argument,
        "2^n - 1 with n from 1 to 8 for a " + std::string(kind == Kind::kLearned ? "learned basis" : "uniform quantizer"),
        levels);
  return levels;
}

inline Ste check_ste(const char* op, const char* argument, Kind kind, int64_t ste) {
  QK_CHECK(ste >= 0 && ste <= 2, op, argument, "0 (identity), 1 (clip) or 2 (full)", ste);
  if (kind != Kind::kUniform) QK_CHECK(ste == 0, op, argument, "0 (identity) for a quantizer that is not uniform", ste);
  return static_cast<Ste>(ste);
}

inline FakeQuantizeArgs fake_quantize_args(const char* op, const Tensor& x, const Tensor& grid, int64_t kind, int64_t levels,
                                           int64_t ste, std::optional<int64_t> axis) {
  FakeQuantizeArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.kind = check_kind(op, "kind", kind, Kind::kTernary);
  args.levels = check_levels(op, "levels", args.kind, levels);
  args.ste = check_ste(op, "ste", args.kind, ste);
  args.grid = static_cast<const float*>(grid.const_data_ptr());
  args.x = x.const_data_ptr();
  return args;
}

template <class Backend>
Tensor fake_quantize(const Tensor& x_in, const Tensor& grid_in, int64_t kind, int64_t levels, int64_t ste,
                     std::optional<int64_t> axis) {
  constexpr const char* op = "fake_quantize";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  const Tensor grid = parameters(op, "grid", grid_in, x, {layout_of(op, x, axis).channels, kGridColumns});
  FakeQuantizeArgs args = fake_quantize_args(op, x, grid, kind, levels, ste, axis);
  Tensor out = new_like(x);
  args.out = out.mutable_data_ptr();
  if (x.numel() > 0) Backend::fake_quantize_forward(args, x);
  return out;
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& grid_in,
                                                  int64_t kind, int64_t levels, int64_t ste, std::optional<int64_t> axis,
                                                  bool range_sums) {
  constexpr const char* op = "fake_quantize_backward";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  const Tensor grad = gradient_of(op, grad_in, x);
  const Tensor grid = parameters(op, "grid", grid_in, x, {layout_of(op, x, axis).channels, kGridColumns});
  FakeQuantizeArgs args = fake_quantize_args(op, x, grid, kind, levels, ste, axis);
  Tensor grad_x = new_like(x);
  Tensor sums = range_sums ? new_sums(x, {args.layout.channels, 3}) : new_tensor(x, {0, 3}, ScalarType::Float);
  args.grad = grad.const_data_ptr();
  args.out = grad_x.mutable_data_ptr();
  args.sums = range_sums ? static_cast<float*>(sums.mutable_data_ptr()) : nullptr;
  if (x.numel() > 0) Backend::fake_quantize_backward(args, x);
  return {grad_x, sums};
}

template <class Backend>
std::tuple<Tensor, Tensor> fake_quantize_masked(const Tensor& x_in, const Tensor& grid_in, int64_t levels,
                                                std::optional<int64_t> axis) {
  constexpr const char* op = "fake_quantize_masked";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  const Tensor grid = parameters(op, "grid", grid_in, x, {layout_of(op, x, axis).channels, kGridColumns});
  FakeQuantizeArgs args =
      fake_quantize_args(op, x, grid, static_cast<int64_t>(Kind::kUniform), levels, static_cast<int64_t>(Ste::kClip), axis);
  Tensor out = new_like(x);
  Tensor mask = new_tensor(x, {words_of(x.numel())}, ScalarType::Int);
  args.out = out.mutable_data_ptr();
  args.mask = static_cast<int32_t*>(mask.mutable_data_ptr());
  if (x.numel() > 0) Backend::fake_quantize_masked(args, x);
  return {out, mask};
}

template <class Backend>
Tensor apply_mask(const Tensor& grad_in, const Tensor& mask_in) {
  constexpr const char* op = "apply_mask";
  check_float(op, "grad", grad_in);
  check_type(op, "mask", mask_in, ScalarType::Int);
  check_shape(op, "mask", mask_in, {words_of(grad_in.numel())});
  check_same_device(op, "mask", mask_in, grad_in);
  const Tensor grad = dense(grad_in), mask = as_contiguous(mask_in);
  Tensor out = new_like(grad);
  const ApplyMaskArgs args{grad.numel(), dtype_of(grad), static_cast<const int32_t*>(mask.const_data_ptr()),
                           grad.const_data_ptr(), out.mutable_data_ptr()};
  if (grad.numel() > 0) Backend::apply_mask(args, grad);
  return out;
}

}  // namespace qk::ops

#pragma once
// learned_basis_quantize: checks and allocation, the same for every backend.

#include <tuple>

#include "ops/bitplanes.h"
#include "ops/dispatch.h"

namespace qk::ops {

inline Tensor learned_basis_args(const char* op, const Tensor& x, const Tensor& basis_in, int64_t encoding,
                                 std::optional<int64_t> axis, LearnedBasisArgs& args) {
  QK_CHECK(basis_in.dim() == 2 && basis_in.size(1) >= 1 && basis_in.size(1) <= kMaxBits, op, "basis",
           "of shape [channels, n] with n from 1 to 8", shape_of(basis_in));
  QK_CHECK(encoding == 0 || encoding == 1, op, "encoding", "0 ({-1, +1}) or 1 ({0, 1})", encoding);
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.encoding = static_cast<Encoding>(encoding);
  args.bits = static_cast<int>(basis_in.size(1));
  const Tensor basis = parameters(op, "basis", basis_in, x, {args.layout.channels, args.bits});
  args.basis = static_cast<const float*>(basis.const_data_ptr());
  args.x = x.const_data_ptr();
  return basis;
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> learned_basis_quantize(const Tensor& x_in, const Tensor& basis_in, int64_t encoding,
                                                          int64_t ste, std::optional<int64_t> axis, bool statistics) {
  constexpr const char* op = "learned_basis_quantize";
  check_float(op, "x", x_in);
  QK_CHECK(ste == 0 || ste == 1, op, "ste", "0 (identity) or 1 (clip)", ste);
  const Tensor x = dense(x_in);
  LearnedBasisArgs args{};
  const Tensor basis = learned_basis_args(op, x, basis_in, encoding, axis, args);
  Tensor out = new_like(x);
  const int64_t channels = statistics ? args.layout.channels : 0;
  Tensor gram = new_sums(x, {channels, args.bits, args.bits});
  Tensor product = new_sums(x, {channels, args.bits});
  args.out = out.mutable_data_ptr();
  if (statistics) {
    args.gram = static_cast<float*>(gram.mutable_data_ptr());
    args.product = static_cast<float*>(product.mutable_data_ptr());
  }
  if (x.numel() > 0) Backend::learned_basis_forward(args, x);
  return {out, gram, product};
}

template <class Backend>
Tensor learned_basis_quantize_backward(const Tensor& grad_in, const Tensor& x_in, const Tensor& basis_in, int64_t encoding,
                                       std::optional<int64_t> axis) {
  constexpr const char* op = "learned_basis_quantize_backward";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  const Tensor grad = gradient_of(op, grad_in, x);
  LearnedBasisArgs args{};
  const Tensor basis = learned_basis_args(op, x, basis_in, encoding, axis, args);
  Tensor grad_x = new_like(x);
  args.grad = grad.const_data_ptr();
  args.out = grad_x.mutable_data_ptr();
  if (x.numel() > 0) Backend::learned_basis_backward(args, x);
  return grad_x;
}

template <class Backend>
Tensor learned_basis_encode(const Tensor& x_in, const Tensor& grid_in, std::optional<int64_t> axis) {
  constexpr const char* op = "learned_basis_encode";
  check_float(op, "x", x_in);
  QK_CHECK(grid_in.dim() == 2 && grid_in.size(1) >= 2 && grid_in.size(1) <= 1 + kMaxBits, op, "grid",
           "of shape [channels, 1 + n] with n from 1 to 8", shape_of(grid_in));
  const Tensor x = dense(x_in);
  LearnedEncodeArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.bits = static_cast<int>(grid_in.size(1)) - 1;
  const Tensor grid = parameters(op, "grid", grid_in, x, {args.layout.channels, 1 + args.bits});
  Tensor codes = new_like(x, ScalarType::Byte);
  args.grid = static_cast<const float*>(grid.const_data_ptr());
  args.x = x.const_data_ptr();
  args.codes = static_cast<uint8_t*>(codes.mutable_data_ptr());
  if (x.numel() > 0) Backend::learned_basis_encode(args, x);
  return codes;
}

}  // namespace qk::ops

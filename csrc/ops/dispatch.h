#pragma once
// From tensors to what kernels take: dtype, and the [outer, channels, inner] view of any dense tensor.

#include <algorithm>
#include <numeric>
#include <optional>
#include <vector>

#include "core/args.h"
#include "ops/check.h"

namespace qk::ops {

inline DType dtype_of(const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return DType::kFloat16;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Byte:
      return DType::kUInt8;
    default:
      return DType::kFloat32;
  }
}

// The one knowing copy: a tensor with gaps or overlaps becomes dense, its dimensions in the order they had in memory. This
// is also the layout of empty_like, with which the fake kernels say what the results look like.
inline Tensor dense(const Tensor& t) {
  if (t.numel() == 0 || is_dense(t)) return t;
  Tensor copy = new_like(t);
  return torch::stable::copy_(copy, t);
}

inline bool same_layout(const Tensor& a, const Tensor& b) {
  for (int64_t d = 0; d < a.dim(); ++d)
    if (a.size(d) != 1 && a.stride(d) != b.stride(d)) return false;
  return true;
}

// t with the strides of `like`, copied only if they differ.
inline Tensor in_layout_of(const Tensor& t, const Tensor& like) {
  if (same_layout(t, like)) return t;
  Tensor copy = new_like(like);
  return torch::stable::copy_(copy, t);
}

// The gradient of an output like x.
inline Tensor gradient_of(const char* op, const Tensor& grad, const Tensor& x) {
  check_type(op, "grad", grad, x.scalar_type());
  QK_CHECK(std::ranges::equal(grad.sizes(), x.sizes()), op, "grad", "of x's shape " + shape_of(x), shape_of(grad));
  check_same_device(op, "grad", grad, x);
  return in_layout_of(grad, x);
}

// float32 results that a kernel reduces x to. It fills them all, unless x is empty: then no kernel runs, and they are zero.
inline Tensor new_sums(const Tensor& x, std::initializer_list<int64_t> shape) {
  return x.numel() > 0 ? new_tensor(x, shape, ScalarType::Float) : torch::stable::new_zeros(x, shape, ScalarType::Float);
}

inline int64_t axis_of(const char* op, const Tensor& x, int64_t axis) {
  const int64_t dim = x.dim();
  QK_CHECK(axis >= -dim && axis < dim, op, "axis",
           "None or in [" + std::to_string(-dim) + ", " + std::to_string(dim - 1) + "] for x of shape " + shape_of(x), axis);
  return axis < 0 ? axis + dim : axis;
}

inline Layout layout_of(const char* op, const Tensor& x, std::optional<int64_t> axis) {
  if (!axis) return {1, 1, x.numel()};
  const int64_t channel = axis_of(op, x, *axis);
  Layout layout{1, x.size(channel), 1};
  bool outside = true;
  for (const int64_t d : memory_order(x)) {
    if (d == channel) {
      outside = false;
    } else {
      (outside ? layout.outer : layout.inner) *= x.size(d);
    }
  }
  return layout;
}

}  // namespace qk::ops

#pragma once
// New tensors. torch's stable C++ functions look an operator up by its name at each call, which takes longer than a small
// layer's kernel; the C functions below go straight to it. They honour torch.utils.deterministic.fill_uninitialized_memory.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

namespace qk::ops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Contiguous, on the device of `like`; its dtype unless another is named.
inline Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef shape, std::optional<ScalarType> dtype = std::nullopt) {
  int32_t device_type, device_index, layout, type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &type));
  if (dtype) type = torch::stable::detail::to<int32_t>(torch::stable::detail::from(*dtype));
  AtenTensorHandle made;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(like.get(), shape.data(), static_cast<int64_t>(shape.size()),
                                                          &type, &layout, &device_type, device_index, nullptr, &made));
  return Tensor(made);
}

// Whether the strides are those of a new tensor, also of the dimensions of size 1, which do not matter to a kernel.
inline bool has_default_strides(const Tensor& t) {
  const IntHeaderOnlyArrayRef sizes = t.sizes(), strides = t.strides();
  int64_t expected = 1;
  for (int64_t d = t.dim() - 1; d >= 0; --d) {
    if (strides[d] != expected) return false;
    expected *= sizes[d] > 0 ? sizes[d] : 1;
  }
  return true;
}

// Like torch.empty_like: a dense tensor's strides are kept.
inline Tensor new_like(const Tensor& x) {
  return has_default_strides(x) ? new_tensor(x, x.sizes()) : torch::stable::empty_like(x);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace qk::ops

#pragma once
// New tensors. Large results of the CPU backend lie in blocks that are used again (cpu/blocks.h). For the others: torch's
// stable C++ functions look an operator up by its name at each call, which takes longer than a small layer's kernel; the C
// functions below go straight to it. They honour torch.utils.deterministic.fill_uninitialized_memory, blocks do not.

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <array>
#include <numeric>
#include <optional>
#include <vector>

// Since torch 2.11, which is newer than the oldest one served: null in those.
extern "C" __attribute__((weak)) AOTITorchError torch_from_blob(void* data, int64_t ndim, const int64_t* sizes,
                                                                const int64_t* strides, int64_t storage_offset,
                                                                int32_t dtype, int32_t device_type, int32_t device_index,
                                                                AtenTensorHandle* made, int32_t layout,
                                                                const uint8_t* opaque, int64_t opaque_size,
                                                                void (*deleter)(void* data, void* context), void* context);

namespace qk::ops {

using torch::headeronly::IntHeaderOnlyArrayRef;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Where a backend on the CPU takes the memory of large results from, and how it is given back; without, torch's allocator.
struct BlockSource {
  size_t smallest;
  void* (*take)(size_t bytes);
  void (*give)(void* block, size_t bytes);
};
inline const BlockSource* block_source = nullptr;

inline int32_t type_of(const Tensor& t, std::optional<ScalarType> other) {
  int32_t type;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(t.get(), &type));
  return other ? torch::stable::detail::to<int32_t>(torch::stable::detail::from(*other)) : type;
}

// A dense tensor in a block; none where it is small, or torch is older than 2.11.
inline std::optional<Tensor> new_in_block(int32_t type, IntHeaderOnlyArrayRef shape, const int64_t* strides) {
  int64_t numel = 1;
  for (const int64_t size : shape) numel *= size;
  const size_t bytes = numel * aoti_torch_dtype_element_size(type);
  if (!block_source || bytes < block_source->smallest || !torch_from_blob) return std::nullopt;
  void* const block = block_source->take(bytes);
  if (!block) return std::nullopt;  // torch's allocator has words for it
  AtenTensorHandle made;
  const auto give = [](void* data, void* size) { block_source->give(data, reinterpret_cast<size_t>(size)); };
  STABLE_TORCH_ERROR_CODE_CHECK(torch_from_blob(block, static_cast<int64_t>(shape.size()), shape.data(), strides, 0, type,
                                                aoti_torch_device_type_cpu(), -1, &made, aoti_torch_layout_strided(),
                                                nullptr, 0, give, reinterpret_cast<void*>(bytes)));
  return Tensor(made);
}

// Contiguous, on the device of `like`; its dtype unless another is named.
inline Tensor new_tensor(const Tensor& like, IntHeaderOnlyArrayRef shape, std::optional<ScalarType> dtype = std::nullopt) {
  int32_t type = type_of(like, dtype);
  if (block_source) {
    std::vector<int64_t> strides(shape.size(), 1);
    for (auto d = static_cast<int64_t>(shape.size()) - 2; d >= 0; --d)
      strides[d] = strides[d + 1] * std::max<int64_t>(shape[d + 1], 1);
    if (auto made = new_in_block(type, shape, strides.data())) return *made;
  }
  int32_t device_type, device_index, layout;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_layout(like.get(), &layout));
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

// Dimensions from the slowest to the fastest in memory; those of size 1 do not matter.
inline std::vector<int64_t> memory_order(const Tensor& t) {
  std::vector<int64_t> order(t.dim());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return t.stride(a) > t.stride(b); });
  return order;
}

// Some permutation of the dimensions is contiguous: contiguous and channels_last tensors, and their transposes.
inline bool is_dense(const Tensor& t) {
  if (t.is_contiguous()) return true;
  int64_t expected = 1;
  const std::vector<int64_t> order = memory_order(t);
  for (auto d = order.rbegin(); d != order.rend(); ++d) {
    if (t.size(*d) == 1) continue;
    if (t.stride(*d) != expected) return false;
    expected *= t.size(*d);
  }
  return true;
}

// Like torch.empty_like: a dense tensor's strides are kept. Its dtype unless another is named.
inline Tensor new_like(const Tensor& x, std::optional<ScalarType> dtype = std::nullopt) {
  if (has_default_strides(x)) return new_tensor(x, x.sizes(), dtype);
  if (block_source && is_dense(x))
    if (auto made = new_in_block(type_of(x, dtype), x.sizes(), x.strides().data())) return *made;
  using torch::stable::detail::from;
  StableIValue stack[] = {from(x),           from(dtype), from(std::nullopt), from(std::nullopt), from(std::nullopt),
                          from(std::nullopt)};
  STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::empty_like", "", stack, TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// Images [n, c, h, w] in either memory format, on the device of `like`.
inline Tensor new_images(const Tensor& like, const std::array<int64_t, 4>& shape, ScalarType dtype, bool channels_last) {
  const IntHeaderOnlyArrayRef sizes(shape.data(), shape.size());
  if (!channels_last) return new_tensor(like, sizes, dtype);
  const auto [n, c, h, w] = shape;
  const int64_t strides[] = {h * w * c, 1, w * c, c};
  if (auto made = new_in_block(type_of(like, dtype), sizes, strides)) return *made;
  return torch::stable::empty(sizes, dtype, std::nullopt, like.device(), std::nullopt,
                              torch::headeronly::MemoryFormat::ChannelsLast);
}

inline Tensor as_contiguous(const Tensor& t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

}  // namespace qk::ops

#pragma once
// attention_quantize: checks and allocation, the same for every backend.

#include <tuple>

#include "ops/dispatch.h"
#include "ops/fake_quantize.h"
#include "ops/stats.h"

namespace qk::ops {

using Ints = std::vector<int64_t>;

// The float32 tensors must outlive the arguments that point into them.
struct AttentionInputs {
  Tensor x, attention, grids;
  AttentionArgs args;
};

inline AttentionInputs attention_inputs(const char* op, const Tensor& x_in, const Tensor& attention_in,
                                        const Tensor& grids_in, const Ints& kinds, const Ints& levels, const Ints& stes,
                                        std::optional<int64_t> axis) {
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  const auto count = static_cast<int64_t>(kinds.size());
  QK_CHECK(count >= 1 && count <= kMaxQuantizers, op, "kinds", "of 1 to 8 quantizers", count);
  QK_CHECK(levels.size() == kinds.size(), op, "levels", "one for each of the " + std::to_string(count) + " kinds",
           levels.size());
  QK_CHECK(stes.size() == kinds.size(), op, "stes", "one for each of the " + std::to_string(count) + " kinds", stes.size());
  AttentionArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.count = count;
  for (int64_t k = 0; k < count; ++k) {
    args.kinds[k] = check_kind(op, "kinds", kinds[k], Kind::kIdentity);
    args.levels[k] = check_levels(op, "levels", args.kinds[k], levels[k]);
    args.stes[k] = check_ste(op, "stes", args.kinds[k], stes[k]);
  }
  const Tensor attention = parameters(op, "attention", attention_in, x, {count});
  const Tensor grids = parameters(op, "grids", grids_in, x, {count, args.layout.channels, kGridColumns});
  args.attention = static_cast<const float*>(attention.const_data_ptr());
  args.grids = static_cast<const float*>(grids.const_data_ptr());
  args.x = x.const_data_ptr();
  return {x, attention, grids, args};
}

template <class Backend>
Tensor attention_quantize(const Tensor& x_in, const Tensor& attention, const Tensor& grids, const Ints kinds,
                          const Ints levels, const Ints stes, std::optional<int64_t> axis, bool, bool covered) {
  AttentionInputs in = attention_inputs("attention_quantize", x_in, attention, grids, kinds, levels, stes, axis);
  in.args.covered = covered;
  Tensor out = new_like(in.x);
  in.args.out = out.mutable_data_ptr();
  if (in.x.numel() > 0) Backend::attention_quantize_forward(in.args, in.x);
  return out;
}

// The mixture of min-max quantizers of x itself, and their grids: two ops in one call, which is a few microseconds less.
template <class Backend>
std::tuple<Tensor, Tensor> minmax_attention_quantize(const Tensor& x, const Tensor& attention, const Ints levels,
                                                     std::optional<int64_t> axis) {
  const Ints uniform(levels.size(), static_cast<int64_t>(Kind::kUniform));
  const Ints straight(levels.size(), static_cast<int64_t>(Ste::kIdentity));
  const Tensor grids = minmax_grids<Backend>(x, levels, axis);
  return {attention_quantize<Backend>(x, attention, grids, uniform, levels, straight, axis, true, true), grids};
}

template <class Backend>
std::tuple<Tensor, Tensor, Tensor> attention_quantize_backward(const Tensor& grad_in, const Tensor& x_in,
                                                               const Tensor& attention, const Tensor& grids,
                                                               const Ints kinds, const Ints levels, const Ints stes,
                                                               std::optional<int64_t> axis) {
  constexpr const char* op = "attention_quantize_backward";
  AttentionInputs in = attention_inputs(op, x_in, attention, grids, kinds, levels, stes, axis);
  const Tensor grad = gradient_of(op, grad_in, in.x);
  Tensor grad_x = new_like(in.x);
  Tensor grad_attention = new_sums(in.x, {in.args.count});
  Tensor sums = new_sums(in.x, {in.args.count, in.args.layout.channels, 3});
  in.args.grad = grad.const_data_ptr();
  in.args.out = grad_x.mutable_data_ptr();
  in.args.grad_attention = static_cast<float*>(grad_attention.mutable_data_ptr());
  in.args.sums = static_cast<float*>(sums.mutable_data_ptr());
  if (in.x.numel() > 0) Backend::attention_quantize_backward(in.args, in.x);
  return {grad_x, grad_attention, sums};
}

// grad_attention alone: the backward kernel writes nothing else.
template <class Backend>
Tensor attention_gradient(const Tensor& grad_in, const Tensor& x_in, const Tensor& attention, const Tensor& grids,
                          const Ints kinds, const Ints levels, std::optional<int64_t> axis, bool covered) {
  constexpr const char* op = "attention_gradient";
  AttentionInputs in = attention_inputs(op, x_in, attention, grids, kinds, levels, Ints(kinds.size(), 0), axis);
  in.args.covered = covered;
  const Tensor grad = gradient_of(op, grad_in, in.x);
  Tensor grad_attention = new_sums(in.x, {in.args.count});
  in.args.grad = grad.const_data_ptr();
  in.args.grad_attention = static_cast<float*>(grad_attention.mutable_data_ptr());
  if (in.x.numel() > 0) Backend::attention_quantize_backward(in.args, in.x);
  return grad_attention;
}

}  // namespace qk::ops

#pragma once
// Statistics: checks and allocation, the same for every backend. A tensor without elements has zeros everywhere.

#include "ops/dispatch.h"
#include "ops/fake_quantize.h"

namespace qk::ops {

template <class Backend>
Tensor channel_stats(const Tensor& x_in, std::optional<int64_t> axis) {
  constexpr const char* op = "channel_stats";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  StatsArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.x = x.const_data_ptr();
  Tensor stats = new_sums(x, {args.layout.channels, 4});
  args.stats = static_cast<float*>(stats.mutable_data_ptr());
  if (x.numel() > 0) Backend::channel_stats(args, x);
  return stats;
}

template <class Backend>
Tensor minmax_grids(const Tensor& x_in, const std::vector<int64_t> levels, std::optional<int64_t> axis) {
  constexpr const char* op = "minmax_grids";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  StatsArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.count = static_cast<int64_t>(levels.size());
  QK_CHECK(args.count >= 1 && args.count <= kMaxQuantizers, op, "levels", "of 1 to 8 widths", args.count);
  for (int64_t k = 0; k < args.count; ++k) args.levels[k] = check_levels(op, "levels", Kind::kUniform, levels[k]);
  args.x = x.const_data_ptr();
  Tensor grids = new_sums(x, {args.count, args.layout.channels, kGridColumns});
  args.grids = static_cast<float*>(grids.mutable_data_ptr());
  if (x.numel() > 0) Backend::channel_stats(args, x);
  return grids;
}

template <class Backend>
Tensor conditional_abs_mean(const Tensor& x_in, const Tensor& threshold_in, std::optional<int64_t> axis) {
  constexpr const char* op = "conditional_abs_mean";
  check_float(op, "x", x_in);
  const Tensor x = dense(x_in);
  ConditionalMeanArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  const Tensor threshold = parameters(op, "threshold", threshold_in, x, {args.layout.channels});
  args.x = x.const_data_ptr();
  args.threshold = static_cast<const float*>(threshold.const_data_ptr());
  Tensor mean = new_sums(x, {args.layout.channels});
  args.mean = static_cast<float*>(mean.mutable_data_ptr());
  if (x.numel() > 0) Backend::conditional_abs_mean(args, x);
  return mean;
}

template <class Backend>
Tensor range_errors(const Tensor& x_in, const Tensor& candidates_in, int64_t levels, std::optional<int64_t> axis) {
  constexpr const char* op = "range_errors";
  check_float(op, "x", x_in);
  QK_CHECK(candidates_in.dim() == 2, op, "candidates", "of shape [channels, J]", shape_of(candidates_in));
  const Tensor x = dense(x_in);
  RangeErrorsArgs args{};
  args.layout = layout_of(op, x, axis);
  args.dtype = dtype_of(x);
  args.candidates = candidates_in.size(1);
  args.levels = check_levels(op, "levels", Kind::kUniform, levels);
  const Tensor candidates = parameters(op, "candidates", candidates_in, x, {args.layout.channels, args.candidates});
  args.x = x.const_data_ptr();
  args.ranges = static_cast<const float*>(candidates.const_data_ptr());
  Tensor errors = new_sums(x, {args.layout.channels, args.candidates});
  args.errors = static_cast<float*>(errors.mutable_data_ptr());
  if (x.numel() > 0 && args.candidates > 0) Backend::range_errors(args, x);
  return errors;
}

}  // namespace qk::ops

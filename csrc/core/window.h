#pragma once
// Which taps of a window lie inside the image, along one dimension.

#include <cstdint>

#include "core/args.h"
#include "core/macros.h"

namespace qk {

// Taps [first, last).
struct TapRange {
  int64_t first, last;

  QK_HOST_DEVICE int64_t count() const { return last - first; }
  bool operator==(const TapRange&) const = default;
};

struct WindowAxis {
  int64_t out_size, in_size, kernel, stride, pad, dilation;

  QK_HOST_DEVICE TapRange taps(int64_t o) const {
    const int64_t start = o * stride - pad;
    const int64_t before = start >= 0 ? 0 : (-start + dilation - 1) / dilation;
    const int64_t first = before < kernel ? before : kernel;
    const int64_t end = start >= in_size ? first : (in_size - start + dilation - 1) / dilation;
    return {first, end < first ? first : (end < kernel ? end : kernel)};
  }

  // Output positions with the same taps have the same class. Both ends of the range only fall along the axis, so the sum of
  // their falls tells ranges apart: no table is needed, and there are at most 2 * kernel + 1 classes.
  QK_HOST_DEVICE int64_t class_of(int64_t o) const {
    const TapRange from = taps(0), to = taps(o);
    return (from.first - to.first) + (from.last - to.last);
  }
  QK_HOST_DEVICE int64_t classes() const { return class_of(out_size - 1) + 1; }

  // A position of this class, or of the next one that exists.
  QK_HOST_DEVICE int64_t position_of(int64_t window_class) const {
    int64_t low = 0, high = out_size - 1;
    while (low < high) {
      const int64_t middle = low + (high - low) / 2;
      if (class_of(middle) >= window_class) {
        high = middle;
      } else {
        low = middle + 1;
      }
    }
    return low;
  }
};

QK_HOST_DEVICE WindowAxis row_axis(const ConvGeometry& g) {
  return {g.out_height, g.in_height, g.kernel_height, g.stride_height, g.pad_top, g.dilation_height};
}
QK_HOST_DEVICE WindowAxis column_axis(const ConvGeometry& g) {
  return {g.out_width, g.in_width, g.kernel_width, g.stride_width, g.pad_left, g.dilation_width};
}

}  // namespace qk

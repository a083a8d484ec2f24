#pragma once
// Plain argument structs: what csrc/ops hands to the kernels of every backend. No torch, no CUDA runtime.

#include <cstdint>

#include "core/quantizer.h"

namespace qk {

enum class DType : int8_t { kFloat32, kFloat16, kBFloat16, kUInt8 };

// A dense tensor seen as [outer, channels, inner] in memory order; per tensor: [1, 1, numel].
struct Layout {
  int64_t outer;
  int64_t channels;
  int64_t inner;

  QK_HOST_DEVICE int64_t numel() const { return outer * channels * inner; }
};

struct StatsArgs {
  Layout layout;
  DType dtype;
  const void* x;                   // [outer, channels, inner]
  float* stats;                    // [channels, 4]: min, max, sum |x|, sum x^2; null: the grids are wanted
  int64_t count;                   // K widths of a min-max quantizer
  int64_t levels[kMaxQuantizers];  // [K]
  float* grids;                    // [K, channels, 3]
};

// What is wanted of a channel's statistics (min, max, sum |x|, sum x^2).
QK_HOST_DEVICE void finish_stats(const StatsArgs& args, int64_t channel, const float* stats) {
  if (args.stats)
    for (int s = 0; s < 4; ++s) args.stats[channel * 4 + s] = stats[s];
  if (!args.grids) return;
  for (int k = 0; k < kMaxQuantizers; ++k) {
    if (k >= args.count) break;
    const Grid grid = minmax_grid(stats[0], stats[1], args.levels[k]);
    float* const row = args.grids + (k * args.layout.channels + channel) * kGridColumns;
    row[0] = grid.offset;
    row[1] = grid.step;
    row[2] = grid.threshold;
  }
}

struct ConditionalMeanArgs {
  Layout layout;
  DType dtype;
  const void* x;           // [outer, channels, inner]
  const float* threshold;  // [channels]
  float* mean;             // [channels]: mean of |x| where |x| > threshold, 0 where there is none
};

struct RangeErrorsArgs {
  Layout layout;
  DType dtype;
  int64_t candidates;
  int64_t levels;
  const void* x;        // [outer, channels, inner]
  const float* ranges;  // [channels, candidates]: a, for levels uniform on [-a, a]
  float* errors;        // [channels, candidates]: sum of (q - x)^2
};

struct FakeQuantizeArgs {
  Layout layout;
  DType dtype;
  Kind kind;
  Ste ste;
  int64_t levels;
  const float* grid;  // [channels, 3]
  const void* x;      // [outer, channels, inner]
  const void* grad;   // like x; backward only
  void* out;          // like x: q, or grad_x in the backward pass
  float* sums;        // [channels, 3]: below, above, inside; backward only, null where they are not wanted
  int32_t* mask;      // [words_of(numel)]: element i in memory lies inside the range, bit i % 32; masked forward only
};

struct ApplyMaskArgs {
  int64_t numel;
  DType dtype;
  const int32_t* mask;  // [words_of(numel)]
  const void* grad;     // [numel] in memory order
  void* out;            // like grad: grad where the bit is set, else 0
};

struct AttentionArgs {
  Layout layout;
  DType dtype;
  int64_t count;                   // K quantizers
  Kind kinds[kMaxQuantizers];      // [K]
  Ste stes[kMaxQuantizers];        // [K]
  int64_t levels[kMaxQuantizers];  // [K]
  bool covered;                    // no x lies outside the range of a uniform member
  const float* attention;          // [K]
  const float* grids;              // [K, channels, 3]
  const void* x;                   // [outer, channels, inner]
  const void* grad;                // like x; backward only
  void* out;                       // like x: q, or grad_x in the backward pass; null: grad_attention is all that is wanted
  float* grad_attention;           // [K]; backward only
  float* sums;                     // [K, channels, 3]: below, above, inside; backward only, null where out is
};

struct EncodeArgs {
  Layout layout;
  DType dtype;
  Kind kind;
  int64_t levels;
  const float* grid;  // [channels, 3]
  const void* x;      // [outer, channels, inner]
  uint8_t* codes;     // like x
};

struct PackArgs {
  int64_t rows;
  int64_t columns;
  int64_t words;  // ceil(columns / 32)
  Kind kind;
  int64_t levels;
  int bits;
  const uint8_t* codes;  // [rows, columns]
  int32_t* planes;       // [bits, rows, words], most significant first
};

struct UnpackArgs {
  int64_t rows;
  int64_t columns;
  int64_t words;
  Kind kind;
  int bits;
  const int32_t* planes;  // [bits, rows, words]
  uint8_t* codes;         // [rows, columns]
};

struct QuantizePackArgs {
  int64_t rows;
  int64_t columns;
  int64_t words;
  DType dtype;
  Kind kind;
  int64_t levels;
  int bits;
  bool per_row;         // grid has one row a row of x, else one for all
  const float* grid;    // [rows or 1, 3]
  const void* x;        // [rows, columns]
  int32_t* planes;      // [bits, rows, words]
  int32_t* plane_sums;  // [bits, rows]: ones in each row of each plane
};

// From exact integer sums to the layer's output: csrc/core/algebra.h says how.
struct EpilogueArgs {
  const float* x_grid;  // [1, 3], of a learned basis [1, 1 + bits]
  const float* w_grid;  // [1 or out_channels, w_columns]
  int w_columns;        // 3, or 1 + bits
  bool w_per_channel;
  bool plane_pairs;    // sums come with the steps of both operands in them (core/algebra.h)
  const float* bias;   // [out_channels] or null
  const float* scale;  // [out_channels] or null: folded batch-norm, y * scale + shift
  const float* shift;  // [out_channels] or null
  float lower;         // ReLU and clips: y is clamped to [lower, upper]
  float upper;
  const float* out_grid;  // [1, 3 or 1 + bits] or null: the output is then codes of the next layer
  Kind out_kind;
  int64_t out_levels;
  DType out_dtype;
};

// A linear layer is a 1 x 1 convolution of a 1 x 1 image: kernels that gain from it tell it by the geometry.
struct ConvGeometry {
  int64_t batch, in_channels, in_height, in_width;
  int64_t out_channels, out_height, out_width;
  int64_t kernel_height, kernel_width;
  int64_t stride_height, stride_width;
  int64_t pad_top, pad_left;  // bottom and right follow from the output size
  int64_t dilation_height, dilation_width;
  int64_t groups;
};

struct LowbitArgs {
  ConvGeometry geometry;
  DType x_dtype;  // kUInt8: x holds codes already
  Kind x_kind;
  int64_t x_levels;
  const void* x;  // [batch, in_channels, in_height, in_width] with the strides below
  int64_t x_stride[4];
  Kind w_kind;
  int64_t w_levels;
  int w_bits;
  int64_t words;             // words a row: ceil(kernel_height * kernel_width * in_channels / groups / 32)
  const int32_t* planes;     // [w_bits, out_channels, words], rows in (kh, kw, cin) order
  const uint8_t* prepacked;  // the same as the backend arranges it for all calls, or null
  EpilogueArgs epilogue;
  void* out;  // [batch, out_channels, out_height, out_width] with the strides below
  int64_t out_stride[4];
};

}  // namespace qk

#pragma once
// Device code of lowbit_conv2d where each output channel reads one input channel: directly from the codes.

#include "cuda/plan.h"
#include "cuda/tile/divide.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

// Codes of the weights: [taps, out_channels].
__global__ void __launch_bounds__(kThreads) tap_codes_kernel(const LowbitArgs args, uint8_t* __restrict__ codes) {
  const ConvGeometry& g = args.geometry;
  const int64_t count = g.kernel_height * g.kernel_width * g.out_channels;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t tap = i / g.out_channels, channel = i % g.out_channels;
    int code = 0;
    for (int plane = 0; plane < args.w_bits; ++plane) {
      const int32_t word = args.planes[(plane * g.out_channels + channel) * args.words + tap / kWordBits];
      code += (word >> tap % kWordBits & 1) * plane_weight(args.w_kind, args.w_bits, plane);
    }
    codes[i] = static_cast<uint8_t>(code);
  }
}

struct DepthwiseArgs {
  LowbitArgs lowbit;
  const uint8_t* x;           // [input pixels, in_channels]
  const uint8_t* weights;     // [taps, out_channels]
  const float* window_terms;  // [classes, out_channels]
  uint32_t items;             // of an image: (pixel, pack of channels)
  bool channels_first;        // neighbouring threads take neighbouring pixels, not channels
  Divider by_packs, by_pixels, by_width, by_multiple;
};

// A thread: kPack neighbouring output channels of one output pixel. kPack 4: as many input channels as output channels.
template <int kPack>
__global__ void __launch_bounds__(kThreads) depthwise_kernel(const __grid_constant__ DepthwiseArgs p) {
  const ConvGeometry& g = p.lowbit.geometry;
  const EpilogueArgs& e = p.lowbit.epilogue;
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= p.items) return;
  const uint32_t quotient = p.channels_first ? p.by_pixels(item) : p.by_packs(item);
  const uint32_t rest = item - quotient * (p.channels_first ? p.by_pixels : p.by_packs).divisor;
  const uint32_t pixel = p.channels_first ? rest : quotient, channel = (p.channels_first ? quotient : rest) * kPack;
  const uint32_t oy = p.by_width(pixel), ox = pixel - oy * p.by_width.divisor;
  const WindowAxis rows = row_axis(g), columns = column_axis(g);
  const TapRange down = rows.taps(oy), across = columns.taps(ox);
  const int64_t window_class = rows.class_of(oy) * columns.classes() + columns.class_of(ox);
  const OutputGrid grid = load_output_grid(e);
  const int64_t channels = g.out_channels, iy = oy * g.stride_height - g.pad_top, ix = ox * g.stride_width - g.pad_left;
  for (int64_t image = blockIdx.y; image < g.batch; image += gridDim.y) {
    uint32_t dots[kPack]{}, sums[kPack]{};
    for (int64_t kh = down.first; kh < down.last; ++kh)
      for (int64_t kw = across.first; kw < across.last; ++kw) {
        const int64_t at = (image * g.in_height + iy + kh * g.dilation_height) * g.in_width + ix + kw * g.dilation_width;
        const uint8_t* const code = p.x + at * g.in_channels + (kPack == 1 ? p.by_multiple(channel) : channel);
        const uint8_t* const weight = p.weights + (kh * g.kernel_width + kw) * channels + channel;
        if constexpr (kPack == 1) {
          dots[0] += uint32_t{*code} * *weight;
          sums[0] += *code;
        } else {
          const uint32_t quad = *reinterpret_cast<const uint32_t*>(code);
          const uint32_t weights = *reinterpret_cast<const uint32_t*>(weight);
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            const uint32_t one = quad & 0xffu << 8 * c;
            dots[c] = __dp4a(one, weights, dots[c]);
            sums[c] = __dp4a(one, 0x01010101u, sums[c]);
          }
        }
      }
    const float* const window = p.window_terms + window_class * channels + channel;
    float y[kPack];
#pragma unroll
    for (int c = 0; c < kPack; ++c)
      y[c] = finish_sums(e, grid, load_output_channel(e, channel + c), static_cast<float>(static_cast<int32_t>(dots[c])),
                         static_cast<float>(static_cast<int32_t>(sums[c])), window[c]);
    const int64_t* const stride = p.lowbit.out_stride;
    const int64_t to = image * stride[0] + oy * stride[2] + ox * stride[3] + channel * stride[1];
    if (stride[1] == 1) {
      store_output(e, grid, p.lowbit.out, to, y, kPack, kPack > 1);
    } else {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        float one[1] = {y[c]};
        store_output(e, grid, p.lowbit.out, to + c * stride[1], one, 1, false);
      }
    }
  }
}

}  // namespace qk::cuda

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

// One digit of each of four codes.
__device__ __forceinline__ uint32_t digit_of_quad(Kind kind, uint32_t quad, int digit) {
  if (kind == Kind::kTernary) quad |= quad >> 1 & 0x01010101u;  // codes 0, 1, 2 as thermometers 00, 01, 11
  return quad >> digit & 0x01010101u;
}

// The valid taps of a window, and where they lie.
struct DepthwiseWindow {
  TapRange down, across;
  int64_t x, x_row, x_column;  // bytes: of the first tap, between rows, between columns
  int64_t weight, weight_row, weight_column;
};

// dots and sums of kPack channels; each(quad) is what is taken of four codes of the activation, of the weight.
template <int kPack, class OfActivation, class OfWeight>
__device__ __forceinline__ void sum_taps(const DepthwiseArgs& p, const DepthwiseWindow& w, const OfActivation& of_activation,
                                         const OfWeight& of_weight, uint32_t (&dots)[kPack], uint32_t (&sums)[kPack]) {
  for (int64_t kh = w.down.first; kh < w.down.last; ++kh)
    for (int64_t kw = w.across.first; kw < w.across.last; ++kw) {
      const uint8_t* const code = p.x + (w.x + kh * w.x_row + kw * w.x_column);
      const uint8_t* const weight = p.weights + (w.weight + kh * w.weight_row + kw * w.weight_column);
      if constexpr (kPack == 1) {
        const uint32_t one = of_activation(*code);
        dots[0] += one * of_weight(*weight);
        sums[0] += one;
      } else {
        const uint32_t quad = of_activation(*reinterpret_cast<const uint32_t*>(code));
        const uint32_t weights = of_weight(*reinterpret_cast<const uint32_t*>(weight));
#pragma unroll
        for (int c = 0; c < kPack; ++c) {
          const uint32_t one = quad & 0xffu << 8 * c;
          dots[c] = __dp4a(one, weights, dots[c]);
          sums[c] = __dp4a(one, 0x01010101u, sums[c]);
        }
      }
    }
}

// A thread: kPack neighbouring output channels of one output pixel. kPack 4: as many input channels as output channels.
// kPairs: a basis is learned, and each pair of digits has a step of its own.
template <int kPack, bool kPairs>
__global__ void __launch_bounds__(kThreads, kPairs ? 2 : 0) depthwise_kernel(const __grid_constant__ DepthwiseArgs p) {
  const ConvGeometry& g = p.lowbit.geometry;
  const EpilogueArgs& e = p.lowbit.epilogue;
  const uint32_t item = blockIdx.x * kThreads + threadIdx.x;
  if (item >= p.items) return;
  const uint32_t quotient = p.channels_first ? p.by_pixels(item) : p.by_packs(item);
  const uint32_t rest = item - quotient * (p.channels_first ? p.by_pixels : p.by_packs).divisor;
  const uint32_t pixel = p.channels_first ? rest : quotient, channel = (p.channels_first ? quotient : rest) * kPack;
  const uint32_t oy = p.by_width(pixel), ox = pixel - oy * p.by_width.divisor;
  const WindowAxis rows = row_axis(g), columns = column_axis(g);
  const int64_t window_class = rows.class_of(oy) * columns.classes() + columns.class_of(ox);
  const OutputGrid grid = load_output_grid(e);
  const int64_t channels = g.out_channels, iy = oy * g.stride_height - g.pad_top, ix = ox * g.stride_width - g.pad_left;
  DepthwiseWindow window{rows.taps(oy),
                         columns.taps(ox),
                         0,
                         g.dilation_height * g.in_width * g.in_channels,
                         g.dilation_width * g.in_channels,
                         channel,
                         g.kernel_width * channels,
                         channels};
  for (int64_t image = blockIdx.y; image < g.batch; image += gridDim.y) {
    window.x =
        ((image * g.in_height + iy) * g.in_width + ix) * g.in_channels + (kPack == 1 ? p.by_multiple(channel) : channel);
    float products[kPack]{}, activations[kPack]{}, y[kPack];
    if constexpr (kPairs) {
      const Kind x_kind = p.lowbit.x_kind, w_kind = p.lowbit.w_kind;
      const int x_bits = bits_of(x_kind, p.lowbit.x_levels);
      for (int i = 0; i < p.lowbit.w_bits; ++i)
        for (int j = 0; j < x_bits; ++j) {
          uint32_t dots[kPack]{}, sums[kPack]{};
          sum_taps(
              p, window, [&](uint32_t quad) { return digit_of_quad(x_kind, quad, j); },
              [&](uint32_t quad) { return digit_of_quad(w_kind, quad, i); }, dots, sums);
          const float x_step = step_of_digit(x_kind, e.x_grid, j);
#pragma unroll
          for (int c = 0; c < kPack; ++c) {
            const float step = pair_step(step_of_digit(w_kind, weight_grid(e, channel + c), i), x_step);
            products[c] = add_digit(products[c], step, static_cast<float>(static_cast<int32_t>(dots[c])));
            if (i == 0)
              activations[c] = add_digit(activations[c], x_step, static_cast<float>(static_cast<int32_t>(sums[c])));
          }
        }
    } else {
      uint32_t dots[kPack]{}, sums[kPack]{};
      const auto whole = [](uint32_t quad) { return quad; };
      sum_taps(p, window, whole, whole, dots, sums);
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        products[c] = static_cast<float>(static_cast<int32_t>(dots[c]));
        activations[c] = static_cast<float>(static_cast<int32_t>(sums[c]));
      }
    }
    const float* const window_term = p.window_terms + window_class * channels + channel;
#pragma unroll
    for (int c = 0; c < kPack; ++c)
      y[c] = finish_sums(e, grid, load_output_channel(e, channel + c), products[c], activations[c], window_term[c]);
    const int64_t* const stride = p.lowbit.out_stride;
    const int64_t to = image * stride[0] + oy * stride[2] + ox * stride[3] + channel * stride[1];
    if (stride[1] == 1) {
      store_output<kPairs>(e, grid, p.lowbit.out, to, y, kPack, kPack > 1);
    } else {
#pragma unroll
      for (int c = 0; c < kPack; ++c) {
        float one[1] = {y[c]};
        store_output<kPairs>(e, grid, p.lowbit.out, to + c * stride[1], one, 1, false);
      }
    }
  }
}

}  // namespace qk::cuda

#pragma once
// From exact sums to the output, for every kernel of the low-bit products: the formulas of core/algebra.h in their order, so
// the floats are those of the CPU. Sums over pairs of planes come with their steps in them.

#include "core/algebra.h"
#include "core/window.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/levels.cuh"

namespace qk::cuda {

// What an output channel brings.
struct OutputChannel {
  float step, offset, bias, scale, shift;
};

__device__ __forceinline__ const float* weight_grid(const EpilogueArgs& e, int64_t channel) {
  return e.w_grid + (e.w_per_channel ? channel * e.w_columns : 0);
}

__device__ __forceinline__ OutputChannel load_output_channel(const EpilogueArgs& e, int64_t channel) {
  const float* const grid = weight_grid(e, channel);
  return {e.plane_pairs ? 1.0f : grid[1], grid[0], e.bias ? e.bias[channel] : 0.0f, e.scale ? e.scale[channel] : 0.0f,
          e.shift ? e.shift[channel] : 0.0f};
}

// What all elements share.
struct OutputGrid {
  Channel codes;  // of the next layer, if it takes codes
  float levels;
  float x_step;
};

__device__ __forceinline__ OutputGrid load_output_grid(const EpilogueArgs& e) {
  OutputGrid grid{{}, static_cast<float>(e.out_levels), e.plane_pairs ? 1.0f : e.x_grid[1]};
  if (e.out_grid && e.out_kind != Kind::kLearned) grid.codes = load_channel(e.out_grid, 0);
  return grid;
}

__device__ __forceinline__ float finish_sums(const EpilogueArgs& e, const OutputGrid& grid, const OutputChannel& c,
                                             float dot, float activations, float window) {
  float y = data_term(dot, activations, grid.x_step, c.step, c.offset) + window;
  if (e.bias) y = y + c.bias;
  if (e.scale) y = scale_and_shift(y, c.scale, c.shift);
  return clamp_output(y, e.lower, e.upper);
}

template <class T, int kSize>
__device__ __forceinline__ void store_as(void* out, int64_t at, const float (&y)[kSize], int count, bool whole) {
  Pack<T, kSize> pack;
#pragma unroll
  for (int i = 0; i < kSize; ++i) pack.v[i] = from_float<T>(y[i]);
  T* const to = static_cast<T*>(out) + at;
  if (whole) {
    store_pack<T, kSize, true>(to, pack, 0, kSize);
  } else {
    store_pack<T, kSize, false>(to, pack, 0, count);
  }
}

// The first `count` of kSize neighbours in the output, from element `at` on; whole: all of them, at a multiple of kSize.
// kLearned: codes of a learned basis, too, which the others have no registers for (run_learned in lowbit.cu).
template <bool kLearned, int kSize>
__device__ __forceinline__ void store_output(const EpilogueArgs& e, const OutputGrid& grid, void* out, int64_t at,
                                             float (&y)[kSize], int count, bool whole) {
  if (kLearned && e.out_grid && e.out_kind == Kind::kLearned) {  // the table of its levels has taken the grid's place
    const int bits = bits_of(e.out_kind, e.out_levels);
    int node[kSize];
#pragma unroll
    for (int& own : node) own = 1;
#pragma unroll 1  // one walk down for all, not one after the other: registers
    for (int depth = 0; depth < bits; ++depth)
#pragma unroll
      for (int i = 0; i < kSize; ++i) node[i] = child_of(e.out_grid, node[i], y[i]);
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = static_cast<float>(code_at(e.out_grid, bits, node[i]));
    return store_as<uint8_t>(out, at, y, count, whole);
  }
  if (e.out_grid) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) y[i] = encode(e.out_kind, y[i], grid.codes.grid, grid.codes.inverse, grid.levels);
    return store_as<uint8_t>(out, at, y, count, whole);
  }
  switch (e.out_dtype) {
    case DType::kFloat32:
      return store_as<float>(out, at, y, count, whole);
    case DType::kFloat16:
      return store_as<__half>(out, at, y, count, whole);
    case DType::kBFloat16:
      return store_as<__nv_bfloat16>(out, at, y, count, whole);
    case DType::kUInt8:
      return;  // has a grid
  }
}

// An output pixel: where it goes, which taps its window has, and the sum of the codes under it.
struct alignas(16) OutputPixel {
  int64_t at;  // of channel 0
  int32_t window_class;
  float activations;
};

// Index of the output pixel `pixel` of [batch, out_height, out_width].
struct PixelIndex {
  int64_t image, y, x;

  __device__ __forceinline__ PixelIndex(const ConvGeometry& g, int64_t pixel)
      : image(pixel / (g.out_height * g.out_width)), y(pixel / g.out_width % g.out_height), x(pixel % g.out_width) {}
};

__device__ __forceinline__ OutputPixel output_pixel(const LowbitArgs& args, int64_t pixel, float activations) {
  const PixelIndex i(args.geometry, pixel);
  const WindowAxis rows = row_axis(args.geometry), columns = column_axis(args.geometry);
  const int64_t window_class = rows.class_of(i.y) * columns.classes() + columns.class_of(i.x);
  return {i.image * args.out_stride[0] + i.y * args.out_stride[2] + i.x * args.out_stride[3],
          static_cast<int32_t>(window_class), activations};
}

// A part of the output: `pixels` of `channels`, from first_channel on. A Source tells the sums:
//
//   OutputPixel pixel(int p) const                       p < kPixels
//   void dots(int p, int c, int count, float* d) const   of four neighbours, `count` of them asked for: channels from c on
//                                                        if channels are neighbours in the output, else pixels from p on
template <bool kLearned, int kPixels, int kChannels, int kThreadCount, class Source>
__device__ __forceinline__ void finish_part(const LowbitArgs& args,
                                            const float* __restrict__ window_terms,  // [classes, out_channels]
                                            const Source& source, int pixels, int64_t first_channel, int channels) {
  constexpr int kPack = 4;
  const EpilogueArgs& e = args.epilogue;
  const OutputGrid grid = load_output_grid(e);
  const int64_t all_channels = args.geometry.out_channels, channel_stride = args.out_stride[1];
  if (channel_stride == 1) {  // a thread keeps to its channels
    constexpr int kPacks = kChannels / kPack;
    static_assert(kThreadCount % kPacks == 0);
    const int c0 = static_cast<int>(threadIdx.x) % kPacks * kPack, count = min(kPack, channels - c0);
    if (count <= 0) return;
    OutputChannel own[kPack]{};
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) own[i] = load_output_channel(e, first_channel + c0 + i);
    const bool whole = count == kPack && (all_channels | first_channel) % kPack == 0;
    for (int p = static_cast<int>(threadIdx.x) / kPacks; p < pixels; p += kThreadCount / kPacks) {
      const OutputPixel pixel = source.pixel(p);
      const float* const window = window_terms + pixel.window_class * all_channels + first_channel + c0;
      float y[kPack];
      source.dots(p, c0, count, y);
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (i < count) y[i] = finish_sums(e, grid, own[i], y[i], pixel.activations, window[i]);
      store_output<kLearned>(e, grid, args.out, pixel.at + first_channel + c0, y, count, whole);
    }
  } else {
    constexpr int kPacks = kPixels / kPack;
    static_assert(kThreadCount % kPacks == 0);
    const int p0 = static_cast<int>(threadIdx.x) % kPacks * kPack, count = min(kPack, pixels - p0);
    if (count <= 0) return;
    OutputPixel own[kPack]{};
#pragma unroll
    for (int i = 0; i < kPack; ++i)
      if (i < count) own[i] = source.pixel(p0 + i);
    const bool run = count == kPack && own[kPack - 1].at - own[0].at == kPack - 1;  // of one image
    for (int c = static_cast<int>(threadIdx.x) / kPacks; c < channels; c += kThreadCount / kPacks) {
      const OutputChannel channel = load_output_channel(e, first_channel + c);
      float y[kPack];
      source.dots(p0, c, count, y);
#pragma unroll
      for (int i = 0; i < kPack; ++i)
        if (i < count)
          y[i] = finish_sums(e, grid, channel, y[i], own[i].activations,
                             window_terms[own[i].window_class * all_channels + first_channel + c]);
      const int64_t shift = (first_channel + c) * channel_stride;
      if (run) {
        store_output<kLearned>(e, grid, args.out, own[0].at + shift, y, count, (own[0].at + shift) % kPack == 0);
      } else {
#pragma unroll
        for (int i = 0; i < kPack; ++i) {
          float one[1] = {y[i]};
          if (i < count) store_output<kLearned>(e, grid, args.out, own[i].at + shift, one, 1, false);
        }
      }
    }
  }
}

}  // namespace qk::cuda

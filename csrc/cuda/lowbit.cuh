#pragma once
// Device code that all low-bit products share: the activation as channels-last codes, and what the weights alone add to the
// output.

#include "core/algebra.h"
#include "core/bitplanes.h"
#include "core/window.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

struct EncodeRows {
  Kind kind;
  float levels;
  const float* grid;                                   // [1, 3]
  int64_t images, pixels;                              // pixels of an image
  int64_t groups, channels, tap_bytes;                 // channels of a group, and the bytes that they take in a row
  int64_t image_stride, channel_stride, pixel_stride;  // of x
};

inline constexpr int kEncodeTile = 64;

// x of any layout to codes [images, pixels, groups, tap_bytes], zeros behind a group's channels. A block turns tiles of
// kEncodeTile pixels by as many bytes; kAlongPixels: neighbouring elements of x are neighbouring pixels.
template <class T, bool kAlongPixels>
__global__ void __launch_bounds__(kThreads)
    encode_rows_kernel(const EncodeRows p, const T* __restrict__ x, uint8_t* __restrict__ codes) {
  __shared__ uint8_t tile[kEncodeTile][kEncodeTile + 4];
  const Channel c = load_channel(p.grid, 0);
  const int64_t row_bytes = p.groups * p.tap_bytes, across = divide_up(row_bytes, int64_t{kEncodeTile});
  const int64_t down = divide_up(p.pixels, int64_t{kEncodeTile});
  for (int64_t block = blockIdx.x; block < p.images * down * across; block += gridDim.x) {
    const int64_t image = block / (down * across), first_pixel = block / across % down * kEncodeTile;
    const int64_t first_byte = block % across * kEncodeTile;
    for (int i = static_cast<int>(threadIdx.x); i < kEncodeTile * kEncodeTile; i += kThreads) {
      const int row = kAlongPixels ? i % kEncodeTile : i / kEncodeTile;
      const int column = kAlongPixels ? i / kEncodeTile : i % kEncodeTile;
      const int64_t pixel = first_pixel + row, byte = first_byte + column, in_group = byte % p.tap_bytes;
      uint8_t code = 0;
      if (pixel < p.pixels && byte < row_bytes && in_group < p.channels) {
        const int64_t channel = byte / p.tap_bytes * p.channels + in_group;
        const T value = x[image * p.image_stride + channel * p.channel_stride + pixel * p.pixel_stride];
        if constexpr (std::is_same_v<T, uint8_t>) {
          code = value;
        } else {
          code = from_float<uint8_t>(encode(p.kind, to_float(value), c.grid, c.inverse, p.levels));
        }
      }
      tile[row][column] = code;
    }
    __syncthreads();
    const bool words = row_bytes % 4 == 0;
    const int step = words ? 4 : 1, columns = kEncodeTile / step;
    for (int i = static_cast<int>(threadIdx.x); i < kEncodeTile * columns; i += kThreads) {
      const int row = i / columns, column = i % columns * step;
      if (first_pixel + row >= p.pixels || first_byte + column >= row_bytes) continue;
      uint8_t* const to = codes + (image * p.pixels + first_pixel + row) * row_bytes + first_byte + column;
      if (words) {
        uint32_t word;
        memcpy(&word, &tile[row][column], sizeof word);
        memcpy(__builtin_assume_aligned(to, 4), &word, sizeof word);
      } else {
        *to = tile[row][column];
      }
    }
    __syncthreads();
  }
}

// Ones among bits [first, last) of a row of words, this lane's share of them.
__device__ __forceinline__ int64_t count_ones(const int32_t* __restrict__ row, int64_t first, int64_t last, int lane) {
  int64_t ones = 0;
  for (int64_t word = first / kWordBits + lane; word * kWordBits < last; word += 32) {
    auto bits = static_cast<uint32_t>(row[word]);
    if (word * kWordBits < first) bits &= ~0u << (first - word * kWordBits);
    if ((word + 1) * kWordBits > last) bits &= ~0u >> ((word + 1) * kWordBits - last);
    ones += __popc(bits);
  }
  return ones;
}

// oa*(sw*SW + ow*V) of every class of windows and channel, a warp each. The valid taps of a kernel row are one run of bits.
__global__ void __launch_bounds__(kThreads)
    window_terms_kernel(const LowbitArgs args, float* __restrict__ terms) {  // [classes, out_channels]
  const ConvGeometry& g = args.geometry;
  const WindowAxis rows = row_axis(g), columns = column_axis(g);
  const int64_t column_classes = columns.classes(), count = rows.classes() * column_classes * g.out_channels;
  const int64_t channels = g.in_channels / g.groups;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / 32; i < count;
       i += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t channel = i % g.out_channels, window_class = i / g.out_channels;
    const TapRange down = rows.taps(rows.position_of(window_class / column_classes));
    const TapRange across = columns.taps(columns.position_of(window_class % column_classes));
    int64_t sum = 0;
    for (int plane = 0; plane < args.w_bits; ++plane) {
      const int32_t* const row = args.planes + (plane * g.out_channels + channel) * args.words;
      int64_t ones = 0;
      for (int64_t y = down.first; y < down.last; ++y)
        ones += count_ones(row, (y * g.kernel_width + across.first) * channels,
                           (y * g.kernel_width + across.last) * channels, lane);
      sum += ones * plane_weight(args.w_kind, args.w_bits, plane);
    }
    sum = warp_sum(sum);
    if (lane != 0) continue;
    const float* const grid = args.epilogue.w_grid + (args.epilogue.w_per_channel ? channel * kGridColumns : 0);
    terms[i] = window_term(static_cast<float>(sum), static_cast<float>(down.count() * across.count() * channels),
                           args.epilogue.x_grid[0], grid[1], grid[0]);
  }
}

}  // namespace qk::cuda

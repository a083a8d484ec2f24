#pragma once
// Device code that all low-bit products share: the activation as channels-last codes, and what the weights alone add to the
// output.

#include "core/algebra.h"
#include "core/bitplanes.h"
#include "core/window.h"
#include "cuda/tile/channel.cuh"
#include "cuda/tile/element.cuh"
#include "cuda/tile/epilogue.cuh"
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
  for (int64_t word = first / kWordBits + lane; word * kWordBits < last; word += 32)
    ones += __popc(static_cast<uint32_t>(row[word]) & bits_within(word, first, last));
  return ones;
}

// Weight planes [bits, out_channels, words] to such whose taps begin with words, [.., taps, words_of(channels)].
__global__ void __launch_bounds__(kThreads)
    align_taps_kernel(const LowbitArgs args, int32_t* __restrict__ planes, int64_t count) {
  const ConvGeometry& g = args.geometry;
  const int64_t channels = g.in_channels / g.groups, tap_words = words_of(channels);
  const int64_t row_words = g.kernel_height * g.kernel_width * tap_words;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < count;
       i += static_cast<int64_t>(gridDim.x) * kThreads) {
    const int64_t tap = i % row_words / tap_words, within = i % tap_words * kWordBits;
    const int64_t first = tap * channels + within, last = min(first + kWordBits, (tap + 1) * channels);
    const int32_t* const row = args.planes + i / row_words * args.words;
    const int64_t word = first / kWordBits;
    uint64_t bits = static_cast<uint32_t>(row[word]) & bits_within(word, first, last);
    if (last > (word + 1) * kWordBits)
      bits |= uint64_t{static_cast<uint32_t>(row[word + 1]) & bits_within(word + 1, first, last)} << kWordBits;
    planes[i] = static_cast<int32_t>(static_cast<uint32_t>(bits >> first % kWordBits));
  }
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
    const float* const grid = weight_grid(args.epilogue, channel);
    const bool pairs = args.epilogue.plane_pairs;
    int64_t sum = 0;
    float with_steps = 0.0f;
    for (int digit = 0; digit < args.w_bits; ++digit) {
      const int plane = plane_of_digit(args.w_kind, args.w_bits, digit);
      const int32_t* const row = args.planes + (plane * g.out_channels + channel) * args.words;
      int64_t ones = 0;
      for (int64_t y = down.first; y < down.last; ++y)
        ones += count_ones(row, (y * g.kernel_width + across.first) * channels,
                           (y * g.kernel_width + across.last) * channels, lane);
      ones = warp_sum(ones);
      sum += ones * plane_weight(args.w_kind, args.w_bits, plane);
      if (pairs) with_steps = add_digit(with_steps, step_of_digit(args.w_kind, grid, digit), static_cast<float>(ones));
    }
    if (lane != 0) continue;
    terms[i] = window_term(pairs ? with_steps : static_cast<float>(sum),
                           static_cast<float>(down.count() * across.count() * channels), args.epilogue.x_grid[0],
                           pairs ? 1.0f : grid[1], grid[0]);
  }
}

}  // namespace qk::cuda

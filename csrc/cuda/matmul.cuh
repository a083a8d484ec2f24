#pragma once
// Device code of lowbit_linear for few rows: every plane of the weights is read once, and that is what it costs.

#include "cuda/plan.h"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"
#include "cuda/tile/unpack.cuh"

namespace qk::cuda {

inline constexpr int kDotThreads = 128;
inline constexpr int kDotWords = 4;  // words of each plane that a lane has in flight

// A warp an output channel: lane by lane the 32 codes of a word, times those of every row.
template <int kRows>
__global__ void __launch_bounds__(kDotThreads) dot_product_kernel(const LowbitArgs args,
                                                                  const uint8_t* __restrict__ x,  // [rows, row_bytes]
                                                                  int64_t row_bytes) {
  const ConvGeometry& g = args.geometry;
  const int lane = static_cast<int>(threadIdx.x) % 32, rows = static_cast<int>(g.batch), bits = args.w_bits;
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (kDotThreads / 32) + threadIdx.x / 32;
  if (channel >= g.out_channels) return;  // the whole warp
  const int32_t* __restrict__ const planes = args.planes + channel * args.words;
  const int64_t plane = g.out_channels * args.words;
  uint32_t dots[kRows]{}, activations[kRows]{}, weights = 0;
  with_digits(bits, [&]<int kDigits>() {
    for (int64_t first = lane; first < args.words; first += 32 * kDotWords) {
      uint32_t words[kDotWords][kDigits];
#pragma unroll
      for (int u = 0; u < kDotWords; ++u)
#pragma unroll
        for (int d = 0; d < kDigits; ++d) {
          const int64_t word = first + 32 * u;
          words[u][d] = d < bits && word < args.words ? static_cast<uint32_t>(planes[(bits - 1 - d) * plane + word]) : 0;
        }
#pragma unroll
      for (int u = 0; u < kDotWords; ++u) {
        const int64_t word = first + 32 * u;
        uint32_t codes[8];
        codes_of_planes<kDigits>(bits, args.w_kind == Kind::kTernary, [&](int d, int) { return words[u][d]; }, codes);
#pragma unroll
        for (const uint32_t quad : codes) weights = __dp4a(quad, 0x01010101u, weights);
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          const uint8_t* const own = x + r * row_bytes + word * kWordBits;
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            uint4 pack{};  // rows end with a whole half; beyond it the codes of the weights are zero, too
            if (word * kWordBits + 16 * half < row_bytes) pack = *reinterpret_cast<const uint4*>(own + 16 * half);
            const uint32_t quads[4] = {pack.x, pack.y, pack.z, pack.w};
#pragma unroll
            for (int q = 0; q < 4; ++q) {
              dots[r] = __dp4a(quads[q], codes[4 * half + q], dots[r]);
              activations[r] = __dp4a(quads[q], 0x01010101u, activations[r]);
            }
          }
        }
      }
    }
  });
  const OutputChannel own = load_output_channel(args.epilogue, channel);
  const OutputGrid grid = load_output_grid(args.epilogue);
  const float window = window_term(static_cast<float>(warp_sum(weights)), static_cast<float>(g.in_channels),
                                   args.epilogue.x_grid[0], own.step, own.offset);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    const auto dot = static_cast<float>(warp_sum(dots[r])), sum = static_cast<float>(warp_sum(activations[r]));
    float y[1] = {finish_sums(args.epilogue, grid, own, dot, sum, window)};
    if (lane == 0) store_output<false>(args.epilogue, grid, args.out, r * args.out_stride[0] + channel, y, 1, false);
  }
}

// The same by planes, for learned bases: each plane of the weights once, with all planes of every row; then its sums, times
// the steps of their pairs, to the totals.
template <int kRows>
__global__ void __launch_bounds__(kDotThreads) plane_product_kernel(const LowbitArgs args,
                                                                    const uint32_t* __restrict__ x,  // [bits, rows, words]
                                                                    int x_bits) {
  const ConvGeometry& g = args.geometry;
  const EpilogueArgs& e = args.epilogue;
  const int lane = static_cast<int>(threadIdx.x) % 32, rows = static_cast<int>(g.batch);
  const int64_t channel = static_cast<int64_t>(blockIdx.x) * (kDotThreads / 32) + threadIdx.x / 32;
  if (channel >= g.out_channels) return;  // the whole warp
  const float* const w_grid = weight_grid(e, channel);
  const auto x_word = [&](int digit, int row, int64_t word) {
    return x[(int64_t{plane_of_digit(args.x_kind, x_bits, digit)} * rows + row) * args.words + word];
  };
  float products[kRows]{}, activations[kRows]{}, weights = 0.0f;
  for (int j = 0; j < x_bits; ++j) {
    const float x_step = step_of_digit(args.x_kind, e.x_grid, j);
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      if (r >= rows) break;
      int64_t ones = 0;
      for (int64_t word = lane; word < args.words; word += 32) ones += __popc(x_word(j, r, word));
      activations[r] = add_digit(activations[r], x_step, static_cast<float>(warp_sum(ones)));
    }
  }
  for (int i = 0; i < args.w_bits; ++i) {
    const int64_t plane = plane_of_digit(args.w_kind, args.w_bits, i);
    const int32_t* __restrict__ const row = args.planes + (plane * g.out_channels + channel) * args.words;
    int32_t counts[kMaxBits][kRows]{}, ones = 0;
    for (int64_t word = lane; word < args.words; word += 32) {
      const auto bits = static_cast<uint32_t>(row[word]);
      ones += __popc(bits);
#pragma unroll
      for (int j = 0; j < kMaxBits; ++j) {
        if (j >= x_bits) break;
#pragma unroll
        for (int r = 0; r < kRows; ++r) {
          if (r >= rows) break;
          counts[j][r] += __popc(bits & x_word(j, r, word));
        }
      }
    }
    const float w_step = step_of_digit(args.w_kind, w_grid, i);
    weights = add_digit(weights, w_step, static_cast<float>(warp_sum(ones)));
#pragma unroll
    for (int j = 0; j < kMaxBits; ++j) {
      if (j >= x_bits) break;
      const float step = pair_step(w_step, step_of_digit(args.x_kind, e.x_grid, j));
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        if (r >= rows) break;
        products[r] = add_digit(products[r], step, static_cast<float>(warp_sum(counts[j][r])));
      }
    }
  }
  const OutputChannel own = load_output_channel(e, channel);
  const OutputGrid grid = load_output_grid(e);
  const float window = window_term(weights, static_cast<float>(g.in_channels), e.x_grid[0], own.step, own.offset);
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    if (r >= rows) break;
    float y[1] = {finish_sums(e, grid, own, products[r], activations[r], window)};
    if (lane == 0) store_output<true>(e, grid, args.out, r * args.out_stride[0] + channel, y, 1, false);
  }
}

}  // namespace qk::cuda

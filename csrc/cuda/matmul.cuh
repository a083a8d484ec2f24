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
    if (lane == 0) store_output(args.epilogue, grid, args.out, r * args.out_stride[0] + channel, y, 1, false);
  }
}

}  // namespace qk::cuda

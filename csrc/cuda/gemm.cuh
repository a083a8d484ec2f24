#pragma once
// Device code of the matrix products behind lowbit_linear and lowbit_conv2d on the tensor cores (mma.sync).
//
// A block computes a tile of output channels (the rows of the mma, "m") by output pixels (its columns, "n"). The depth runs
// over (tap, input channel) as the weight rows do, in steps of 128 bytes, through a pipeline of cp.async in shared memory:
//
//   activation   a row of 128 bytes a pixel, gathered from the channels-last codes where the tap lies (no im2col buffer).
//                16-byte chunk c of row r is stored as chunk c ^ r % 8.
//   weights      bytes: four words of each plane a channel, unpacked in registers; bits: 128 bytes of one plane.
//
// Lane (g, t) of a warp unpacks the 32 codes of word t of "its" channels g, g + 8, ...: every part of the depth that the
// four mma of a step give this lane lies within bytes 32 t to 32 t + 31 of a row, which two 16-byte loads bring for the
// activation, at no conflict. So weights never pass through shared memory as bytes, and no ldmatrix is needed.
//
// Bits: the pairs (weight plane, activation plane) follow each other as one long depth, heaviest first; between pairs of
// different weight the sums are doubled (Horner). Where a basis is learned (Sum float), the integer sums of a pair are
// multiplied by its step and added to floats when the pair is through, in the order of core/algebra.h.

#include "cuda/plan.h"
#include "cuda/ptx/cp_async.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/tile/divide.cuh"
#include "cuda/tile/epilogue.cuh"
#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"
#include "cuda/tile/shared.cuh"
#include "cuda/tile/unpack.cuh"

namespace qk::cuda {

struct BitPair {
  int8_t w_plane, x_plane;
  int8_t doublings;       // of the sums before this pair
  bool sums_activations;  // each plane of the activation is counted with one pair
};

inline constexpr int kMostPairs = kMaxBits * kMaxBits;

struct GemmArgs {
  LowbitArgs lowbit;
  const uint8_t* x;  // [x_planes or 1, input pixels, groups, tap_bytes]
  int64_t x_plane;   // bytes of a plane
  int64_t pixel_bytes;
  uint32_t tap_bytes, taps;
  Divider by_tap_bytes, by_kernel_width;
  bool aligned_planes;  // rows of planes begin at multiples of 16 bytes
  int64_t steps, steps_per_split;
  int64_t channel_tiles, pixel_tiles, splits;
  uint32_t zero;  // to the compiler, any number
  int pair_count;
  BitPair pairs[kMostPairs];
  const float* window_terms;  // [classes, out_channels]
  int32_t* partial_dots;      // [splits, pixels, out_channels]; null without splits
  int32_t* partial_sums;      // [splits, pixels, groups]
};

inline constexpr int kGemmThreads = 128;
inline constexpr int kStages = 3;
inline constexpr int kChunk = 16, kRowBytes = static_cast<int>(kStepBytes), kRowChunks = kRowBytes / kChunk;
inline constexpr int kWarpChannels = 32;

template <int kWarpsAlongChannels, int kWarpPixelsOfTile>
struct Tile {
  static constexpr int kWarpsC = kWarpsAlongChannels, kWarpsP = kGemmThreads / 32 / kWarpsC;
  static constexpr int kWarpPixels = kWarpPixelsOfTile, kChannels = kWarpsC * kWarpChannels, kPixels = kWarpsP * kWarpPixels;
  static constexpr int kColumns = kWarpPixels / 8;             // mma along the pixels of a warp
  static constexpr int kThreadsARow = kGemmThreads / kPixels;  // that sum up the codes of a row
  static constexpr int kPart = kPixels < 64 ? kPixels : 64;    // pixels that are finished together
  static constexpr int kParts = kPixels / kPart;
  static constexpr int kPartColumns = kColumns / kParts;
  // Pitches, in words, of the staged sums [pixel][channel] and [channel][pixel]: writes without conflicts.
  static constexpr int kChannelPitch = kChannels + 4, kPixelPitch = kPart + 8;
  static constexpr int kStagedBytes =
      4 * (kPart * kChannelPitch > kChannels * kPixelPitch ? kPart * kChannelPitch : kChannels * kPixelPitch);
  static constexpr int kXBytes = kPixels * kRowBytes;
  static_assert(kPart / kWarpsP % 8 == 0 && kRowChunks % kThreadsARow == 0);
};

// Where an output pixel's window begins. Rows and columns wrap at 2^32 on purpose: inside the padded image no two of them
// that matter are alike.
struct alignas(16) WindowStart {
  int64_t at;  // byte of the first tap, perhaps outside the image
  uint32_t y, x;
};

// A place in the depth of a row.
struct Depth {
  int64_t at;     // bytes from the first tap
  uint32_t y, x;  // rows and columns from it
  bool inside;

  __device__ __forceinline__ Depth(const GemmArgs& p, uint32_t k) {
    const ConvGeometry& g = p.lowbit.geometry;
    const uint32_t tap = p.by_tap_bytes(k), row = p.by_kernel_width(tap);
    y = row * static_cast<uint32_t>(g.dilation_height);
    x = (tap - row * static_cast<uint32_t>(g.kernel_width)) * static_cast<uint32_t>(g.dilation_width);
    at = (static_cast<int64_t>(y) * g.in_width + x) * p.pixel_bytes + (k - tap * p.tap_bytes);
    inside = tap < p.taps;
  }
};

__device__ __forceinline__ bool is_inside(const ConvGeometry& g, const WindowStart& start, const Depth& depth) {
  // No short cuts: a branch would cost more than a comparison.
  return depth.inside & (start.y + depth.y < static_cast<uint32_t>(g.in_height)) &
         (start.x + depth.x < static_cast<uint32_t>(g.in_width));
}

__device__ __forceinline__ int swizzled(int row, int chunk) { return row * kRowBytes + (chunk ^ (row & 7)) * kChunk; }

template <class Tile_, bool kBitProduct, int kCopy, class Sum>
class Gemm {
 public:
  using Tile = Tile_;
  static constexpr bool kSteps = std::is_same_v<Sum, float>;  // pairs have steps of their own
  static_assert(kBitProduct || !kSteps);

  static QK_HOST_DEVICE int stage_bytes(int w_bits) {
    return Tile::kXBytes + (kBitProduct ? Tile::kChannels * kRowBytes : w_bits * Tile::kChannels * kChunk);
  }
  static QK_HOST_DEVICE int shared_bytes(int w_bits) {
    const int pipeline = kStages * stage_bytes(w_bits);
    return kInfoBytes + (pipeline > Tile::kStagedBytes ? pipeline : Tile::kStagedBytes);
  }

  __device__ Gemm(const GemmArgs& args, char* shared)
      : p_(args),
        g_(args.lowbit.geometry),
        thread_(static_cast<int>(threadIdx.x)),
        lane_(thread_ % 32),
        warp_channel_(thread_ / 32 / Tile::kWarpsP * kWarpChannels),
        warp_pixel_(thread_ / 32 % Tile::kWarpsP * Tile::kWarpPixels),
        starts_(reinterpret_cast<WindowStart*>(shared)),
        pixels_(reinterpret_cast<OutputPixel*>(shared + sizeof(WindowStart) * Tile::kPixels)),
        stages_(shared + kInfoBytes) {
    // Blocks that follow each other share the activation, within a band of channels whose weights stay in the cache.
    constexpr int64_t kBand = 16;
    const int64_t tiles = p_.channel_tiles * p_.pixel_tiles, tile = blockIdx.x % tiles;
    group_ = blockIdx.x / tiles;
    const int64_t band = tile / (kBand * p_.pixel_tiles), width = min(kBand, p_.channel_tiles - band * kBand);
    const int64_t within = tile - band * kBand * p_.pixel_tiles;
    const int64_t group_channels = g_.out_channels / g_.groups;
    const int64_t channel = (band * kBand + within % width) * Tile::kChannels;
    first_pixel_ = within / width * Tile::kPixels;
    first_channel_ = group_ * group_channels + channel;
    channel_count_ = static_cast<int>(min(int64_t{Tile::kChannels}, group_channels - channel));
    const int64_t pixels = g_.batch * g_.out_height * g_.out_width;
    pixel_count_ = static_cast<int>(min(int64_t{Tile::kPixels}, pixels - first_pixel_));
    first_step_ = blockIdx.y * p_.steps_per_split;
    step_count_ = static_cast<int>(min(p_.steps_per_split, p_.steps - first_step_));
  }

  __device__ __forceinline__ void run() {
    find_windows();
    multiply();
    put_sums();
    __syncthreads();
#pragma unroll
    for (int part = 0; part < Tile::kParts; ++part) {
      stage_part(part);
      __syncthreads();
      const Staged staged{*this, part};
      const int pixels = min(Tile::kPart, staged.count());
      if (!kSteps && p_.splits > 1) {
        put_partials(staged, pixels);
      } else {
        finish_part<kSteps, Tile::kPart, Tile::kChannels, kGemmThreads>(p_.lowbit, p_.window_terms, staged, pixels,
                                                                        first_channel_, channel_count_);
      }
      __syncthreads();
    }
  }

 private:
  static constexpr int kInfoBytes = static_cast<int>(sizeof(WindowStart) + sizeof(OutputPixel)) * Tile::kPixels;

  // Rows beyond the last pixel repeat it; nobody looks at what they give.
  __device__ __forceinline__ void find_windows() {
    for (int r = thread_; r < Tile::kPixels; r += kGemmThreads) {
      const PixelIndex i(g_, first_pixel_ + min(r, pixel_count_ - 1));
      const int64_t y = i.y * g_.stride_height - g_.pad_top, x = i.x * g_.stride_width - g_.pad_left;
      starts_[r] = {((i.image * g_.in_height + y) * g_.in_width + x) * p_.pixel_bytes + group_ * p_.tap_bytes,
                    static_cast<uint32_t>(y), static_cast<uint32_t>(x)};
    }
    __syncthreads();
  }

  __device__ __forceinline__ void multiply() {
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          sums_[i][j][e] = 0;
          if constexpr (kSteps) totals_[i][j][e] = 0.0f;
        }
    const int count = step_count_ * p_.pair_count;
    Cursor loading{0, 0}, computing{0, 0};
#pragma unroll 1
    for (int i = 0; i < kStages - 1; ++i) {
      if (i < count) load(i, loading);
      ptx::cp_async_commit();
    }
    int stage = 0, free_stage = kStages - 1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      ptx::cp_async_wait<kStages - 2>();
      __syncthreads();  // everyone's copies are here, and everyone has left the stage that is filled next
      if (i + kStages - 1 < count) load(free_stage, loading);
      ptx::cp_async_commit();
      compute(stage_at(stage), computing);
      free_stage = stage;
      stage = stage == kStages - 1 ? 0 : stage + 1;
    }
    ptx::cp_async_wait<0>();
    __syncthreads();
  }

  // Step and pair, in the order of the pipeline.
  struct Cursor {
    int step, pair;
    __device__ __forceinline__ void next(int steps) {
      if (++step == steps) step = 0, ++pair;
    }
  };

  __device__ __forceinline__ char* stage_at(int stage) const { return stages_ + stage * stage_bytes(p_.lowbit.w_bits); }

  // ---- loading ----

  __device__ __forceinline__ void load(int stage, Cursor& cursor) const {
    char* const to = stage_at(stage);
    const auto step = static_cast<uint32_t>(first_step_ + cursor.step);
    load_activation(to, step, p_.x + (kBitProduct ? p_.pairs[cursor.pair].x_plane * p_.x_plane : 0));
    if constexpr (kBitProduct) {
      load_plane(to + Tile::kXBytes, step, p_.pairs[cursor.pair].w_plane);
    } else {
      load_planes(to + Tile::kXBytes, step);
    }
    cursor.next(step_count_);
  }

  __device__ __forceinline__ void load_activation(char* to, uint32_t step, const uint8_t* x) const {
    if constexpr (kCopy == kChunk) {
      const int chunk = thread_ % kRowChunks;
      const Depth depth(p_, step * kRowBytes + chunk * kChunk);
#pragma unroll
      for (int i = 0; i < Tile::kPixels * kRowChunks / kGemmThreads; ++i) {
        const int row = thread_ / kRowChunks + i * (kGemmThreads / kRowChunks);
        const auto start = ptx::load_shared<WindowStart>(starts_ + row);
        const bool inside = is_inside(g_, start, depth);
        ptx::cp_async_or_zero<kChunk>(to + swizzled(row, chunk), x + (inside ? start.at + depth.at : 0), inside);
      }
    } else if constexpr (kCopy == 4) {
      const Depth depth(p_, step * kRowBytes + lane_ * 4);
#pragma unroll 4
      for (int row = thread_ / 32; row < Tile::kPixels; row += kGemmThreads / 32) {
        const auto start = ptx::load_shared<WindowStart>(starts_ + row);
        const bool inside = is_inside(g_, start, depth);
        ptx::cp_async_or_zero<4>(to + word_at(row), x + (inside ? start.at + depth.at : 0), inside);
      }
    } else {
      const uint32_t k = step * kRowBytes + lane_ * 4;
      const Depth depth[4] = {Depth(p_, k), Depth(p_, k + 1), Depth(p_, k + 2), Depth(p_, k + 3)};
#pragma unroll 4
      for (int row = thread_ / 32; row < Tile::kPixels; row += kGemmThreads / 32) {
        const auto start = ptx::load_shared<WindowStart>(starts_ + row);
        uint32_t word = 0;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          if (is_inside(g_, start, depth[e])) word |= uint32_t{x[start.at + depth[e].at]} << 8 * e;
        ptx::store_shared(to + word_at(row), word);
      }
    }
  }

  // This lane's word of a row.
  __device__ __forceinline__ int word_at(int row) const { return swizzled(row, lane_ / 4) + lane_ % 4 * 4; }

  __device__ __forceinline__ const int32_t* plane_row(int plane, int row) const {
    const int64_t channel = first_channel_ + min(row, channel_count_ - 1);
    return p_.lowbit.planes + (plane * g_.out_channels + channel) * p_.lowbit.words;
  }

  // Four words of every plane: [plane][channel][4]. Beyond a row's end zeros: the activation may hold anything there.
  __device__ __forceinline__ void load_planes(char* to, uint32_t step) const {
    constexpr int kWords = kChunk / 4;
    const int64_t words = p_.lowbit.words, first = int64_t{step} * kWords;
    if (p_.aligned_planes) {
      constexpr int kAtOnce = kGemmThreads / Tile::kChannels;  // planes
      const int row = thread_ % Tile::kChannels;
      const bool inside = first < words;
      const int32_t* from = plane_row(thread_ / Tile::kChannels, row) + (inside ? first : 0);
      for (int plane = thread_ / Tile::kChannels; plane < p_.lowbit.w_bits; plane += kAtOnce) {
        ptx::cp_async_or_zero<kChunk>(to + (plane * Tile::kChannels + row) * kChunk, from, inside);
        from += kAtOnce * g_.out_channels * words;
      }
    } else {
      const int64_t word = first + thread_ % kWords;
      for (int i = thread_; i < p_.lowbit.w_bits * Tile::kChannels * kWords; i += kGemmThreads)
        ptx::cp_async_or_zero<4>(
            to + i * 4, plane_row(i / (Tile::kChannels * kWords), i / kWords % Tile::kChannels) + (word < words ? word : 0),
            word < words);
    }
  }

  // 32 words of one plane, a row a channel.
  __device__ __forceinline__ void load_plane(char* to, uint32_t step, int plane) const {
    const int64_t words = p_.lowbit.words;
    if (p_.aligned_planes) {
      const int chunk = thread_ % kRowChunks;
      const int64_t word = int64_t{step} * (kRowBytes / 4) + chunk * (kChunk / 4);
#pragma unroll 1
      for (int row = thread_ / kRowChunks; row < Tile::kChannels; row += kGemmThreads / kRowChunks)
        ptx::cp_async_or_zero<kChunk>(to + swizzled(row, chunk), plane_row(plane, row) + (word < words ? word : 0),
                                      word < words);
    } else {
      const int64_t word = int64_t{step} * (kRowBytes / 4) + lane_;
#pragma unroll 1
      for (int row = thread_ / 32; row < Tile::kChannels; row += kGemmThreads / 32)
        ptx::cp_async_or_zero<4>(to + word_at(row), plane_row(plane, row) + (word < words ? word : 0), word < words);
    }
  }

  // ---- computing ----

  // 32 bytes of a row that is `row` more than a multiple of 8 behind the lane's own: chunks 2t and 2t + 1.
  struct Fragment {
    uint4 low, high;
    __device__ __forceinline__ void load(const char* rows, int row, int lane) {
      const char* const own = rows + (row + lane / 4) * kRowBytes;
      low = ptx::load_shared<uint4>(own + ((lane % 4 * 2) ^ (lane / 4)) * kChunk);
      high = ptx::load_shared<uint4>(own + ((lane % 4 * 2 + 1) ^ (lane / 4)) * kChunk);
    }
    __device__ __forceinline__ void words(uint32_t (&w)[8]) const {
      w[0] = low.x, w[1] = low.y, w[2] = low.z, w[3] = low.w;
      w[4] = high.x, w[5] = high.y, w[6] = high.z, w[7] = high.w;
    }
  };

  __device__ __forceinline__ void compute(const char* stage, Cursor& cursor) {
    if (kBitProduct && !kSteps && cursor.step == 0) double_sums(p_.pairs[cursor.pair].doublings);
    uint32_t weights[4][8];  // channels g, g + 8, g + 16, g + 24
    if constexpr (kBitProduct) {
      fetch_weights(stage + Tile::kXBytes, weights);
    } else {
      unpack_weights(stage + Tile::kXBytes, weights);
    }
    Fragment fragment;
    fragment.load(stage, warp_pixel_, lane_);
#pragma unroll
    for (int j = 0; j < Tile::kColumns; ++j) {
      uint32_t x[8];
      fragment.words(x);
      if (j + 1 < Tile::kColumns) fragment.load(stage, warp_pixel_ + 8 * (j + 1), lane_);
#pragma unroll
      for (int m = 0; m < 4; ++m) {
        const uint32_t b[2] = {x[2 * m], x[2 * m + 1]};
#pragma unroll
        for (int i = 0; i < 2; ++i) {
          const uint32_t a[4] = {weights[2 * i][2 * m], weights[2 * i + 1][2 * m], weights[2 * i][2 * m + 1],
                                 weights[2 * i + 1][2 * m + 1]};
          if constexpr (kBitProduct) {
            ptx::mma_b1(sums_[i][j], a, b);
          } else {
            ptx::mma_u8(sums_[i][j], a, b);
          }
        }
      }
    }
    sum_activations(stage, cursor.pair);
    if constexpr (kSteps)
      if (cursor.step == step_count_ - 1) add_pair(p_.pairs[cursor.pair]);
    cursor.next(step_count_);
  }

  // The sums of a pair that is through, times its step, to the totals.
  __device__ __forceinline__ void add_pair(const BitPair& pair) {
    const LowbitArgs& lowbit = p_.lowbit;
    const int x_bits = bits_of(lowbit.x_kind, lowbit.x_levels);
    const int w_digit = digit_of_plane(lowbit.w_kind, lowbit.w_bits, pair.w_plane);
    const int x_digit = digit_of_plane(lowbit.x_kind, x_bits, pair.x_plane);
    const float x_step = step_of_digit(lowbit.x_kind, lowbit.epilogue.x_grid, x_digit);
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int channel = warp_channel_ + lane_ / 4 + 16 * i + 8 * half;
        const float* const grid = weight_grid(lowbit.epilogue, first_channel_ + min(channel, channel_count_ - 1));
        const float step = pair_step(step_of_digit(lowbit.w_kind, grid, w_digit), x_step);
#pragma unroll
        for (int j = 0; j < Tile::kColumns; ++j)
#pragma unroll
          for (int e = 2 * half; e < 2 * half + 2; ++e) {
            totals_[i][j][e] = add_digit(totals_[i][j][e], step, static_cast<float>(sums_[i][j][e]));
            sums_[i][j][e] = 0;
          }
      }
    if (!pair.sums_activations) return;
    activation_total_ = add_digit(activation_total_, x_step, static_cast<float>(row_sum(activations_)));
    activations_ = 0;
  }

  __device__ __forceinline__ void double_sums(int doublings) {
    if (doublings == 0) return;
    activations_ <<= doublings;
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int j = 0; j < Tile::kColumns; ++j)
#pragma unroll
        for (int e = 0; e < 4; ++e) sums_[i][j][e] <<= doublings;
  }

  __device__ __forceinline__ void unpack_weights(const char* planes, uint32_t (&weights)[4][8]) const {
    const int bits = p_.lowbit.w_bits;
    const char* const own = planes + (warp_channel_ + lane_ / 4) * kChunk + lane_ % 4 * 4;
    with_digits(bits, [&]<int kDigits>() {
#pragma unroll
      for (int i = 0; i < 4; ++i)
        codes_of_planes<kDigits>(
            bits, p_.lowbit.w_kind == Kind::kTernary,
            [&](int, int plane) { return ptx::load_shared<uint32_t>(own + (plane * Tile::kChannels + 8 * i) * kChunk); },
            weights[i]);
    });
  }

  __device__ __forceinline__ void fetch_weights(const char* rows, uint32_t (&weights)[4][8]) const {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      Fragment fragment;
      fragment.load(rows, warp_channel_ + 8 * i, lane_);
      fragment.words(weights[i]);
      // An mma takes words of two rows in neighbouring registers, a load fills such with one row's. Words that the compiler
      // cannot know to be copies are moved once; copies it would make anew for every mma.
#pragma unroll
      for (uint32_t& word : weights[i]) word ^= p_.zero;
    }
  }

  // A row's codes, or ones, by kThreadsARow neighbouring threads.
  __device__ __forceinline__ void sum_activations(const char* rows, int pair) {
    if (kBitProduct && !p_.pairs[pair].sums_activations) return;
    constexpr int kChunks = kRowChunks / Tile::kThreadsARow;
    const int row = thread_ / Tile::kThreadsARow, first = thread_ % Tile::kThreadsARow * kChunks;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const auto x = ptx::load_shared<uint4>(rows + swizzled(row, first + i));
      const uint32_t words[4] = {x.x, x.y, x.z, x.w};
#pragma unroll
      for (const uint32_t word : words)
        activations_ = kBitProduct ? activations_ + __popc(word) : __dp4a(word, 0x01010101u, activations_);
    }
  }

  // ---- finishing ----

  // Over the threads that share a row.
  __device__ __forceinline__ int32_t row_sum(uint32_t sum) const {
#pragma unroll
    for (int offset = Tile::kThreadsARow / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    return static_cast<int32_t>(sum);
  }

  __device__ __forceinline__ void put_sums() {
    const int32_t sum = kSteps ? 0 : row_sum(activations_);
    const int row = thread_ / Tile::kThreadsARow;
    if (thread_ % Tile::kThreadsARow != 0 || row >= pixel_count_) return;
    const int64_t pixel = first_pixel_ + row;
    if (p_.splits > 1) {
      p_.partial_sums[(blockIdx.y * pixels() + pixel) * g_.groups + group_] = sum;
    } else {
      pixels_[row] = output_pixel(p_.lowbit, pixel, kSteps ? activation_total_ : static_cast<float>(sum));
    }
  }

  __device__ __forceinline__ int64_t pixels() const { return g_.batch * g_.out_height * g_.out_width; }

  // [pixel][channel] if the output has neighbouring channels, else [channel][pixel].
  __device__ __forceinline__ bool by_channels() const { return p_.splits > 1 || p_.lowbit.out_stride[1] == 1; }

  __device__ __forceinline__ void stage_part(int part) const {
    const int channel = warp_channel_ + lane_ / 4;
    const int pixel = thread_ / 32 % Tile::kWarpsP * (Tile::kPart / Tile::kWarpsP) + lane_ % 4 * 2;
    const bool channels_last = by_channels();
#pragma unroll
    for (int i = 0; i < 2; ++i)
#pragma unroll
      for (int jj = 0; jj < Tile::kPartColumns; ++jj)
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const Sum* const own = results()[i][part * Tile::kPartColumns + jj] + 2 * half;
          const int c = channel + 16 * i + 8 * half, p = pixel + 8 * jj;
          if (channels_last) {
            ptx::store_shared<Sum>(stages_ + 4 * (p * Tile::kChannelPitch + c), own[0]);
            ptx::store_shared<Sum>(stages_ + 4 * ((p + 1) * Tile::kChannelPitch + c), own[1]);
          } else {
            ptx::store_shared<Pack<Sum, 2>>(stages_ + 4 * (c * Tile::kPixelPitch + p), {{own[0], own[1]}});
          }
        }
  }

  struct Staged {
    const Gemm& gemm;
    int part;

    // A part holds neighbouring pixels of each warp.
    __device__ __forceinline__ int in_tile(int p) const {
      constexpr int kRun = Tile::kPart / Tile::kWarpsP;
      return p / kRun * Tile::kWarpPixels + part * kRun + p % kRun;
    }
    __device__ __forceinline__ int count() const {
      int count = 0;
      constexpr int kRun = Tile::kPart / Tile::kWarpsP;
#pragma unroll
      for (int w = 0; w < Tile::kWarpsP; ++w)
        count += min(max(gemm.pixel_count_ - w * Tile::kWarpPixels - part * kRun, 0), kRun);
      return count;
    }
    __device__ __forceinline__ OutputPixel pixel(int p) const { return gemm.pixels_[in_tile(p)]; }
    __device__ __forceinline__ Pack<Sum, 4> sums(int p, int c) const {
      const int at = gemm.by_channels() ? p * Tile::kChannelPitch + c : c * Tile::kPixelPitch + p;
      return ptx::load_shared<Pack<Sum, 4>>(gemm.stages_ + 4 * at);
    }
    __device__ __forceinline__ void dots(int p, int c, int, float* d) const {
      const Pack<Sum, 4> s = sums(p, c);
#pragma unroll
      for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(s.v[i]);
    }
  };

  __device__ __forceinline__ void put_partials(const Staged& staged, int pixels_here) const {
    constexpr int kPacks = Tile::kChannels / 4;
    for (int i = thread_; i < pixels_here * kPacks; i += kGemmThreads) {
      const int p = i / kPacks, c = i % kPacks * 4;
      const int64_t pixel = first_pixel_ + staged.in_tile(p);
      int32_t* const to = p_.partial_dots + (blockIdx.y * pixels() + pixel) * g_.out_channels + first_channel_ + c;
      const Pack<Sum, 4> s = staged.sums(p, c);
#pragma unroll
      for (int e = 0; e < 4; ++e)
        if (c + e < channel_count_) to[e] = static_cast<int32_t>(s.v[e]);
    }
  }

  const GemmArgs& p_;
  const ConvGeometry& g_;
  int thread_, lane_, warp_channel_, warp_pixel_;
  WindowStart* starts_;  // [kPixels]
  OutputPixel* pixels_;  // [kPixels]
  char* stages_;         // [kStages][activation, weights]; later the staged sums
  int64_t group_, first_pixel_, first_channel_, first_step_;
  int channel_count_, pixel_count_, step_count_;
  __device__ __forceinline__ const Sum (&results() const)[2][Tile::kColumns][4] {
    if constexpr (kSteps) {
      return totals_;
    } else {
      return sums_;
    }
  }

  int32_t sums_[2][Tile::kColumns][4];
  float totals_[2][kSteps ? Tile::kColumns : 1][4];  // with the steps of their pairs
  uint32_t activations_ = 0;
  float activation_total_ = 0.0f;
};

template <class Tile, bool kBitProduct, int kCopy, class Sum>
__global__ void __launch_bounds__(kGemmThreads, 2) gemm_kernel(const __grid_constant__ GemmArgs args) {
  Gemm<Tile, kBitProduct, kCopy, Sum>(args, dynamic_shared<char>()).run();
}

// The sums of all splits, in 64 bits.
struct Partials {
  const GemmArgs& p;
  int64_t first_pixel, first_channel, pixels;
  const OutputPixel* own;  // [kPixels], shared

  __device__ __forceinline__ OutputPixel pixel(int i) const { return own[i]; }
  __device__ __forceinline__ void dots(int pixel, int channel, int count, float* d) const {
    const int64_t channels = p.lowbit.geometry.out_channels, step = p.lowbit.out_stride[1] == 1 ? 1 : channels;
    const int32_t* from = p.partial_dots + (first_pixel + pixel) * channels + first_channel + channel;
    int64_t sums[4]{};
    for (int64_t s = 0; s < p.splits; ++s, from += pixels * channels)
#pragma unroll
      for (int i = 0; i < 4; ++i)
        if (i < count) sums[i] += from[i * step];
#pragma unroll
    for (int i = 0; i < 4; ++i) d[i] = static_cast<float>(sums[i]);
  }
};

inline constexpr int kFinishPixels = 16, kFinishChannels = 64;

__global__ void __launch_bounds__(kGemmThreads) finish_kernel(const __grid_constant__ GemmArgs p) {
  __shared__ OutputPixel own[kFinishPixels];
  const ConvGeometry& g = p.lowbit.geometry;
  const int64_t group_channels = g.out_channels / g.groups, tiles = divide_up(group_channels, int64_t{kFinishChannels});
  const int64_t tile = blockIdx.x % (tiles * g.groups), group = tile / tiles, channel = tile % tiles * kFinishChannels;
  const int64_t pixels = g.batch * g.out_height * g.out_width, first = blockIdx.x / (tiles * g.groups) * kFinishPixels;
  const int64_t first_channel = group * group_channels + channel;
  const int count = static_cast<int>(min(int64_t{kFinishPixels}, pixels - first));
  if (static_cast<int>(threadIdx.x) < count) {
    const int64_t pixel = first + threadIdx.x;
    int64_t sum = 0;
    for (int64_t s = 0; s < p.splits; ++s) sum += p.partial_sums[(s * pixels + pixel) * g.groups + group];
    own[threadIdx.x] = output_pixel(p.lowbit, pixel, static_cast<float>(sum));
  }
  __syncthreads();
  const int channels = static_cast<int>(min(int64_t{kFinishChannels}, group_channels - channel));
  finish_part<false, kFinishPixels, kFinishChannels, kGemmThreads>(
      p.lowbit, p.window_terms, Partials{p, first, first_channel, pixels, own}, count, first_channel, channels);
}

}  // namespace qk::cuda

#pragma once
// Few rows of activation codes times a weight. To arrange the weight in panels, as for many rows, would take longer than the
// product: here each of its rows is read once, as planes, and its codes get no further than the first-level cache.

#include <algorithm>
#include <utility>

#include "cpu/lowbit.h"
#include "cpu/parallel.h"
#include "cpu/popcount.h"
#include "cpu/transpose.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

inline constexpr int64_t kStepCodes = 64;  // of a register
inline constexpr int64_t kBlockCodes = 8 * kStepCodes;
// Of a weight row, in scratch memory: with as much of the activations it fits the first-level cache, of which rows a power
// of two apart would share a few lines.
inline constexpr int64_t kPart = 4 * kBlockCodes, kPartStride = kPart + kStepCodes;
inline constexpr int kWeightRows = 4;  // in a tile with kTileRows activations

// Rows of planes to codes, a block at a time.
template <int kBits>
class RowUnpacker {
 public:
  static constexpr int kZero = kBits == 8 ? 128 : 0;  // codes above 127 do not fit signed bytes

  explicit RowUnpacker(const LowbitArgs& args)
      : planes_(args.planes),
        words_(args.words),
        plane_stride_(args.geometry.out_channels * args.words),
        kind_(args.w_kind) {}

  const int32_t* plane(int64_t row, int digit) const {
    return planes_ + plane_of_digit(kind_, kBits, digit) * plane_stride_ + row * words_;
  }

  // Of a row's codes.
  int64_t sum(int64_t row) const {
    return unpack(row, 0, words_, [](int64_t, int, __m512i) {});
  }

  // The eight bytes i of a block that was unpacked are codes 8 w to 8 w + 7 of the row's: w.
  static constexpr int source(int i) {
    const int step = i / 8, lane = i % 8 / 2, half = i % 2;
    return 16 * lane + 2 * kGroups * (step / kGroups) + kGroups * half + step % kGroups;
  }

  // Codes that were unpacked `scaled` are 2^scale(step) times as large in this step of a block: those that share a byte need
  // no shift then, but the highest, which would have a sign.
  static constexpr int kGroups = kBits <= 2 ? 8 / kBits : kBits <= 4 ? 2 : 1;  // codes that a byte is made for below
  static constexpr int scale(int step) { return step % kGroups == 0 ? 0 : place(step); }

  // Calls f(k, step, codes less kZero) for the steps of the blocks of these words of a row, of which k counts the codes;
  // each block in the order that source() tells, past the row's end codes 0. Returns the sum of the codes.
  template <bool kScaled = false, class F>
  QK_INLINED int64_t unpack(int64_t row, int64_t first_word, int64_t last_word, const F& f) const {
    __m512i ones[kBits] = {};
    for (int64_t word = first_word, k = 0; word < last_word; word += kLanes) {
      const __mmask16 there = first_lanes(static_cast<int>(std::min<int64_t>(kLanes, last_word - word)));
      __m512i digits[kMaxBits] = {}, steps[8];
#pragma GCC unroll 8
      for (int digit = 0; digit < kBits; ++digit) {
        digits[digit] = _mm512_maskz_loadu_epi32(there, plane(row, digit) + word);
        ones[digit] = _mm512_add_epi64(ones[digit], _mm512_popcnt_epi64(digits[digit]));
      }
      // The digits 00, 01, 11 of ternary codes become binary ones.
      if (kBits == 2 && kind_ == Kind::kTernary) digits[0] = _mm512_xor_si512(digits[0], digits[1]);
      codes_of<kScaled>(digits, steps);
#pragma GCC unroll 8
      for (int step = 0; step < 8; ++step, k += kStepCodes) f(k, step, steps[step]);
    }
    int64_t sum = 0;
#pragma GCC unroll 8
    for (int digit = 0; digit < kBits; ++digit)
      sum += _mm512_reduce_add_epi64(ones[digit]) * plane_weight(kind_, kBits, plane_of_digit(kind_, kBits, digit));
    return sum;
  }

 private:
  static constexpr int kWidth = 8 / kGroups;  // bits that a code takes there
  // Where in its byte a code of this step lies, the first one highest.
  static constexpr int place(int step) { return 8 - kWidth * (step % kGroups + 1); }

  // An affine map over GF(2) of the unit matrix transposes bits: eight bytes, which are digits kWidth - 1 to 0 of kGroups
  // times eight codes, become eight bytes of kGroups codes each. Its constant inverts the highest bit, which takes 128 from
  // an unsigned byte to make a signed one.
  template <bool kScaled>
  QK_INLINED static void codes_of(const __m512i (&digits)[kMaxBits], __m512i (&steps)[8]) {
    const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
    __m512i bytes[kWidth];
    interleave(digits, bytes);
#pragma GCC unroll 8
    for (int step = 0; step < 8; ++step) {
      const __m512i codes = _mm512_gf2p8affine_epi64_epi8(unit, bytes[step / kGroups], kZero);
      const int left = kScaled ? scale(step) : 0;
      const __m512i shifted = _mm512_srli_epi16(codes, place(step) - left);
      steps[step] = kWidth == 8 ? codes : _mm512_and_si512(shifted, _mm512_set1_epi8(((1 << kWidth) - 1) << left));
    }
  }

  // The digits of eight codes after one another, within parts of 128 bits.
  QK_INLINED static void interleave(const __m512i (&digits)[kMaxBits], __m512i (&bytes)[kWidth]) {
    if constexpr (kWidth == 1) {
      bytes[0] = digits[0];
    } else if constexpr (kWidth == 2) {
      bytes[0] = _mm512_unpacklo_epi8(digits[1], digits[0]);
      bytes[1] = _mm512_unpackhi_epi8(digits[1], digits[0]);
    } else if constexpr (kWidth == 4) {
      interleave_four(digits, bytes);
    } else {
      interleave_eight(digits, bytes);
    }
  }

  const int32_t* planes_;
  int64_t words_, plane_stride_;
  Kind kind_;
};

// The sums over the lanes of four vectors of integers.
inline __m128i four_sums(__m512i a, __m512i b, __m512i c, __m512i d) {
  const __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  const __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  const __m512i all = _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  const __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all), _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

// sums[r][w], lane by lane, of n codes of kRows activations, these `stride` apart, and of kWeightRows rows in scratch
// memory. Never inlined: beside other code the compiler does not keep the sums in registers.
template <int kRows>
[[gnu::noinline]] void dot_rows(const uint8_t* activations, int64_t stride, const int8_t* codes, int64_t n,
                                __m512i (*to)[kWeightRows]) {
  __m512i sums[kRows][kWeightRows];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWeightRows; ++w) sums[r][w] = _mm512_setzero_si512();
  for (int64_t k = 0; k < n; k += kStepCodes) {
    __m512i weights[kWeightRows];
#pragma GCC unroll 4
    for (int w = 0; w < kWeightRows; ++w) weights[w] = _mm512_load_si512(codes + w * kPartStride + k);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const __m512i activation = _mm512_load_si512(activations + r * stride + k);
#pragma GCC unroll 4
      for (int w = 0; w < kWeightRows; ++w) sums[r][w] = _mm512_dpbusd_epi32(sums[r][w], activation, weights[w]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 4
    for (int w = 0; w < kWeightRows; ++w) _mm512_store_si512(to[r] + w, sums[r][w]);
}

// sums[r][w], lane by lane, of the ones that kM activations, their planes `stride` words apart, share with kWeightRows rows,
// each pair of digits with its weight, 2^(w_shift * i + x_shift * j). weights: planes of `words` words, which need not fill
// a vector; those of activations do.
template <int kM, int kW, int kX>
[[gnu::noinline]] void count_rows(const int32_t* const (&weights)[kWeightRows][kW], int64_t words,
                                  const uint32_t* const (&x)[kM], int64_t stride, int w_shift, int x_shift,
                                  __m512i (*to)[kWeightRows]) {
  __m512i ones[kM][kWeightRows][kW][kX] = {};
  for (int64_t word = 0; word < words; word += kLanes) {
    const __mmask16 there = first_lanes(static_cast<int>(std::min<int64_t>(kLanes, words - word)));
    __m512i digits[kM][kX];
#pragma GCC unroll 4
    for (int r = 0; r < kM; ++r)
#pragma GCC unroll 4
      for (int j = 0; j < kX; ++j) digits[r][j] = _mm512_load_si512(x[r] + j * stride + word);
#pragma GCC unroll 4
    for (int row = 0; row < kWeightRows; ++row)
#pragma GCC unroll 2
      for (int i = 0; i < kW; ++i) {
        const __m512i weight = _mm512_maskz_loadu_epi32(there, weights[row][i] + word);
#pragma GCC unroll 4
        for (int r = 0; r < kM; ++r)
#pragma GCC unroll 4
          for (int j = 0; j < kX; ++j) {
            const __m512i shared = _mm512_and_si512(weight, digits[r][j]);
            ones[r][row][i][j] = _mm512_add_epi32(ones[r][row][i][j], _mm512_popcnt_epi32(shared));
          }
      }
  }
#pragma GCC unroll 4
  for (int r = 0; r < kM; ++r)
#pragma GCC unroll 4
    for (int row = 0; row < kWeightRows; ++row) {
      __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 2
      for (int i = 0; i < kW; ++i)
#pragma GCC unroll 4
        for (int j = 0; j < kX; ++j)
          sum = _mm512_add_epi32(sum, _mm512_sll_epi32(ones[r][row][i][j], _mm_cvtsi32_si128(w_shift * i + x_shift * j)));
      _mm512_store_si512(to[r] + row, sum);
    }
}

// The whole product: integer sums of all rows first, then the epilogue.
class FewRows {
 public:
  // Whether a product is one of these.
  static bool suits(const LowbitArgs& args, const Plan& plan, int64_t pixels) {
    return plan.path == Path::kRows && plan.groups == 1 && plan.depth > 0 && !plan.wide && !plan.by_planes() &&
           pixels <= most_rows(args, plan, pixels);
  }

  // rows [count]: plan.depth codes each.
  FewRows(const LowbitArgs& args, const Plan& plan, const uint8_t* const* rows, int64_t count)
      : args_(args),
        rows_(rows),
        count_(count),
        codes_(plan.depth),
        depth_(round_up(plan.depth, kBlockCodes)),
        stride_(depth_ + kStepCodes),
        slots_(plan.slots()),
        sums_(count),
        dots_(round_up(count, kAtOnce) * slots_) {
    for (int64_t i = 0; i < count; ++i) sums_[i] = static_cast<int32_t>(sum_codes(rows[i], codes_));
    weights_.zero = 0;
    weights_.tap_sums = Buffer<int64_t>(slots_);
    weights_.tap_sums.clear();
  }

  void run(const Plan& plan, const Window& window) {
    counts(args_, count_) ? count() : multiply();
    Epilogue epilogue(args_, plan, window);
    finish(plan, epilogue);
  }

 private:
  static constexpr int64_t kMost = 48, kMostBesideTables = 24, kMostCounted = 512;
  static constexpr int kAtOnce = 4;

  // Whether ones that planes share are counted. A pair of planes costs a sixth of a product of codes, which for a few rows
  // have to be unpacked for it first.
  static bool counts(const LowbitArgs& args, int64_t count) {
    return args.w_bits <= 2 && pairs(args) <= (count <= 2 ? 4 : 2);
  }
  static int pairs(const LowbitArgs& args) { return args.w_bits * bits_of(args.x_kind, args.x_levels); }
  // Up to how many rows nothing is faster. One pair is counted faster than its sums are looked up (cpu/tables.h).
  static int64_t most_rows(const LowbitArgs& args, const Plan& plan, int64_t count) {
    if (args.prepacked ? pairs(args) <= 2 : counts(args, count))
      return plan.by_tables() && pairs(args) > 1 ? kMostBesideTables : kMostCounted;
    if (args.prepacked) return 0;
    return plan.by_tables() ? kMostBesideTables : kMost;
  }

  // f(first, last) for kWeightRows weight rows, in parallel.
  template <class F>
  void for_each_tile(const F& f) const {
    const int64_t channels = args_.geometry.out_channels, tiles = divide_up(channels, kWeightRows);
    const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, kWeightRows * depth_ * count_));
    parallel_for(tiles, grain, [&](int64_t begin, int64_t end) {
      for (int64_t tile = begin; tile < end; ++tile) f(tile * kWeightRows, std::min((tile + 1) * kWeightRows, channels));
    });
  }

  void count() {
    const int bits = bits_of(args_.x_kind, args_.x_levels);
    const auto with_weight = [&]<int kX>() { args_.w_bits == 1 ? count_pairs<1, kX>() : count_pairs<2, kX>(); };
    if (bits == 1) return with_weight.template operator()<1>();
    if (bits == 2) return with_weight.template operator()<2>();
    count_pairs<1, 4>();
  }

  // kX: at least the bits of the activation.
  template <int kW, int kX>
  void count_pairs() {
    constexpr int kMany = 4 / (kW * kX);  // activations at a time: 16 sums
    count_ > 1 ? count_pairs<kW, kX, kMany>() : count_pairs<kW, kX, 1>();
  }

  template <int kW, int kX, int kM>
  void count_pairs() {
    const int bits = bits_of(args_.x_kind, args_.x_levels);
    const int64_t words = depth_ / kWordBits;
    Buffer<uint32_t> planes(count_ * kX * words);  // of the activation, a row after the other
    planes.clear();
    parallel_for(count_, std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, depth_)), [&](int64_t begin, int64_t end) {
      int64_t ones[kMaxBits];
      for (int64_t i = begin; i < end; ++i)
        split_row(rows_[i], codes_, args_.x_kind, bits, planes.data() + i * kX * words, words, ones);
    });
    // Of binary digits each weighs twice as much as the one before it.
    const int w_shift = args_.w_kind != Kind::kTernary, x_shift = args_.x_kind != Kind::kTernary;
    const RowUnpacker<kW> unpacker(args_);
    for_each_tile([&](int64_t first, int64_t last) {
      const int32_t* weights[kWeightRows][kW];
      for (int row = 0; row < kWeightRows; ++row)
        for (int i = 0; i < kW; ++i) weights[row][i] = unpacker.plane(std::min(first + row, last - 1), i);
      for (int64_t row = first; row < last; ++row) weights_.tap_sums[row] = unpacker.sum(row);
      alignas(64) __m512i sums[kM][kWeightRows];
      for (int64_t m = 0; m < count_; m += kM) {
        const uint32_t* x[kM];
        for (int r = 0; r < kM; ++r) x[r] = planes.data() + std::min(m + r, count_ - 1) * kX * words;
        count_rows<kM, kW, kX>(weights, args_.words, x, words, w_shift, x_shift, sums);
        for (int r = 0; r < kM && m + r < count_; ++r)
          put_four(dots_.data() + (m + r) * slots_ + first, sums[r][0], sums[r][1], sums[r][2], sums[r][3]);
      }
    });
  }

  void multiply() {
    [&]<int... kFewer>(std::integer_sequence<int, kFewer...>) {
      ((args_.w_bits == kFewer + 1 ? multiply_all<kFewer + 1>() : void()), ...);
    }(std::make_integer_sequence<int, kMaxBits>{});
  }

  template <int kBits>
  void multiply_all() {
    const RowUnpacker<kBits> unpacker(args_);
    weights_.zero = unpacker.kZero;
    order_activations<kBits>();
    if (count_ == 1) return multiply_at_once<1>(unpacker);
    if (count_ == 2) return multiply_at_once<2>(unpacker);
    if (count_ <= kAtOnce) return multiply_at_once<kAtOnce>(unpacker);
    for_each_tile([&](int64_t first, int64_t last) {
      alignas(64) int8_t codes[kWeightRows * kPartStride] = {};
      for (int64_t k = 0; k < depth_; k += kPart) {
        const int64_t part = std::min(kPart, depth_ - k), word = k / kWordBits;
        for (int64_t row = first; row < last; ++row) {
          int8_t* const to = codes + (row - first) * kPartStride;
          weights_.tap_sums[row] += unpacker.unpack(row, word, std::min(args_.words, word + kPart / kWordBits),
                                                    [&](int64_t i, int, __m512i step) { _mm512_store_si512(to + i, step); });
        }
        for (int64_t i = 0; i < count_; i += kTileRows) multiply_tile(i, codes, first, k, part);
      }
    });
  }

  // Each block as the weights' are ordered.
  template <int kBits>
  void order_activations() {
    activations_ = Buffer<uint8_t>(round_up(count_, kAtOnce) * stride_);
    activations_.clear();
    const Buffer<uint8_t> row(depth_);
    std::memset(row.data(), 0, depth_);
    for (int64_t i = 0; i < count_; ++i) {
      copy_codes(row.data(), rows_[i], codes_);
      uint8_t* const to = activations_.data() + i * stride_;
      for (int64_t k = 0; k < depth_; k += kBlockCodes)
        for (int w = 0; w < 64; ++w) std::memcpy(to + k + 8 * w, row.data() + k + 8 * RowUnpacker<kBits>::source(w), 8);
    }
  }

  // Codes that are multiplied by so few rows need not leave the registers.
  template <int kRows, class Unpacker>
  void multiply_at_once(const Unpacker& unpacker) {
    constexpr bool kScaled = Unpacker::kGroups * kRows <= kRegisters / 2;
    // A product waits four cycles for the one before it in its sum.
    constexpr int kChains = std::max(kScaled ? Unpacker::kGroups : 1, kAtOnce / kRows);
    for_each_tile([&](int64_t first, int64_t last) {
      const uint8_t* const activations = activations_.data();
      const int64_t stride = stride_;
      for (int64_t row = first; row < last; ++row) {
        __m512i sums[kChains][kRows] = {};
        const auto multiply = [&](int64_t k, int step, __m512i codes) QK_INLINED {
#pragma GCC unroll 4
          for (int r = 0; r < kRows; ++r) {
            __m512i& sum = sums[step % kChains][r];
            sum = _mm512_dpbusd_epi32(sum, _mm512_load_si512(activations + r * stride + k), codes);
          }
        };
        weights_.tap_sums[row] = unpacker.template unpack<kScaled>(row, 0, args_.words, multiply);
#pragma GCC unroll 4
        for (int r = 0; r < kRows; ++r) {
          __m512i sum = _mm512_setzero_si512();
#pragma GCC unroll 8
          for (int chain = 0; chain < kChains; ++chain)
            sum = _mm512_add_epi32(sum, _mm512_srli_epi32(sums[chain][r], kScaled ? Unpacker::scale(chain) : 0));
          dots_[r * slots_ + row] = _mm512_reduce_add_epi32(sum);
        }
      }
    });
  }

  // Codes [k, k + n) of kWeightRows rows by those of activations from i on.
  void multiply_tile(int64_t i, const int8_t* codes, int64_t slot, int64_t k, int64_t n) {
    const int rows = static_cast<int>(std::min<int64_t>(kTileRows, count_ - i));
    alignas(64) __m512i sums[kTileRows][kWeightRows];
    with_tile(rows, kWeightRows, [&]<int kRows, int kVectors>() {
      if constexpr (kVectors == kWeightRows) dot_rows<kRows>(activations_.data() + i * stride_ + k, stride_, codes, n, sums);
    });
    for (int r = 0; r < rows; ++r)
      put_four(dots_.data() + (i + r) * slots_ + slot, sums[r][0], sums[r][1], sums[r][2], sums[r][3], k > 0);
  }

  // The sums of kWeightRows vectors. Where there are fewer channels, others are written over later, or never read.
  QK_INLINED static void put_four(int32_t* to, __m512i a, __m512i b, __m512i c, __m512i d, bool add = false) {
    __m128i four = four_sums(a, b, c, d);
    if (add) four = _mm_add_epi32(four, _mm_loadu_si128(reinterpret_cast<const __m128i*>(to)));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), four);
  }

  void finish(const Plan& plan, Epilogue& epilogue) const {
    const Output output(args_);
    parallel_for(plan.panels(), 8, [&](int64_t begin, int64_t end) {
      const int64_t padded = round_up(count_, kLanes);
      Buffer<float> staged(padded * kPanelLanes), turned(padded * kPanelLanes);
      for (int64_t panel = begin; panel < end; ++panel) {
        const int64_t channel = panel * kPanelLanes, lanes = std::min<int64_t>(kPanelLanes, slots_ - channel);
        epilogue.take(weights_, channel, channel + lanes);
        epilogue.finish(Sums<int32_t, false>{dots_.data() + channel, slots_, sums_.data(), nullptr, weights_.zero}, count_,
                        channel, lanes, staged.data());
        output.write(staged.data(), 0, count_, channel,
                     std::min<int64_t>(kPanelLanes, args_.geometry.out_channels - channel), turned.data());
      }
    });
  }

  const LowbitArgs& args_;
  const uint8_t* const* rows_;
  int64_t count_, codes_, depth_, stride_, slots_;  // codes: K; depth: K in whole blocks
  Buffer<uint8_t> activations_;                     // [count][stride], zeros past K; not where ones are counted
  Buffer<int32_t> sums_;                            // [count], of those
  Buffer<int32_t> dots_;                            // [count][slots]
  Weights weights_;                                 // their sums alone
};

#endif

}  // namespace qk::cpu::QK_CPU_ISA

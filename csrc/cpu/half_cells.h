#pragma once
// Uniform codes of float16 by tables, without conversions, where the instruction set can.

#include <array>
#include <bit>
#include <optional>

#include "cpu/encoder.h"
#include "cpu/lookup.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

// The upper byte of a float16 (sign, exponent, two bits of its mantissa) names one of 256 cells. A table has the code at the
// beginning of each cell; the lower byte, its place in the cell, says how many of the boundaries between codes that lie
// there are behind it. Codes are exact: a boundary is the very number at which the code changes.
class HalfCells {
 public:
  static constexpr int kMostBits = 4;
  static constexpr int kMostInACell = 3;  // boundaries: as many as there can be if 0 is in the range

  // Of the codes 0 to 2^bits - 1 of a grid; none where a cell has more boundaries, or where a code is never reached.
  static std::optional<HalfCells> fit(const GridVec& grid, int bits) {
    const int levels = (1 << bits) - 1;
    const std::optional<Boundaries> boundaries = Boundaries::find(grid, levels);
    if (!boundaries) return std::nullopt;
    HalfCells cells(*boundaries, grid, levels);
    if (cells.most_in_a_cell() > kMostInACell) return std::nullopt;
    return cells;
  }

  // How many boundaries at most lie in one cell.
  int most_in_a_cell() const { return most_in_a_cell_; }

  // The codes of 64 numbers in the lower bits of bytes (those above mean nothing), every eight of them in reverse. kInACell:
  // most_in_a_cell() or more.
  template <int kInACell>
  QK_INLINED __m512i codes(const Half* x) const {
    const __m512i upper = _mm512_set_epi64(0x71737577797b7d7f, 0x61636567696b6d6f, 0x51535557595b5d5f, 0x41434547494b4d4f,
                                           0x31333537393b3d3f, 0x21232527292b2d2f, 0x11131517191b1d1f, 0x01030507090b0d0f);
    const __m512i lower = _mm512_sub_epi8(upper, _mm512_set1_epi8(1)), most = _mm512_set1_epi8(-1);
    const __m512i first = load_bits(x), second = load_bits(x + 32);
    const __m512i cell = _mm512_permutex2var_epi8(first, upper, second);
    const __m512i mantissa = _mm512_permutex2var_epi8(first, lower, second);
    const __mmask64 negative = _mm512_movepi8_mask(cell);
    const __m512i place = _mm512_mask_sub_epi8(mantissa, negative, most, mantissa);  // rises with the number
    const __m512i start = _mm512_mask_blend_epi8(negative, _mm512_permutex2var_epi8(starts_[0], cell, starts_[1]),
                                                 _mm512_permutex2var_epi8(starts_[2], cell, starts_[3]));
    __m512i code = start;
#pragma GCC unroll 3
    for (int n = 0; n < kInACell; ++n) {
      const __mmask64 behind = _mm512_cmpgt_epu8_mask(place, _mm512_permutexvar_epi8(start, last_before_[n]));
      code = _mm512_mask_sub_epi8(code, behind, code, most);
    }
    return code;
  }

 private:
  static constexpr int kCells = 256;
  static constexpr int kInfinity = 0x7c, kNan = 0x7f;  // cells; the first has NaN in it as well
  // In an entry of starts_, beside the code: the next boundary lies in this cell; this is the cell of infinity.
  static constexpr int kHasBoundary = 16, kHasInfinity = 32;

  static constexpr float number_of(int bits) {
    const int exponent = bits >> 10 & 31, mantissa = bits & 1023, sign = bits >> 15;
    if (exponent == 0) return static_cast<float>(sign ? -mantissa : mantissa) * 0x1p-24f;
    const int widened = exponent == 31 ? 255 : exponent + 112;
    return std::bit_cast<float>(static_cast<uint32_t>(sign) << 31 | static_cast<uint32_t>(widened << 23 | mantissa << 13));
  }

  // The least number of each cell, in the order that packing four vectors to bytes makes that of cells.
  static constexpr std::array<float, kCells> least_numbers() {
    std::array<float, kCells> least{};
    for (int i = 0; i < kCells; ++i) {
      const int vector = i / 16 % 4, lane = i % 16;
      const int cell = i / 64 * 64 + lane / 4 * 16 + vector * 4 + lane % 4;
      least[i] = number_of(cell << 8 | (cell < kCells / 2 ? 0 : 255));
    }
    return least;
  }

  // The least position that has code 1, 2, ...: half-way between two codes it is the even one's.
  static constexpr std::array<float, kLanes> least_positions() {
    std::array<float, kLanes> least{};
    for (int lane = 0; lane < kLanes; ++lane) {
      const float half_way = static_cast<float>(lane) + 0.5f;
      least[lane] = lane % 2 ? half_way : std::bit_cast<float>(std::bit_cast<uint32_t>(half_way) + 1);
    }
    return least;
  }

  // The first number that has code 1, 2, ..., a lane each.
  class Boundaries {
   public:
    // Each is looked for among three numbers. None where one is not found, as where the step is 0.
    static std::optional<Boundaries> find(const GridVec& grid, int levels) {
      alignas(64) static constexpr std::array<float, kLanes> kLeast = least_positions();
      const Vec least = load(kLeast.data());
      const Neighbours<Half> near(first_number(least, grid));
      const auto has_code = [&](Vec x) { return less_equal(least, position_of(x, grid)); };
      const Mask nearest = has_code(near.nearest), lanes = first_lanes(levels);
      const uint32_t found = bits_of(either(nearest, has_code(near.above))) & ~bits_of(has_code(near.below));
      if ((found & bits_of(lanes)) != bits_of(lanes)) return std::nullopt;
      const __m256i above = _mm256_add_epi16(near.places, _mm256_set1_epi16(1));
      return Boundaries(_mm256_mask_mov_epi16(above, nearest, near.places), lanes);
    }

    __m128i cells() const { return cells_; }

    // Those apart at which a cell begins, for its entry has the code from there on.
    int most_in_a_cell() const {
      const Mask inside = _mm_mask_test_epi8_mask(lanes_, places_, places_);
      int most = 1;
      while (_mm_mask_cmpeq_epi8_mask(inside, after(cells_, most), cells_) != 0) ++most;
      return most;
    }

    // The last place before the n-th boundary from a lane's own on; the last of all if that lies in another cell.
    __m128i last_before(int n) const {
      const __m128i most = _mm_set1_epi8(-1);
      const Mask here = _mm_cmpeq_epi8_mask(after(cells_, n), cells_);
      return _mm_mask_add_epi8(most, here, after(places_, n), most);
    }

   private:
    // There are 15 codes at most: the last lane is beyond.
    Boundaries(__m256i places, Mask lanes)
        : cells_(_mm_mask_mov_epi8(_mm_set1_epi8(kNan), lanes,
                                   _mm256_cvtepi16_epi8(_mm256_srli_epi16(Neighbours<Half>::ordered(places), 8)))),
          places_(_mm256_cvtepi16_epi8(places)),
          lanes_(lanes) {}

    // The least number whose position is `least` or more, but for a rounding error.
    static Vec first_number(Vec least, const GridVec& grid) {
      const auto number = [](__m512i bits) { return Vec{_mm512_castsi512_ps(bits)}; };
      const auto all = [](int n) { return _mm512_set1_epi32(n); };
      // The least difference x - offset; the step and its inverse make a product of 1 but for three units in the last place.
      const __m512i guess = _mm512_castps_si512((least * grid.step).v);
      __m512i difference = _mm512_sub_epi32(guess, all(2));
#pragma GCC unroll 4
      for (int away = -2; away < 2; ++away) {
        const Mask too_small = less(number(_mm512_add_epi32(guess, all(away))) * grid.inverse, least);
        difference = _mm512_mask_add_epi32(difference, too_small, difference, all(1));
      }
      // Differences are rounded: one begins half-way from the one before.
      const Vec gap = number(difference) - number(_mm512_sub_epi32(difference, all(1)));
      return (number(difference) + grid.offset) - gap * splat(0.5f);
    }

    static __m128i after(__m128i bytes, int n) {
      const __m128i lanes = _mm_set_epi8(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
      const __m128i from = _mm_add_epi8(lanes, _mm_set1_epi8(static_cast<char>(n)));
      return _mm_permutexvar_epi8(_mm_min_epu8(from, _mm_set1_epi8(15)), bytes);
    }

    __m128i cells_, places_;  // beyond the last code a cell of NaN alone
    Mask lanes_;
  };

  HalfCells(const Boundaries& boundaries, const GridVec& grid, int levels) : most_in_a_cell_(boundaries.most_in_a_cell()) {
    const __m512i never = _mm512_set1_epi8(-1);
    unrolled<kMostInACell>(
        [&](int n) { last_before_[n] = _mm512_inserti32x4(never, boundaries.last_before(n), kHasBoundary / 16); });
    // After infinity comes NaN: one more than the last code, whose lower bits are 0.
    last_before_[0] = _mm512_mask_mov_epi8(last_before_[0], uint64_t{1} << (kHasInfinity + levels), _mm512_setzero_si512());
    unrolled<kCells / 64>([&](int part) { starts_[part] = starts(part, boundaries, grid, levels); });
  }

  static __m512i starts(int part, const Boundaries& boundaries, const GridVec& grid, int levels) {
    alignas(64) static constexpr std::array<float, kCells> kLeast = least_numbers();
    const __m512i first_cells =
        _mm512_set_epi64(0x3f3e3d3c3b3a3938, 0x3736353433323130, 0x2f2e2d2c2b2a2928, 0x2726252423222120, 0x1f1e1d1c1b1a1918,
                         0x1716151413121110, 0x0f0e0d0c0b0a0908, 0x0706050403020100);
    const auto all = [](int n) { return _mm512_set1_epi8(static_cast<char>(n)); };
    const auto codes = [&](int vector) {
      const Vec least = load(kLeast.data() + (4 * part + vector) * kLanes);
      return _mm512_cvtps_epi32(unclamped_code<Kind::kUniform>(least, grid, splat(static_cast<float>(levels))).v);
    };
    const __m512i low = _mm512_packus_epi32(codes(0), codes(1)), high = _mm512_packus_epi32(codes(2), codes(3));
    const __m512i code = _mm512_packus_epi16(low, high), cells = _mm512_add_epi8(first_cells, all(64 * part));
    const __m512i boundary = _mm512_shuffle_epi8(_mm512_broadcast_i32x4(boundaries.cells()), code);
    const __m512i start = _mm512_mask_add_epi8(code, _mm512_cmpeq_epi8_mask(boundary, cells), code, all(kHasBoundary));
    if (part != kInfinity / 64) return start;
    return _mm512_mask_add_epi8(start, uint64_t{1} << kInfinity % 64, start, all(kHasInfinity));
  }

  __m512i starts_[kCells / 64], last_before_[kMostInACell];
  int most_in_a_cell_;
};

#endif

}  // namespace qk::cpu::QK_CPU_ISA

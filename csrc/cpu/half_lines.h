#pragma once
// Uniform codes of float16 without conversions, where the instruction set can.

#include <algorithm>
#include <cmath>
#include <optional>

#include "core/quantizer.h"
#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

// Numbers of one sign and one exponent lie evenly, so their positions on a grid are a straight line in the mantissa:
//
//   position = middle + slope * (mantissa - 512) / 512
//
// in 16 bits, of which the upper ones are the code. Two looks into tables, a product of 16 bits and a sum that saturates at
// both ends of the range make 32 positions. Codes are exact: wherever they change, a line is put so that it changes as well.
class HalfLines {
 public:
  static constexpr int kMostBits = 4;

  // Of the codes 0 to 2^bits - 1 of a grid's row; none where a line would have to be in two places at once.
  static std::optional<HalfLines> fit(const float* row, int bits) {
    HalfLines lines;
    const Codes codes({row[0], row[1], row[2]}, bits);
    for (int exponent = 0; exponent < kExponents; ++exponent)
      if (!lines.fit_line(codes, exponent)) return std::nullopt;
    return lines;
  }

  // Positions of 32 numbers, less 2^15. `specials`, 0 at first, tells any_special() of infinities and NaN, whose positions
  // mean nothing.
  QK_INLINED __m512i positions(__m512i numbers, __m512i& specials) const {
    const __m512i exponent = _mm512_srli_epi16(numbers, kMantissaBits);  // with its sign; bits above are ignored
    const __m512i slope = _mm512_permutex2var_epi16(half_of(slopes_, 0), exponent, half_of(slopes_, 1));
    const __m512i middle = _mm512_permutex2var_epi16(half_of(middles_, 0), exponent, half_of(middles_, 1));
    const __m512i mantissa = _mm512_xor_si512(_mm512_slli_epi16(numbers, 6), _mm512_set1_epi16(INT16_MIN));
    specials = _mm512_min_epi16(specials, slope);
    return _mm512_adds_epi16(_mm512_mulhrs_epi16(mantissa, slope), middle);
  }
  static bool any_special(__m512i specials) { return _mm512_cmpeq_epi16_mask(specials, _mm512_set1_epi16(kSpecial)) != 0; }

 private:
  static constexpr int kMantissaBits = 10, kMantissas = 1 << kMantissaBits;
  static constexpr int kExponents = 64;  // with the sign as the highest bit
  static constexpr int16_t kSpecial = INT16_MIN;

  // The codes as they are defined.
  struct Codes {
    Codes(const Grid& grid, int bits) : grid(grid), inverse(inverse_step(grid.step)), bits(bits) {}

    int of(int exponent, int mantissa) const {
      const __m128i number = _mm_cvtsi32_si128(exponent << kMantissaBits | mantissa);
      const float value = _mm_cvtss_f32(_mm_cvtph_ps(number));
      const float code = encode(Kind::kUniform, value, grid, inverse, static_cast<float>(highest()));
      return code == code ? static_cast<int>(code) : 0;
    }
    int width() const { return 1 << (16 - bits); }  // positions a code
    int highest() const { return (1 << bits) - 1; }

    Grid grid;
    float inverse;
    int bits;
  };

  // A number of a line, and its code.
  struct Place {
    int mantissa, code;
  };

  static __m512i half_of(const int16_t* table, int half) { return _mm512_load_si512(table + half * 32); }

  static int product(int mantissa, int slope) { return ((mantissa - kMantissas / 2) * 64 * slope + (1 << 14)) >> 15; }

  bool fit_line(const Codes& codes, int exponent) {
    const int unbiased = exponent % 32, width = codes.width();
    if (unbiased == 31) {
      slopes_[exponent] = kSpecial;
      middles_[exponent] = 0;
      return true;
    }
    Place places[2 << kMostBits];
    const int count = find_places(codes, exponent, places);
    slopes_[exponent] = 0;
    middles_[exponent] = static_cast<int16_t>(places[0].code * width + width / 2 + INT16_MIN);
    if (count == 2) return true;
    // Half of the line, and its middle, in positions.
    const double ulp = std::ldexp(exponent < 32 ? 1.0 : -1.0, std::max(unbiased, 1) - 25);
    const double scale = static_cast<double>(codes.inverse) * width;
    const double half = kMantissas / 2 * ulp * scale;
    const double number = (kMantissas / 2 + (unbiased ? kMantissas : 0)) * ulp;
    const double middle = (number - static_cast<double>(codes.grid.offset)) * scale + width / 2 + INT16_MIN;
    if (put_line(exponent, half, middle, places, count, codes)) return true;
    // One change alone, among numbers nearer to one another than positions: a steeper line will do that spans no more.
    const double steep = std::copysign(width / 2 - 1, half);
    return std::abs(half) < std::abs(steep) && put_line(exponent, steep, middle, places, count, codes);
  }

  // The ends of a line, and the two neighbours wherever its code changes: codes only rise or only fall along it, as the line
  // does, so a line that is right there is right everywhere. Returns how many.
  static int find_places(const Codes& codes, int exponent, Place* places) {
    const Place end{kMantissas - 1, codes.of(exponent, kMantissas - 1)};
    Place from{0, codes.of(exponent, 0)};
    int count = 0;
    places[count++] = from;
    while (from.code != end.code) {
      int low = from.mantissa, high = end.mantissa;  // the code of low is from's, that of high is not
      while (high - low > 1) {
        const int between = (low + high) / 2;
        (codes.of(exponent, between) == from.code ? low : high) = between;
      }
      places[count++] = {low, from.code};
      places[count++] = from = {high, codes.of(exponent, high)};
    }
    places[count++] = end;
    return count;
  }

  // Whether some middle gives the line of that slope these codes; the nearest to `middle` is taken.
  bool put_line(int exponent, double half, double middle, const Place* places, int count, const Codes& codes) {
    const int slope = static_cast<int>(std::clamp(std::nearbyint(half), -32767.0, 32767.0)), width = codes.width();
    int least = INT16_MIN, most = INT16_MAX;
    for (const Place* p = places; p < places + count; ++p) {
      const int first = p->code * width + INT16_MIN - product(p->mantissa, slope);
      if (p->code > 0) least = std::max(least, first);
      if (p->code < codes.highest()) most = std::min(most, first + width - 1);
    }
    if (least > most) return false;
    slopes_[exponent] = static_cast<int16_t>(slope);
    middles_[exponent] = static_cast<int16_t>(std::clamp<double>(std::nearbyint(middle), least, most));
    return true;
  }

  alignas(64) int16_t slopes_[kExponents], middles_[kExponents];
};

#endif

}  // namespace qk::cpu::QK_CPU_ISA

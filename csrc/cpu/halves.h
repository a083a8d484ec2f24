#pragma once
// Where the instruction set can, 32 elements of a half type in one register, as the bits they are.

#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

// Whether two vectors of T at a time cost less than one after the other.
template <class T>
inline constexpr bool kInPairs = false;

// The elements of two vectors. Of Half the first has the lower ones; of BFloat16 it has the even ones, so that one operation
// widens a vector.
struct TwoVecs {
  Vec first, second;
};

#if defined(__AVX512F__)

template <>
inline constexpr bool kInPairs<BFloat16> = true;

inline __m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }

inline TwoVecs widen(__m512i bits, const Half*) {
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(bits))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))}};
}
inline TwoVecs widen(__m512i bits, const BFloat16*) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}

inline Vec widen(__m256i bits, const Half*) { return {_mm512_cvtph_ps(bits)}; }
inline Vec widen(__m256i bits, const BFloat16*) { return from_bfloat16(bits); }
inline __m256i narrow(Vec a, const Half*) { return to_half(a); }
inline __m256i narrow(Vec a, const BFloat16*) { return to_bfloat16(a); }

// 32 elements side by side, of which none is subnormal: the instruction would make those 0. Only where the processor has it
// (rounds_to_bfloat16()). A NaN stays one.
inline __m512i narrow_normal(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }
inline __m256i narrow_normal(Vec a) { return reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(a.v)); }

// What widen() gave, as the elements lie in memory, and the other way round.
inline TwoVecs in_order(TwoVecs a, const Half*) { return a; }
inline TwoVecs in_order(TwoVecs a, const BFloat16*) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  return {{_mm512_permutex2var_ps(a.first.v, low, a.second.v)}, {_mm512_permutex2var_ps(a.first.v, high, a.second.v)}};
}
inline TwoVecs apart(TwoVecs a, const Half*) { return a; }
inline TwoVecs apart(TwoVecs a, const BFloat16*) {
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_or_si512(even, _mm512_set1_epi32(1));
  return {{_mm512_permutex2var_ps(a.first.v, even, a.second.v)}, {_mm512_permutex2var_ps(a.first.v, odd, a.second.v)}};
}
// 32 elements of which the even ones come first, as they lie in memory.
inline __m512i interleaved(__m512i halves) {
  const __m512i order = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21, 5,
                                         20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  return _mm512_permutexvar_epi16(order, halves);
}

// Where vectors come in halves, `vcvtph2ps` to 16 elements takes units of two kinds, to 8 it takes one for half the time.
inline constexpr int kEights = 4;  // in two Vecs

inline Vec8 load_eight(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec8 part(TwoVecs a, int q) {
  const __m512 whole = q < 2 ? a.first.v : a.second.v;
  return {q % 2 == 0 ? _mm512_castps512_ps256(whole) : _mm512_extractf32x8_ps(whole, 1)};
}
inline TwoVecs joined(const Vec8* parts) {
  return {{_mm512_insertf32x8(_mm512_castps256_ps512(parts[0].v), parts[1].v, 1)},
          {_mm512_insertf32x8(_mm512_castps256_ps512(parts[2].v), parts[3].v, 1)}};
}

// The sum of parts, half as many lanes as they have together.
inline Vec8 sum_of(const Vec8 (&parts)[kEights]) { return (parts[0] + parts[1]) + (parts[2] + parts[3]); }
inline Vec8 sum_of(const Vec (&parts)[2]) {
  const Vec sum = parts[0] + parts[1];
  return part({sum, sum}, 0) + part({sum, sum}, 1);
}

// {all lanes of a, all lanes of b} added up.
struct TwoSums {
  float first, second;
};
inline TwoSums lane_sums(Vec8 a, Vec8 b) {
  const __m256 in_turns = _mm256_add_ps(_mm256_unpacklo_ps(a.v, b.v), _mm256_unpackhi_ps(a.v, b.v));
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(in_turns), _mm256_extractf128_ps(in_turns, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return {_mm_cvtss_f32(two), _mm_cvtss_f32(_mm_movehdup_ps(two))};
}

// Sums of |x| and of x^2, 32 elements at a time, in the lanes that widen() gives them.
template <class T>
class MagnitudeSums {
 public:
  void add(__m512i bits, const T* p) {
    const TwoVecs magnitude = widen(_mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)), p);
    // One sum on the units that add, one on those that multiply.
    magnitudes_ = {magnitudes_.first + magnitude.first, multiplier_add(magnitude.second, magnitudes_.second)};
    squares_ = {multiply_add(magnitude.first, magnitude.first, squares_.first),
                multiply_add(magnitude.second, magnitude.second, squares_.second)};
  }
  TwoVecs magnitudes() const { return magnitudes_; }
  TwoVecs squares() const { return squares_; }
  TwoSums totals() const {
    return lane_sums(sum_of({magnitudes_.first, magnitudes_.second}), sum_of({squares_.first, squares_.second}));
  }

 private:
  TwoVecs magnitudes_{splat(0.0f), splat(0.0f)}, squares_{splat(0.0f), splat(0.0f)};
};

template <class T>
  requires(std::is_same_v<T, Half> && !kWholeVectors)
class MagnitudeSums<T> {
 public:
  void add(__m512i, const Half* p) {
    Vec8 values[kEights];
    unrolled<kEights>([&](int q) QK_INLINED { values[q] = load_eight(p + 8 * q); });
    unrolled<kEights>([&](int q) QK_INLINED { squares_[q] = multiply_add(values[q], values[q], squares_[q]); });
    unrolled<kEights>([&](int q) QK_INLINED { magnitudes_[q] = multiplier_add(abs(values[q]), magnitudes_[q]); });
  }
  TwoVecs magnitudes() const { return joined(magnitudes_); }
  TwoVecs squares() const { return joined(squares_); }
  TwoSums totals() const { return lane_sums(sum_of(magnitudes_), sum_of(squares_)); }

 private:
  Vec8 magnitudes_[kEights]{}, squares_[kEights]{};
};

#endif

}  // namespace qk::cpu::QK_CPU_ISA

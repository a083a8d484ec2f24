#pragma once
// Where the instruction set can, 32 elements of a half type in one register, as the bits they are.

#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

// Whether two vectors of T at a time cost less than one after the other.
template <class T>
inline constexpr bool kInPairs = false;

#if defined(__AVX512F__)

template <>
inline constexpr bool kInPairs<BFloat16> = true;

// The elements of two vectors. Of Half the first has the lower ones; of BFloat16 it has the even ones, so that one operation
// widens a vector.
struct TwoVecs {
  Vec first, second;
};

inline __m512i load_bits(const void* p) { return _mm512_loadu_si512(p); }

inline TwoVecs widen(__m512i bits, const Half*) {
  return {{_mm512_cvtph_ps(_mm512_castsi512_si256(bits))}, {_mm512_cvtph_ps(_mm512_extracti64x4_epi64(bits, 1))}};
}
inline TwoVecs widen(__m512i bits, const BFloat16*) {
  return {{_mm512_castsi512_ps(_mm512_slli_epi32(bits, 16))},
          {_mm512_castsi512_ps(_mm512_and_si512(bits, _mm512_set1_epi32(static_cast<int>(0xffff0000))))}};
}

// 32 elements side by side, of which none is subnormal: the instruction would make those 0. Only where the processor has it
// (rounds_to_bfloat16()). A NaN stays one.
inline __m512i narrow_normal(Vec low, Vec high) { return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(high.v, low.v)); }

// widen() of the magnitudes of the elements at p, whose bits these are. To load those of Half again costs less than to take
// a register apart.
inline TwoVecs widen_magnitudes(__m512i, const Half* p) {
  const auto widened = [](const Half* at) {
    const __m256i half = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    return Vec{_mm512_cvtph_ps(_mm256_and_si256(half, _mm256_set1_epi16(0x7fff)))};
  };
  return {widened(p), widened(p + kLanes)};
}
inline TwoVecs widen_magnitudes(__m512i bits, const BFloat16* p) {
  return widen(_mm512_and_si512(bits, _mm512_set1_epi16(0x7fff)), p);
}

// What widen() gave, as the elements lie in memory.
inline TwoVecs in_order(TwoVecs a, const Half*) { return a; }
inline TwoVecs in_order(TwoVecs a, const BFloat16*) {
  const __m512i low = _mm512_set_epi32(23, 7, 22, 6, 21, 5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  const __m512i high = _mm512_set_epi32(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8);
  return {{_mm512_permutex2var_ps(a.first.v, low, a.second.v)}, {_mm512_permutex2var_ps(a.first.v, high, a.second.v)}};
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

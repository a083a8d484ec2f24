#pragma once
// Where the instruction set can, codes become words of planes without leaving registers: 512 values at a time, and a
// register of eight words for each binary digit, which is a whole cache line of a plane.

#include <type_traits>

#include "cpu/halves.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

inline constexpr int64_t kBlock = 512;

// 64 elements, as split_values<T>() takes them.
template <class T>
QK_INLINED inline void load_block(const T* x, Vec (&values)[4]) {
#pragma GCC unroll 4
  for (int v = 0; v < 4; ++v) values[v] = load(x + v * kLanes);
}
QK_INLINED inline void load_block(const BFloat16* x, Vec (&values)[4]) {
  const TwoVecs low = widen(load_bits(x), x), high = widen(load_bits(x + 2 * kLanes), x);
  values[0] = low.first;
  values[1] = low.second;
  values[2] = high.first;
  values[3] = high.second;
}

// Word b: bit b of 64 codes, made of values up to 255: rounded to the nearest, ties to even; negative ones and NaN (the
// integer indefinite is negative) saturate to 0. simd.h's split_bits, for codes that were never in memory.
template <class T>
QK_INLINED inline __m512i split_values(const Vec (&values)[4]) {
  const __m512i low = _mm512_packus_epi32(_mm512_cvtps_epi32(values[0].v), _mm512_cvtps_epi32(values[1].v));
  const __m512i high = _mm512_packus_epi32(_mm512_cvtps_epi32(values[2].v), _mm512_cvtps_epi32(values[3].v));
  // Packing keeps to parts of 128 bits: byte 16 part + 4 i + j is value 4 part + j of vector i. Every eight codes in
  // reverse:
  const __m512i order =
      std::is_same_v<T, BFloat16>
          ? _mm512_set_epi64(0x383c393d3a3e3b3f, 0x282c292d2a2e2b2f, 0x181c191d1a1e1b1f, 0x080c090d0a0e0b0f,
                             0x3034313532363337, 0x2024212522262327, 0x1014111512161317, 0x0004010502060307)
          : _mm512_set_epi64(0x2c2d2e2f3c3d3e3f, 0x0c0d0e0f1c1d1e1f, 0x28292a2b38393a3b, 0x08090a0b18191a1b,
                             0x2425262734353637, 0x0405060714151617, 0x2021222330313233, 0x0001020310111213);
  return split_reversed(_mm512_permutexvar_epi8(order, _mm512_packus_epi16(low, high)));
}

// Eight rows of eight words become columns.
QK_INLINED inline void transpose_eights(__m512i (&rows)[8]) {
  __m512i pairs[8], fours[8];
  for (int i = 0; i < 8; i += 2) {
    pairs[i] = _mm512_unpacklo_epi64(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi64(rows[i], rows[i + 1]);
  }
  // Part j of pairs[i + odd] is column 2 j + odd of rows i and i + 1.
  for (int odd = 0; odd < 2; ++odd)
    for (int half = 0; half < 8; half += 4) {
      fours[half + odd] = _mm512_shuffle_i64x2(pairs[half + odd], pairs[half + odd + 2], 0x88);
      fours[half + odd + 2] = _mm512_shuffle_i64x2(pairs[half + odd], pairs[half + odd + 2], 0xdd);
    }
  for (int column = 0; column < 4; ++column) {
    rows[column] = _mm512_shuffle_i64x2(fours[column], fours[column + 4], 0x88);
    rows[column + 4] = _mm512_shuffle_i64x2(fours[column], fours[column + 4], 0xdd);
  }
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

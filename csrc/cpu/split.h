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

// Byte b of word w: bit b of eight codes, 8 w to 8 w + 7, made of values up to 255: rounded to the nearest, ties to even;
// negative ones and NaN (the integer indefinite is negative) saturate to 0.
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
  return transposed_bits(_mm512_permutexvar_epi8(order, _mm512_packus_epi16(low, high)));
}

// digits[first], ..., digits[first + 3]: these bits of 512 codes, of which split_values() made eight rows.
QK_INLINED inline void gather_four_digits(const __m512i (&rows)[8], int first, __m512i* digits) {
  // Of two rows, byte `first` of each word, the next byte of each word, and so on: 16 bytes a digit.
  const __m512i sixteens = _mm512_set_epi64(0x7b736b635b534b43, 0x3b332b231b130b03, 0x7a726a625a524a42, 0x3a322a221a120a02,
                                            0x7971696159514941, 0x3931292119110901, 0x7870686058504840, 0x3830282018100800);
  const __m512i bytes = _mm512_add_epi8(sixteens, _mm512_set1_epi8(static_cast<char>(first)));
  __m512i pairs[4], fours[4];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) pairs[i] = _mm512_permutex2var_epi8(rows[2 * i], bytes, rows[2 * i + 1]);
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    fours[half] = _mm512_shuffle_i64x2(pairs[2 * half], pairs[2 * half + 1], 0x44);
    fours[half + 2] = _mm512_shuffle_i64x2(pairs[2 * half], pairs[2 * half + 1], 0xee);
  }
#pragma GCC unroll 2
  for (int two = 0; two < 2; ++two) {
    digits[2 * two] = _mm512_shuffle_i64x2(fours[2 * two], fours[2 * two + 1], 0x88);
    digits[2 * two + 1] = _mm512_shuffle_i64x2(fours[2 * two], fours[2 * two + 1], 0xdd);
  }
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

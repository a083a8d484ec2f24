#pragma once
// Results of half types from a table of codes, where the instruction set can: 64 elements at a time.

#include <bit>

#include "cpu/halves.h"

namespace qk::cpu::QK_CPU_ISA {

#if defined(__AVX512F__)

inline constexpr int64_t kLookup = 64;

// A result for each of 256 codes: the lower bytes and the upper bytes.
struct CodeTable {
  alignas(64) uint8_t low[256], high[256];

  // Entries [code, code + 64), of which each argument is a half.
  void set(int code, __m512i first, __m512i second) {
    const __m512i lower = _mm512_set_epi64(0x7e7c7a7876747270, 0x6e6c6a6866646260, 0x5e5c5a5856545250, 0x4e4c4a4846444240,
                                           0x3e3c3a3836343230, 0x2e2c2a2826242220, 0x1e1c1a1816141210, 0x0e0c0a0806040200);
    const __m512i upper = _mm512_or_si512(lower, _mm512_set1_epi8(1));
    _mm512_store_si512(low + code, _mm512_permutex2var_epi8(first, lower, second));
    _mm512_store_si512(high + code, _mm512_permutex2var_epi8(first, upper, second));
  }
};

QK_INLINED inline __m512i look_up(const uint8_t* table, __m512i codes) {
  const auto part = [&](int n) { return _mm512_load_si512(table + n * 64); };
  return _mm512_mask_blend_epi8(_mm512_movepi8_mask(codes), _mm512_permutex2var_epi8(part(0), codes, part(1)),
                                _mm512_permutex2var_epi8(part(2), codes, part(3)));
}

// 32 elements such that packing, which keeps to parts of 128 bits, leaves them in the order of memory.
QK_INLINED inline TwoVecs load_to_pack(const BFloat16* p) {
  const __m512i bits = load_bits(p), zero = _mm512_setzero_si512();
  return {{_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, bits))},
          {_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, bits))}};
}
QK_INLINED inline TwoVecs load_to_pack(const Half* p) {
  return widen(_mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), load_bits(p)), p);
}

// The elements of a half type next below those nearest to v, those nearest, and those next above.
template <class T>
struct Neighbours {
  T numbers[kLanes];  // the nearest
  __m256i places;     // ordered() of these
  Vec below, nearest, above;

  explicit Neighbours(Vec v) {
    const __m256i bits = narrow(v, numbers), one = _mm256_set1_epi16(1);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(numbers), bits);
    places = ordered(bits);
    nearest = widen(bits, numbers);
    below = widen(ordered(_mm256_sub_epi16(places, one)), numbers);
    above = widen(ordered(_mm256_add_epi16(places, one)), numbers);
  }

  // Integers in the order of the numbers that have these bits, and the other way round: as they are, those of numbers with a
  // sign come in the opposite order.
  static __m256i ordered(__m256i bits) {
    return _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi16(bits, 15), _mm256_set1_epi16(0x7fff)));
  }
};

// A few numbers with results of their own.
template <class T>
struct Exceptions {
  static constexpr int kMost = 4;
  T numbers[kLanes], results[kLanes];  // from `count` on the first again
  int count = 0;

  // Returns whether there was room.
  bool add(T number) {
    if (count == 0) std::fill_n(numbers, kLanes, number);
    for (int e = 0; e < count; ++e)
      if (numbers[e].bits == number.bits) return true;
    if (count == kMost) return false;
    numbers[count++] = number;
    return true;
  }

  // The results of these elements, but for the first kCount exceptions.
  template <int kCount>
  QK_INLINED __m512i apply(__m512i results_of_others, __m512i elements) const {
    const auto all = [](T a) { return _mm512_set1_epi16(static_cast<int16_t>(a.bits)); };
    __m512i found = results_of_others;
#pragma GCC unroll 4
    for (int e = 0; e < kCount; ++e)
      found = _mm512_mask_mov_epi16(found, _mm512_cmpeq_epi16_mask(elements, all(numbers[e])), all(results[e]));
    return found;
  }
};

// f and g never fall while a number of the half type rises. Whether they reach the codes of these lanes, each next to the
// boundary that is a neighbours' nearest number, between the same two numbers but for at most one, which then is an
// exception: in that case, and if it is so for all codes, they are equal for all other numbers.
template <class T, class F, class G>
inline bool rise_together(Mask lanes, Vec codes, const Neighbours<T>& near, const F& f, const G& g,
                          Exceptions<T>& exceptions) {
  const auto rises = [&](const auto& code) {
    return both(less(code(near.below), codes), less_equal(codes, code(near.above)));
  };
  const uint32_t wanted = bits_of(lanes);
  if ((bits_of(both(rises(f), rises(g))) & wanted) != wanted) return false;
  bool room = true;
  for (uint32_t rest = wanted & ~bits_of(equal(f(near.nearest), g(near.nearest))); rest; rest &= rest - 1)
    room = room && exceptions.add(near.numbers[std::countr_zero(rest)]);
  return room;
}

// first, first + 1, ...
inline Vec count_from(float first) {
  return splat(first) + Vec{_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

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

  // Entries [code, code + 32).
  void set(int code, __m512i results) {
    _mm256_store_si256(reinterpret_cast<__m256i*>(low + code), _mm512_cvtepi16_epi8(results));
    _mm256_store_si256(reinterpret_cast<__m256i*>(high + code), _mm512_cvtepi16_epi8(_mm512_srli_epi16(results, 8)));
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

// The elements of a half type next below those nearest to v, those nearest, and those next above.
template <class T>
struct Neighbours {
  T below[kLanes], nearest[kLanes], above[kLanes];

  explicit Neighbours(Vec v) {
    // As integers, numbers with a sign come in the opposite order.
    const auto ordered = [](__m256i bits) {
      return _mm256_xor_si256(bits, _mm256_and_si256(_mm256_srai_epi16(bits, 15), _mm256_set1_epi16(0x7fff)));
    };
    const auto at = [](T* p) { return reinterpret_cast<__m256i*>(p); };
    store(nearest, v);
    const __m256i place = ordered(_mm256_loadu_si256(at(nearest))), one = _mm256_set1_epi16(1);
    _mm256_storeu_si256(at(below), ordered(_mm256_sub_epi16(place, one)));
    _mm256_storeu_si256(at(above), ordered(_mm256_add_epi16(place, one)));
  }
};

// A few numbers with results of their own.
template <class T>
struct Exceptions {
  static constexpr int kMost = 4;
  T numbers[kLanes], results[kLanes];  // the first `count` are in use
  int count = 0;

  // Returns whether there was room.
  bool add(T number) {
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

// f and g never fall while a number of the half type rises. Whether they reach each of these codes next to `boundary`,
// between the same two numbers but for at most one, which then is an exception: in that case, and if it is so for all
// codes, they are equal for all other numbers.
template <class T, class F, class G>
inline bool rise_together(Vec codes, Vec boundary, const F& f, const G& g, Exceptions<T>& exceptions) {
  const Neighbours<T> near(boundary);
  const auto rises = [&](const auto& code) {
    return both(less(code(load(near.below)), codes), less_equal(codes, code(load(near.above))));
  };
  if (both(rises(f), rises(g)) != first_lanes(kLanes)) return false;
  const uint32_t differ = bits_of(equal(f(load(near.nearest)), g(load(near.nearest)))) ^ bits_of(first_lanes(kLanes));
  bool room = true;
  for (uint32_t rest = differ; rest; rest &= rest - 1) room = room && exceptions.add(near.nearest[std::countr_zero(rest)]);
  return room;
}

// first, first + 1, ...
inline Vec count_from(float first) {
  return splat(first) + Vec{_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

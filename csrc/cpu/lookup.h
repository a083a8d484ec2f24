#pragma once
// Results of half types from a table of codes, where the instruction set can: 64 elements at a time.

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

// 32 elements, of BFloat16 such that packing, which keeps to parts of 128 bits, leaves them in the order of memory.
QK_INLINED inline TwoVecs load_to_pack(const BFloat16* p) {
  const __m512i bits = load_bits(p), zero = _mm512_setzero_si512();
  return {{_mm512_castsi512_ps(_mm512_unpacklo_epi16(zero, bits))},
          {_mm512_castsi512_ps(_mm512_unpackhi_epi16(zero, bits))}};
}
QK_INLINED inline TwoVecs load_to_pack(const Half* p) { return {load(p), load(p + kLanes)}; }

// What packing made of load_to_pack(), in the order of memory.
QK_INLINED inline __m512i in_order(__m512i packed, const BFloat16*) { return packed; }
QK_INLINED inline __m512i in_order(__m512i packed, const Half*) {
  return _mm512_permutexvar_epi64(_mm512_set_epi64(7, 5, 3, 1, 6, 4, 2, 0), packed);
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

// first, first + 1, ...
inline Vec count_from(float first) {
  return splat(first) + Vec{_mm512_set_ps(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)};
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

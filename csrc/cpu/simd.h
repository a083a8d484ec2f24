#pragma once
// One vector type, three instruction sets. Each family is compiled once per ISA with QK_CPU_ISA naming the namespace:
// avx512 (16 lanes), avx2 (8 lanes) or portable (8 lanes of plain C++, which the compiler vectorises as it can).
//
// max(a, b) and min(a, b) return b when either is NaN, as the x86 instructions do: write clamp(v) as min(hi, max(lo, v))
// and NaN passes.
//
// multiplier_add(a, b) and multiplier_subtract are a + b and a - b to the bit, done where products are made. Zen processors
// add, compare and round in two of their units and multiply in two others, so a kernel is as fast as the busier pair.

#include <cmath>
#include <cstdint>
#include <cstring>
#include <utility>

#include "core/args.h"

#if defined(__AVX2__)  // as well where there is AVX-512
#include <immintrin.h>
#endif

// What is called in the innermost loops: left to itself the compiler makes functions of some, which take registers from
// memory.
#define QK_INLINED __attribute__((always_inline))

namespace qk::cpu::QK_CPU_ISA {

// f(0), ..., f(kCount - 1), unrolled: an accumulator array indexed by a loop variable would live in memory.
template <int kCount, class F>
QK_INLINED inline void unrolled(const F& f) {
  [&]<int... kIndex>(std::integer_sequence<int, kIndex...>)
      QK_INLINED { (f(kIndex), ...); }(std::make_integer_sequence<int, kCount>{});
}

struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};

#if defined(__AVX2__)
// The vector of AVX2, and half of one of AVX-512.
struct Vec8 {
  __m256 v;
};

inline Vec8 operator+(Vec8 a, Vec8 b) { return {_mm256_add_ps(a.v, b.v)}; }
inline Vec8 operator-(Vec8 a, Vec8 b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline Vec8 operator*(Vec8 a, Vec8 b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline Vec8 max(Vec8 a, Vec8 b) { return {_mm256_max_ps(a.v, b.v)}; }
inline Vec8 min(Vec8 a, Vec8 b) { return {_mm256_min_ps(a.v, b.v)}; }
inline Vec8 abs(Vec8 a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
// For reductions only: fused, hence never in an element-wise result.
inline Vec8 multiply_add(Vec8 a, Vec8 b, Vec8 c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec8 multiplier_add(Vec8 a, Vec8 b) { return {_mm256_fmadd_ps(a.v, _mm256_set1_ps(1.0f), b.v)}; }
inline Vec8 multiplier_subtract(Vec8 a, Vec8 b) { return {_mm256_fmsub_ps(a.v, _mm256_set1_ps(1.0f), b.v)}; }
inline Vec8 round_to_even(Vec8 a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
#endif

// Whether vectors are of 512 bits and their operations not done in two halves each: then memory, not arithmetic, bounds what
// walks a tensor.
#if defined(__AVX512F__) && !defined(QK_HALVES_VECTORS)
inline constexpr bool kWholeVectors = true;
#else
inline constexpr bool kWholeVectors = false;
#endif

#if defined(__AVX512F__)

inline constexpr int kLanes = 16;
inline constexpr int kRegisters = 32;
struct Vec {
  __m512 v;
};
using Mask = __mmask16;

inline Vec splat(float a) { return {_mm512_set1_ps(a)}; }
inline Vec operator+(Vec a, Vec b) { return {_mm512_add_ps(a.v, b.v)}; }
inline Vec operator-(Vec a, Vec b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline Vec operator*(Vec a, Vec b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline Vec max(Vec a, Vec b) { return {_mm512_max_ps(a.v, b.v)}; }
inline Vec min(Vec a, Vec b) { return {_mm512_min_ps(a.v, b.v)}; }
inline Vec abs(Vec a) { return {_mm512_abs_ps(a.v)}; }
// For reductions only: fused, hence never in an element-wise result.
inline Vec multiply_add(Vec a, Vec b, Vec c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline Vec multiplier_add(Vec a, Vec b) { return {_mm512_fmadd_ps(a.v, _mm512_set1_ps(1.0f), b.v)}; }
inline Vec multiplier_subtract(Vec a, Vec b) { return {_mm512_fmsub_ps(a.v, _mm512_set1_ps(1.0f), b.v)}; }
inline Mask less(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LT_OQ); }
inline Mask less_equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_LE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm512_cmp_ps_mask(a.v, b.v, _CMP_EQ_OQ); }
inline Mask both(Mask a, Mask b) { return a & b; }
inline Mask either(Mask a, Mask b) { return _kor_mask16(a, b); }
inline Vec keep(Mask m, Vec a) { return {_mm512_maskz_mov_ps(m, a.v)}; }  // a where m, else 0
inline Vec select(Mask m, Vec a, Vec b) { return {_mm512_mask_blend_ps(m, b.v, a.v)}; }
inline Vec add_where(Vec a, Mask m, Vec b) { return {_mm512_mask_add_ps(a.v, m, a.v, b.v)}; }  // a + b where m, else a
// Not the sum with a magic number: one instruction, and right for every float.
inline Vec round_to_even(Vec a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline Mask first_lanes(int n) { return static_cast<Mask>((1u << n) - 1u); }
inline uint32_t bits_of(Mask m) { return m; }  // bit i: lane i
// A register of elements, those whose bit is not set made 0: bits as they are, no arithmetic.
inline Vec load_where(const uint32_t* p, uint32_t bits) {
  return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi32(static_cast<__mmask16>(bits), p))};
}
inline Vec load_where(const uint16_t* p, uint32_t bits) { return {_mm512_castsi512_ps(_mm512_maskz_loadu_epi16(bits, p))}; }

inline Vec load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline Vec load(const Half* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)))}; }
// A word permutation puts word i into the upper half of lane i.
inline Vec from_bfloat16(__m256i b) {
  const __m512i upper =
      _mm512_set_epi16(15, 0, 14, 0, 13, 0, 12, 0, 11, 0, 10, 0, 9, 0, 8, 0, 7, 0, 6, 0, 5, 0, 4, 0, 3, 0, 2, 0, 1, 0, 0, 0);
  return {_mm512_castsi512_ps(_mm512_maskz_permutexvar_epi16(0xaaaaaaaa, upper, _mm512_castsi256_si512(b)))};
}
inline Vec load(const BFloat16* p) { return from_bfloat16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
inline Vec load(const float* p, int n) { return {_mm512_maskz_loadu_ps(first_lanes(n), p)}; }
inline Vec load(const Half* p, int n) { return {_mm512_cvtph_ps(_mm256_maskz_loadu_epi16(first_lanes(n), p))}; }
inline Vec load(const BFloat16* p, int n) { return from_bfloat16(_mm256_maskz_loadu_epi16(first_lanes(n), p)); }

inline __m256i to_half(Vec a) { return _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
// The upper half of each 32 bits, of any float: halves.h has what costs less where none is subnormal.
inline __m512i round_to_bfloat16(Vec a) {
  const __m512i bits = _mm512_castps_si512(a.v), half = _mm512_add_epi32(bits, _mm512_set1_epi32(0x7fff));
  const __mmask16 odd = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x10000));
  const __m512i rounded = _mm512_mask_add_epi32(half, odd, half, _mm512_set1_epi32(1));
  const __mmask16 nan = _mm512_cmp_ps_mask(a.v, a.v, _CMP_UNORD_Q);
  return _mm512_mask_mov_epi32(rounded, nan, _mm512_set1_epi32(0x7fc00000));
}
inline __m256i to_bfloat16(Vec a) {
  const __m512i high = _mm512_set_epi16(0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 31, 29, 27, 25, 23, 21, 19, 17, 15,
                                        13, 11, 9, 7, 5, 3, 1);
  return _mm512_castsi512_si256(_mm512_permutexvar_epi16(high, round_to_bfloat16(a)));
}
inline void store(float* p, Vec a) { _mm512_storeu_ps(p, a.v); }
inline void store(Half* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_half(a)); }
inline void store(BFloat16* p, Vec a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a)); }
// Past the caches; p is aligned to the size of what is stored.
inline void stream(float* p, Vec a) { _mm512_stream_ps(p, a.v); }
inline void stream(Half* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_half(a)); }
inline void stream(BFloat16* p, Vec a) { _mm256_stream_si256(reinterpret_cast<__m256i*>(p), to_bfloat16(a)); }
inline void finish_streams() { _mm_sfence(); }
inline void store(float* p, Vec a, int n) { _mm512_mask_storeu_ps(p, first_lanes(n), a.v); }
inline void store(Half* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_half(a)); }
inline void store(BFloat16* p, Vec a, int n) { _mm256_mask_storeu_epi16(p, first_lanes(n), to_bfloat16(a)); }
// Codes from values in [0, 255]: rounded to the nearest, ties to even; NaN becomes 0 (the low byte of the integer
// indefinite).
inline __m128i to_codes(Vec a) { return _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)); }
inline void store_codes(uint8_t* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_codes(a)); }
inline void store_codes(uint8_t* p, Vec a, int n) { _mm_mask_storeu_epi8(p, first_lanes(n), to_codes(a)); }

// As many codes as one register holds, and one bit of each of them as a word.
inline constexpr int kBytes = 64;
struct Bytes {
  __m512i v;
};
using Word = uint64_t;

inline Word first_bytes(int n) { return n == kBytes ? ~Word{0} : (Word{1} << n) - 1; }
inline Bytes load_bytes(const uint8_t* p, int n) { return {_mm512_maskz_loadu_epi8(first_bytes(n), p)}; }
inline void store_bytes(uint8_t* p, Bytes a, int n) { _mm512_mask_storeu_epi8(p, first_bytes(n), a.v); }
inline Bytes zero_bytes() { return {_mm512_setzero_si512()}; }
// Of every eight bytes, which come last first, byte b: bit b of each.
inline __m512i transposed_bits(__m512i reversed) {
  // An affine map over GF(2) of the unit matrix by eight bytes.
  const __m512i unit = _mm512_set1_epi64(static_cast<int64_t>(0x8040201008040201));
  return _mm512_gf2p8affine_epi64_epi8(unit, reversed, 0);
}
// words[b]: bit b of every byte.
inline void split_bits(Bytes a, int, Word* words) {
  const __m512i order = _mm512_set4_epi32(0x08090a0b, 0x0c0d0e0f, 0x00010203, 0x04050607);
  // Byte b of every eight goes to word b.
  const __m512i gather = _mm512_set_epi64(0x3f372f271f170f07, 0x3e362e261e160e06, 0x3d352d251d150d05, 0x3c342c241c140c04,
                                          0x3b332b231b130b03, 0x3a322a221a120a02, 0x3931292119110901, 0x3830282018100800);
  const __m512i eights = transposed_bits(_mm512_shuffle_epi8(a.v, order));
  _mm512_storeu_si512(words, _mm512_permutexvar_epi8(gather, eights));
}
inline Bytes add_where(Bytes a, Word where, int weight) {
  return {_mm512_mask_add_epi8(a.v, where, a.v, _mm512_set1_epi8(static_cast<char>(weight)))};
}

#elif defined(__AVX2__)

inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 16;
using Vec = Vec8;
using Mask = __m256;

inline Vec splat(float a) { return {_mm256_set1_ps(a)}; }
inline Mask less(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LT_OQ); }
inline Mask less_equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_LE_OQ); }
inline Mask equal(Vec a, Vec b) { return _mm256_cmp_ps(a.v, b.v, _CMP_EQ_OQ); }
inline Mask both(Mask a, Mask b) { return _mm256_and_ps(a, b); }
inline Mask either(Mask a, Mask b) { return _mm256_or_ps(a, b); }
inline Vec keep(Mask m, Vec a) { return {_mm256_and_ps(m, a.v)}; }
inline Vec select(Mask m, Vec a, Vec b) { return {_mm256_blendv_ps(b.v, a.v, m)}; }
inline Vec add_where(Vec a, Mask m, Vec b) { return a + keep(m, b); }
inline Mask first_lanes(int n) {
  return _mm256_castsi256_ps(_mm256_cmpgt_epi32(_mm256_set1_epi32(n), _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)));
}
inline uint32_t bits_of(Mask m) { return static_cast<uint32_t>(_mm256_movemask_ps(m)); }
inline Vec load_where(const uint32_t* p, uint32_t bits) {
  const __m256i own_bit = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), own_bit);
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_and_si256(values, _mm256_cmpeq_epi32(set, own_bit)))};
}
inline Vec load_where(const uint16_t* p, uint32_t bits) {
  const __m256i own_bit = _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  const __m256i set = _mm256_and_si256(_mm256_set1_epi16(static_cast<int16_t>(bits)), own_bit);
  const __m256i values = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return {_mm256_castsi256_ps(_mm256_and_si256(values, _mm256_cmpeq_epi16(set, own_bit)))};
}

inline Vec load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline Vec load(const Half* p) { return {_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)))}; }
inline Vec load(const BFloat16* p) {
  return {_mm256_castsi256_ps(
      _mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 16))};
}
inline __m128i to_half(Vec a) { return _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
inline __m128i to_bfloat16(Vec a) {
  const __m256i bits = _mm256_castps_si256(a.v);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(a.v, a.v, _CMP_UNORD_Q));
  const __m256i high = _mm256_srli_epi32(_mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7fc00000), nan), 16);
  const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi32(high, high), 0b1000);
  return _mm256_castsi256_si128(packed);
}
inline void store(float* p, Vec a) { _mm256_storeu_ps(p, a.v); }
inline void store(Half* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_half(a)); }
inline void store(BFloat16* p, Vec a) { _mm_storeu_si128(reinterpret_cast<__m128i*>(p), to_bfloat16(a)); }
inline void stream(float* p, Vec a) { _mm256_stream_ps(p, a.v); }
inline void stream(Half* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_half(a)); }
inline void stream(BFloat16* p, Vec a) { _mm_stream_si128(reinterpret_cast<__m128i*>(p), to_bfloat16(a)); }
inline void finish_streams() { _mm_sfence(); }
// The integer indefinite that a NaN becomes saturates to 0 on its way to a byte.
inline void store_codes(uint8_t* p, Vec a) {
  const __m256i codes = _mm256_cvtps_epi32(a.v);
  const __m128i words = _mm_packs_epi32(_mm256_castsi256_si128(codes), _mm256_extracti128_si256(codes, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packus_epi16(words, words));
}

inline constexpr int kBytes = 32;
struct Bytes {
  __m256i v;
};
using Word = uint32_t;

inline Bytes load_bytes(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void store_bytes(uint8_t* p, Bytes a) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), a.v); }
inline Bytes zero_bytes() { return {_mm256_setzero_si256()}; }
inline void split_bits(Bytes a, int bits, Word* words) {
  for (int b = 0; b < bits; ++b)
    words[b] = static_cast<Word>(_mm256_movemask_epi8(_mm256_sll_epi16(a.v, _mm_cvtsi32_si128(7 - b))));
}
inline Bytes add_where(Bytes a, Word where, int weight) {
  // Byte i of the register takes byte i / 8 of the word, and keeps its bit i % 8.
  const __m256i spread = _mm256_setr_epi64x(0, 0x0101010101010101, 0x0202020202020202, 0x0303030303030303);
  const __m256i own_bit = _mm256_set1_epi64x(static_cast<int64_t>(0x8040201008040201));
  const __m256i bytes = _mm256_and_si256(_mm256_shuffle_epi8(_mm256_set1_epi32(static_cast<int>(where)), spread), own_bit);
  const __m256i mask = _mm256_cmpeq_epi8(bytes, own_bit);
  return {_mm256_add_epi8(a.v, _mm256_and_si256(mask, _mm256_set1_epi8(static_cast<char>(weight))))};
}

#else  // portable

inline constexpr int kLanes = 8;
inline constexpr int kRegisters = 32;
struct Vec {
  float v[kLanes];
};
struct Mask {
  uint32_t v[kLanes];  // all ones or all zeros
};

template <class F>
inline Vec map(F f) {
  Vec r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
inline Mask map_mask(F f) {
  Mask r;
  for (int i = 0; i < kLanes; ++i) r.v[i] = f(i) ? ~0u : 0u;
  return r;
}
inline Vec splat(float a) {
  return map([&](int) { return a; });
}
inline Vec operator+(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] + b.v[i]; });
}
inline Vec operator-(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] - b.v[i]; });
}
inline Vec operator*(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] * b.v[i]; });
}
inline Vec max(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec min(Vec a, Vec b) {
  return map([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec abs(Vec a) {
  return map([&](int i) { return std::fabs(a.v[i]); });
}
inline Vec multiply_add(Vec a, Vec b, Vec c) {
  return map([&](int i) { return a.v[i] * b.v[i] + c.v[i]; });
}
inline Vec multiplier_add(Vec a, Vec b) { return a + b; }
inline Vec multiplier_subtract(Vec a, Vec b) { return a - b; }
inline Mask less(Vec a, Vec b) {
  return map_mask([&](int i) { return a.v[i] < b.v[i]; });
}
inline Mask less_equal(Vec a, Vec b) {
  return map_mask([&](int i) { return a.v[i] <= b.v[i]; });
}
inline Mask equal(Vec a, Vec b) {
  return map_mask([&](int i) { return a.v[i] == b.v[i]; });
}
inline Mask both(Mask a, Mask b) {
  return map_mask([&](int i) { return (a.v[i] & b.v[i]) != 0; });
}
inline Mask either(Mask a, Mask b) {
  return map_mask([&](int i) { return (a.v[i] | b.v[i]) != 0; });
}
inline Vec keep(Mask m, Vec a) {
  return map([&](int i) { return m.v[i] ? a.v[i] : 0.0f; });
}
inline Vec select(Mask m, Vec a, Vec b) {
  return map([&](int i) { return m.v[i] ? a.v[i] : b.v[i]; });
}
inline Vec add_where(Vec a, Mask m, Vec b) { return a + keep(m, b); }
inline Vec round_to_even(Vec a) {
  return map([&](int i) { return qk::round_to_even(a.v[i]); });
}
inline Mask first_lanes(int n) {
  return map_mask([&](int i) { return i < n; });
}
inline uint32_t bits_of(Mask m) {
  uint32_t bits = 0;
  for (int i = 0; i < kLanes; ++i) bits |= (m.v[i] & 1u) << i;
  return bits;
}
template <class T>
inline Vec load_where(const T* p, uint32_t bits) {
  T kept[sizeof(Vec) / sizeof(T)];
  for (size_t i = 0; i < sizeof(Vec) / sizeof(T); ++i) kept[i] = bits >> i & 1u ? p[i] : T{0};
  Vec r;
  std::memcpy(&r, kept, sizeof r);
  return r;
}

inline float as_float(uint32_t bits) {
  float f;
  std::memcpy(&f, &bits, sizeof f);
  return f;
}
inline uint32_t as_bits(float f) {
  uint32_t bits;
  std::memcpy(&bits, &f, sizeof bits);
  return bits;
}
inline float to_float(float a) { return a; }
inline float to_float(BFloat16 a) { return as_float(static_cast<uint32_t>(a.bits) << 16); }
inline float to_float(Half a) {
  const uint32_t sign = static_cast<uint32_t>(a.bits & 0x8000u) << 16;
  const uint32_t magnitude = a.bits & 0x7fffu;
  if (magnitude >= 0x7c00u) return as_float(sign | 0x7f800000u | (magnitude & 0x3ffu) << 13);
  // Subnormal halves are exact multiples of 2^-24.
  if (magnitude < 0x400u) return as_float(sign | as_bits(static_cast<float>(magnitude) * 0x1p-24f));
  return as_float(sign | ((magnitude << 13) + (112u << 23)));
}
inline void from_float(float a, float* p) { *p = a; }
inline void from_float(float a, BFloat16* p) {
  const uint32_t bits = as_bits(a);
  p->bits = static_cast<uint16_t>(a != a ? 0x7fc0u : (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
inline void from_float(float a, Half* p) {
  const uint32_t sign = (as_bits(a) >> 16) & 0x8000u;
  const float magnitude = std::fabs(a);
  uint32_t half;
  if (a != a) {
    half = 0x7e00u;
  } else if (magnitude >= 65520.0f) {
    half = 0x7c00u;
  } else if (magnitude < 0x1p-14f) {
    half = static_cast<uint32_t>(qk::round_to_even(magnitude * 0x1p24f));
  } else {
    const uint32_t bits = as_bits(magnitude);
    half = (bits - (112u << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  }
  p->bits = static_cast<uint16_t>(sign | half);
}
template <class T>
inline Vec load(const T* p) {
  return map([&](int i) { return to_float(p[i]); });
}
template <class T>
inline void store(T* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) from_float(a.v[i], p + i);
}
template <class T>
inline void stream(T* p, Vec a) {
  store(p, a);
}
inline void finish_streams() {}
inline void store_codes(uint8_t* p, Vec a) {
  for (int i = 0; i < kLanes; ++i) p[i] = a.v[i] == a.v[i] ? static_cast<uint8_t>(qk::round_to_even(a.v[i])) : 0;
}

inline constexpr int kBytes = 32;
struct Bytes {
  uint8_t v[kBytes];
};
using Word = uint32_t;

inline Bytes load_bytes(const uint8_t* p) {
  Bytes r;
  std::memcpy(r.v, p, kBytes);
  return r;
}
inline void store_bytes(uint8_t* p, Bytes a) { std::memcpy(p, a.v, kBytes); }
inline Bytes zero_bytes() { return {}; }
inline void split_bits(Bytes a, int bits, Word* words) {
  for (int b = 0; b < bits; ++b) {
    words[b] = 0;
    for (int i = 0; i < kBytes; ++i) words[b] |= static_cast<Word>(a.v[i] >> b & 1) << i;
  }
}
inline Bytes add_where(Bytes a, Word where, int weight) {
  for (int i = 0; i < kBytes; ++i) a.v[i] = static_cast<uint8_t>(a.v[i] + (where >> i & 1) * weight);
  return a;
}

#endif

#if !defined(__AVX512F__)
// Partial vectors go through a full one on the stack: only the ends of rows pay.
template <class T>
inline Vec load(const T* p, int n) {
  T buffer[kLanes] = {};
  std::memcpy(buffer, p, n * sizeof(T));
  return load(buffer);
}
template <class T>
inline void store(T* p, Vec a, int n) {
  T buffer[kLanes];
  store(buffer, a);
  std::memcpy(p, buffer, n * sizeof(T));
}
inline void store_codes(uint8_t* p, Vec a, int n) {
  uint8_t buffer[kLanes];
  store_codes(buffer, a);
  std::memcpy(p, buffer, n);
}
inline Bytes load_bytes(const uint8_t* p, int n) {
  if (n == kBytes) return load_bytes(p);
  uint8_t buffer[kBytes] = {};
  std::memcpy(buffer, p, n);
  return load_bytes(buffer);
}
inline void store_bytes(uint8_t* p, Bytes a, int n) {
  if (n == kBytes) return store_bytes(p, a);
  uint8_t buffer[kBytes];
  store_bytes(buffer, a);
  std::memcpy(p, buffer, n);
}
#endif

// Which lanes of a vector an operation is for; a kernel's body is written once for both.
struct Whole {};
struct First {
  int n;
};
template <class T>
inline Vec load(const T* p, Whole) {
  return load(p);
}
template <class T>
inline Vec load(const T* p, First lanes) {
  return load(p, lanes.n);
}
// With whole vectors it stays before what is loaded or computed later, where a compiler would rather load late.
template <class T, class Lanes>
inline Vec load_first(const T* p, Lanes lanes) {
  Vec v = load(p, lanes);
#if defined(__AVX512F__)
  if constexpr (kWholeVectors) asm volatile("" : "+v"(v.v));
#endif
  return v;
}
template <class T>
inline void store(T* p, Vec a, Whole) {
  store(p, a);
}
template <class T>
inline void store(T* p, Vec a, First lanes) {
  store(p, a, lanes.n);
}
inline void store_codes(uint8_t* p, Vec a, Whole) { store_codes(p, a); }
inline void store_codes(uint8_t* p, Vec a, First lanes) { store_codes(p, a, lanes.n); }

// f of all lanes, the two halves of what is left at a time: a tree, the same for every ISA of equal width.
template <class F>
inline float fold_lanes(Vec a, const F& f) {
#if defined(__AVX2__)
#if defined(__AVX512F__)
  Vec8 eight = f(Vec8{_mm512_castps512_ps256(a.v)}, Vec8{_mm512_extractf32x8_ps(a.v, 1)});
#else
  Vec8 eight = a;
#endif
  eight = f(eight, Vec8{_mm256_permute2f128_ps(eight.v, eight.v, 1)});
  eight = f(eight, Vec8{_mm256_shuffle_ps(eight.v, eight.v, 0x4e)});
  eight = f(eight, Vec8{_mm256_shuffle_ps(eight.v, eight.v, 0xb1)});
  return _mm256_cvtss_f32(eight.v);
#else
  for (int width = kLanes / 2; width > 0; width /= 2) a = f(a, map([&](int i) { return a.v[(i + width) % kLanes]; }));
  return a.v[0];
#endif
}
inline float lane_sum(Vec a) {
  return fold_lanes(a, [](auto b, auto c) { return b + c; });
}
inline float lane_min(Vec a) {
  return fold_lanes(a, [](auto b, auto c) { return min(b, c); });
}
inline float lane_max(Vec a) {
  return fold_lanes(a, [](auto b, auto c) { return max(b, c); });
}

inline Vec clamp_code(Vec v, Vec levels) { return min(levels, max(splat(0.0f), v)); }

// Calls f(T*) with the element type that dtype names.
template <class F>
inline void with_type(DType dtype, F f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(static_cast<float*>(nullptr));
    case DType::kFloat16:
      return f(static_cast<Half*>(nullptr));
    case DType::kBFloat16:
      return f(static_cast<BFloat16*>(nullptr));
    case DType::kUInt8:
      return;  // the checks of csrc/ops let no integer tensor come here
  }
}

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
// Products of bit-planes: the ones that rows of an activation's plane and channels of a weight's plane share, in tiles as
// those of cpu/dot.h, exact for any number of bits below 2^31. And the planes of a row of codes.

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/bitplanes.h"
#include "cpu/dot.h"

namespace qk::cpu::QK_CPU_ISA {

// counts[R][V * kLanes]. panel: [words][V * kLanes channels], a word of each channel.
#if defined(__AVX512F__)

// vpandd, vpopcntd, vpaddd for 512 pairs of bits, where vpdpbusd takes 64 pairs of bytes.
template <int R, int V>
void count_tile(const uint32_t* const* rows, const uint32_t* panel, int64_t words, int32_t* counts) {
  __m512i sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_si512();
  for (int64_t word = 0; word < words; ++word) {
    __m512i weights[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) weights[v] = _mm512_load_si512(panel + (word * V + v) * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const __m512i activation = _mm512_set1_epi32(static_cast<int>(rows[r][word]));
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v)
        sums[r][v] = _mm512_add_epi32(sums[r][v], _mm512_popcnt_epi32(_mm512_and_si512(activation, weights[v])));
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(counts + (r * V + v) * kLanes, sums[r][v]);
}

#elif defined(__AVX2__)

// Ones of each byte: a table of 16, looked up by either nibble.
inline __m256i count_bytes(__m256i bits) {
  const __m256i ones =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i nibble = _mm256_set1_epi8(15);
  return _mm256_add_epi8(_mm256_shuffle_epi8(ones, _mm256_and_si256(bits, nibble)),
                         _mm256_shuffle_epi8(ones, _mm256_and_si256(_mm256_srli_epi16(bits, 4), nibble)));
}

template <int R, int V>
void count_tile(const uint32_t* const* rows, const uint32_t* panel, int64_t words, int32_t* counts) {
  constexpr int64_t kRun = 255 / 8;  // words until a byte may overflow
  std::memset(counts, 0, sizeof(int32_t) * R * V * kLanes);
  for (int64_t first = 0; first < words; first += kRun) {
    __m256i sums[R][V];
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = _mm256_setzero_si256();
    for (int64_t word = first; word < words && word < first + kRun; ++word) {
      __m256i weights[V];
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v)
        weights[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + (word * V + v) * kLanes));
#pragma GCC unroll 4
      for (int r = 0; r < R; ++r) {
        const __m256i activation = _mm256_set1_epi32(static_cast<int>(rows[r][word]));
#pragma GCC unroll 2
        for (int v = 0; v < V; ++v)
          sums[r][v] = _mm256_add_epi8(sums[r][v], count_bytes(_mm256_and_si256(activation, weights[v])));
      }
    }
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) {
        const __m256i pairs = _mm256_maddubs_epi16(sums[r][v], _mm256_set1_epi8(1));
        __m256i* const to = reinterpret_cast<__m256i*>(counts + (r * V + v) * kLanes);
        _mm256_storeu_si256(to, _mm256_add_epi32(_mm256_loadu_si256(to), _mm256_madd_epi16(pairs, _mm256_set1_epi16(1))));
      }
  }
}

#else

template <int R, int V>
void count_tile(const uint32_t* const* rows, const uint32_t* panel, int64_t words, int32_t* counts) {
  constexpr int kWidth = V * kLanes;
  int32_t sums[R][kWidth] = {};
  for (int64_t word = 0; word < words; ++word)
    for (int r = 0; r < R; ++r)
      for (int c = 0; c < kWidth; ++c) sums[r][c] += std::popcount(rows[r][word] & panel[word * kWidth + c]);
  std::memcpy(counts, sums, sizeof sums);
}

#endif

// n codes to their digits, those of digit d as words from planes + d * stride on; ones[d] counts them.
inline void split_row(const uint8_t* codes, int64_t n, Kind kind, int bits, uint32_t* planes, int64_t stride,
                      int64_t* ones) {
  std::fill(ones, ones + bits, 0);
  for (int64_t i = 0; i < n; i += kBytes) {
    Word digits[8];
    const int length = static_cast<int>(std::min<int64_t>(kBytes, n - i));
    split_bits(load_bytes(codes + i, length), bits, digits);
    if (kind == Kind::kTernary) digits[0] |= digits[1];  // codes 0, 1, 2 as thermometers 00, 01, 11
    for (int d = 0; d < bits; ++d) {
      std::memcpy(planes + d * stride + i / kWordBits, &digits[d], words_of(length) * sizeof(uint32_t));
      ones[d] += std::popcount(digits[d]);
    }
  }
}

// Ones among bits [first, last) of a row of words.
inline int64_t count_ones(const int32_t* row, int64_t first, int64_t last) {
  int64_t ones = 0;
  for (int64_t word = first / kWordBits; word * kWordBits < last; ++word)
    ones += std::popcount(static_cast<uint32_t>(row[word]) & bits_within(word, first, last));
  return ones;
}

}  // namespace qk::cpu::QK_CPU_ISA

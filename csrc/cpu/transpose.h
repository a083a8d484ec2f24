#pragma once
// Square blocks turned in registers, what it takes to go between channels-first tensors and channels-last kernels, and bytes
// of several registers put side by side.

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

// out[j][i] = in[i][j] for a kLanes x kLanes block of 32-bit elements of any type; strides in elements.
inline void transpose_words(const float* in, int64_t in_stride, float* out, int64_t out_stride) {
#if defined(__AVX512F__)
  __m512 a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm512_loadu_ps(in + i * in_stride);
  for (int i = 0; i < 16; i += 2) {
    b[i] = _mm512_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm512_unpackhi_ps(a[i], a[i + 1]);
  }
  const auto low = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  const auto high = [](__m512 x, __m512 y) {
    return _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)));
  };
  for (int i = 0; i < 16; i += 4) {
    a[i] = low(b[i], b[i + 2]);
    a[i + 1] = high(b[i], b[i + 2]);
    a[i + 2] = low(b[i + 1], b[i + 3]);
    a[i + 3] = high(b[i + 1], b[i + 3]);
  }
  // Column j of rows 4q..4q+3 is now 128-bit part j / 4 of a[4q + j % 4].
  for (int j = 0; j < 4; ++j) {
    const __m512 even_low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0x88), odd_low = _mm512_shuffle_f32x4(a[j], a[j + 4], 0xdd);
    const __m512 even_high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0x88);
    const __m512 odd_high = _mm512_shuffle_f32x4(a[j + 8], a[j + 12], 0xdd);
    _mm512_storeu_ps(out + j * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0x88));
    _mm512_storeu_ps(out + (j + 4) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0x88));
    _mm512_storeu_ps(out + (j + 8) * out_stride, _mm512_shuffle_f32x4(even_low, even_high, 0xdd));
    _mm512_storeu_ps(out + (j + 12) * out_stride, _mm512_shuffle_f32x4(odd_low, odd_high, 0xdd));
  }
#else
  for (int j = 0; j < kLanes; ++j)
    for (int i = 0; i < kLanes; ++i) std::memcpy(out + j * out_stride + i, in + i * in_stride + j, sizeof(float));
#endif
}

// out[j][i] = in[i][j] for a 16 x 16 block of bytes.
inline void transpose_bytes(const uint8_t* in, int64_t in_stride, uint8_t* out, int64_t out_stride) {
#if defined(__AVX2__)
  __m128i a[16], b[16];
  for (int i = 0; i < 16; ++i) a[i] = _mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i * in_stride));
  // Four times: interleave row i with row i + 8. Each pass rotates the 8-bit index (row, column) by one bit.
  const auto interleave = [](const __m128i(&from)[16], __m128i(&to)[16]) {
    for (int i = 0; i < 8; ++i) {
      to[2 * i] = _mm_unpacklo_epi8(from[i], from[i + 8]);
      to[2 * i + 1] = _mm_unpackhi_epi8(from[i], from[i + 8]);
    }
  };
  interleave(a, b);
  interleave(b, a);
  interleave(a, b);
  interleave(b, a);
  for (int i = 0; i < 16; ++i) _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i * out_stride), a[i]);
#else
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 16; ++i) out[j * out_stride + i] = in[i * in_stride + j];
#endif
}

#if defined(__AVX512F__)
// Byte i of each of four registers side by side, the last register's first, in the order of i within parts of 128 bits.
QK_INLINED inline void interleave_four(const __m512i* bytes, __m512i (&fours)[4]) {
  const __m512i high[] = {_mm512_unpacklo_epi8(bytes[3], bytes[2]), _mm512_unpackhi_epi8(bytes[3], bytes[2])};
  const __m512i low[] = {_mm512_unpacklo_epi8(bytes[1], bytes[0]), _mm512_unpackhi_epi8(bytes[1], bytes[0])};
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    fours[2 * half] = _mm512_unpacklo_epi16(high[half], low[half]);
    fours[2 * half + 1] = _mm512_unpackhi_epi16(high[half], low[half]);
  }
}
// The same of eight.
QK_INLINED inline void interleave_eight(const __m512i (&bytes)[8], __m512i (&eights)[8]) {
  __m512i high[4], low[4];
  interleave_four(bytes + 4, high);
  interleave_four(bytes, low);
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    eights[2 * i] = _mm512_unpacklo_epi32(high[i], low[i]);
    eights[2 * i + 1] = _mm512_unpackhi_epi32(high[i], low[i]);
  }
}
#endif

}  // namespace qk::cpu::QK_CPU_ISA

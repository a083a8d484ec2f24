#pragma once
// The integer dot products that every low-bit product is made of: a tile of R rows of activation codes by V vectors of
// output channels, kept in registers, exact in int32 for up to kMaxDepth terms.
//
// Every loop over the tile is unrolled by hand-written pragmas: one that is not would keep the sums in memory.
//
// Weights lie in panels [step][V * kLanes channels][kDepth]: at each step a lane multiplies kDepth codes of its channel with
// the kDepth activation codes that are broadcast to all lanes. A row may lie in several lines of as many steps each, `pitch`
// codes apart.

#include <cstdint>
#include <cstring>

#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

// |products| stay below 2^16, so int32 sums of this many cannot overflow.
inline constexpr int64_t kMaxDepth = 1 << 15;

struct Lines {
  int64_t steps;
  int64_t count = 1, pitch = 0;
};

#if defined(__AVX512F__)
// vpdpbusd multiplies unsigned by signed bytes. Weight codes above 127 are stored less 128; the epilogue adds 128 * SA.
using Activation = uint8_t;
using Weight = int8_t;
inline constexpr int kDepth = 4;
inline constexpr int kTileRows = 6;  // 24 sums, 4 vectors of weights and a broadcast fill the 32 registers
inline constexpr int kTileVectors = 4;
#else
// 16-bit codes: vpmaddwd is exact, where vpmaddubsw would saturate.
using Activation = int16_t;
using Weight = int16_t;
inline constexpr int kDepth = 2;
inline constexpr int kTileRows = 4;
inline constexpr int kTileVectors = 2;
#endif

// f(first code in the row) for each step.
template <class F>
QK_INLINED inline void for_each_step(Lines lines, const F& f) {
  for (int64_t line = 0; line < lines.count; ++line)
    for (int64_t step = 0, at = line * lines.pitch; step < lines.steps; ++step, at += kDepth) f(at);
}

#if defined(__AVX512F__)
template <int R, int V>
void dot_tile(const Activation* const* rows, const Weight* panel, Lines lines, int32_t* dots) {
  __m512i sums[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) sums[r][v] = _mm512_setzero_si512();
  for_each_step(lines, [&](int64_t at) QK_INLINED {
    __m512i weights[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) weights[v] = _mm512_loadu_si512(panel + v * 64);
    panel += V * 64;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      int32_t codes;
      std::memcpy(&codes, rows[r] + at, sizeof codes);
      const __m512i activation = _mm512_set1_epi32(codes);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], activation, weights[v]);
    }
  });
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) _mm512_storeu_si512(dots + (r * V + v) * kLanes, sums[r][v]);
}
#elif defined(__AVX2__)
template <int R, int V>
void dot_tile(const Activation* const* rows, const Weight* panel, Lines lines, int32_t* dots) {
  __m256i sums[R][V];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) sums[r][v] = _mm256_setzero_si256();
  for_each_step(lines, [&](int64_t at) QK_INLINED {
    __m256i weights[V];
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) weights[v] = _mm256_load_si256(reinterpret_cast<const __m256i*>(panel + v * 16));
    panel += V * 16;
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      int32_t codes;
      std::memcpy(&codes, rows[r] + at, sizeof codes);
      const __m256i activation = _mm256_set1_epi32(codes);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sums[r][v] = _mm256_add_epi32(sums[r][v], _mm256_madd_epi16(activation, weights[v]));
    }
  });
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + (r * V + v) * kLanes), sums[r][v]);
}
#else
template <int R, int V>
void dot_tile(const Activation* const* rows, const Weight* panel, Lines lines, int32_t* dots) {
  constexpr int kWidth = V * kLanes;
  int32_t sums[R][kWidth] = {};
  for_each_step(lines, [&](int64_t at) {
    for (int r = 0; r < R; ++r) {
      const int32_t a = rows[r][at], b = rows[r][at + 1];
      for (int c = 0; c < kWidth; ++c) sums[r][c] += a * panel[c * kDepth] + b * panel[c * kDepth + 1];
    }
    panel += kWidth * kDepth;
  });
  std::memcpy(dots, sums, sizeof sums);
}
#endif

inline constexpr int kPanelLanes = kTileVectors * kLanes;

// Calls f.template operator()<rows, vectors>(): rows in 1..kTileRows, vectors in 1..kTileVectors.
template <class F>
void with_tile(int rows, int vectors, const F& f) {
  const auto with_vectors = [&]<int R>() {
    static_assert(kTileVectors == 2 || kTileVectors == 4);
    if constexpr (kTileVectors == 4) {
      if (vectors == 4) return f.template operator()<R, 4>();
      if (vectors == 3) return f.template operator()<R, 3>();
    }
    vectors == 2 ? f.template operator()<R, 2>() : f.template operator()<R, 1>();
  };
  static_assert(kTileRows == 4 || kTileRows == 6);
  if constexpr (kTileRows == 6) {
    if (rows == 6) return with_vectors.template operator()<6>();
    if (rows == 5) return with_vectors.template operator()<5>();
  }
  if (rows == 4) return with_vectors.template operator()<4>();
  if (rows == 3) return with_vectors.template operator()<3>();
  rows == 2 ? with_vectors.template operator()<2>() : with_vectors.template operator()<1>();
}

// A valid tap of a depthwise window: where its codes lie from the window's first one, and its weights.
struct Tap {
  int64_t code, weight;
};

// dots[V * kLanes] = sum over taps of code * weight, channel by channel, and sums the codes alone. Weights are codes, too,
// one in each 32-bit lane. Codes are read in whole vectors. `first`, where the window begins, may lie outside the image.
template <int V>
void dot_taps(const uint8_t* codes, int64_t first, const int32_t* weights, const Tap* taps, int64_t count, int32_t* dots,
              int32_t* sums) {
#if defined(__AVX512F__)
  __m512i dot[V], sum[V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) dot[v] = sum[v] = _mm512_setzero_si512();
  for (int64_t t = 0; t < count; ++t)
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (first + taps[t].code + v * kLanes)));
      const __m512i code = _mm512_cvtepu8_epi32(bytes);
      dot[v] = _mm512_dpwssd_epi32(dot[v], code, _mm512_loadu_si512(weights + taps[t].weight + v * kLanes));
      sum[v] = _mm512_add_epi32(sum[v], code);
    }
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    _mm512_storeu_si512(dots + v * kLanes, dot[v]);
    _mm512_storeu_si512(sums + v * kLanes, sum[v]);
  }
#elif defined(__AVX2__)
  __m256i dot[V], sum[V];
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) dot[v] = sum[v] = _mm256_setzero_si256();
  for (int64_t t = 0; t < count; ++t)
#pragma GCC unroll 2
    for (int v = 0; v < V; ++v) {
      const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(codes + (first + taps[t].code + v * kLanes)));
      const __m256i code = _mm256_cvtepu8_epi32(bytes);
      const __m256i weight = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(weights + taps[t].weight + v * kLanes));
      dot[v] = _mm256_add_epi32(dot[v], _mm256_madd_epi16(code, weight));
      sum[v] = _mm256_add_epi32(sum[v], code);
    }
#pragma GCC unroll 2
  for (int v = 0; v < V; ++v) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(dots + v * kLanes), dot[v]);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(sums + v * kLanes), sum[v]);
  }
#else
  int32_t dot[V * kLanes] = {}, sum[V * kLanes] = {};
  for (int64_t t = 0; t < count; ++t)
    for (int c = 0; c < V * kLanes; ++c) {
      const int32_t code = codes[first + taps[t].code + c];
      dot[c] += code * weights[taps[t].weight + c];
      sum[c] += code;
    }
  std::memcpy(dots, dot, sizeof dot);
  std::memcpy(sums, sum, sizeof sum);
#endif
}

#if defined(__AVX512F__)
// The same four taps at a time.
inline constexpr int kTapGroup = 4;

// Weights of a vector of channels in up to four taps, those of a channel side by side, less `zero`.
inline __m512i packed_taps(const int32_t* weights, const Tap* taps, int count, int32_t zero) {
  __m512i packed = _mm512_setzero_si512();
  for (int t = 0; t < count; ++t) {
    const __m512i codes = _mm512_loadu_si512(weights + taps[t].weight);
    const __m512i byte = _mm512_and_si512(_mm512_sub_epi32(codes, _mm512_set1_epi32(zero)), _mm512_set1_epi32(0xff));
    packed = _mm512_or_si512(packed, _mm512_sll_epi32(byte, _mm_cvtsi32_si128(8 * t)));
  }
  return packed;
}

// Codes of 16 V channels in up to four taps, as the weights; those of other taps are zero.
template <int V>
QK_INLINED inline void load_taps(const uint8_t* codes, int64_t first, const Tap* taps, int count, __m512i (&codes_of)[V]) {
  const __m512i order = _mm512_set_epi64(0x3f2f1f0f3e2e1e0e, 0x3d2d1d0d3c2c1c0c, 0x3b2b1b0b3a2a1a0a, 0x3929190938281808,
                                         0x3727170736261606, 0x3525150534241404, 0x3323130332221202, 0x3121110130201000);
  if constexpr (V == 1) {
    const auto tap = [&](int t) QK_INLINED {
      return t < count ? _mm_loadu_si128(reinterpret_cast<const __m128i*>(codes + (first + taps[t].code)))
                       : _mm_setzero_si128();
    };
    const __m512i low = _mm512_inserti32x4(_mm512_castsi128_si512(tap(0)), tap(1), 1);
    codes_of[0] = _mm512_permutexvar_epi8(order, _mm512_inserti32x4(_mm512_inserti32x4(low, tap(2), 2), tap(3), 3));
  } else {
    static_assert(V == 2);
    const auto tap = [&](int t) QK_INLINED {
      return t < count ? _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + (first + taps[t].code)))
                       : _mm256_setzero_si256();
    };
    const __m512i low = _mm512_inserti64x4(_mm512_castsi256_si512(tap(0)), tap(1), 1);
    const __m512i high = _mm512_inserti64x4(_mm512_castsi256_si512(tap(2)), tap(3), 1);
    // Of 16-byte parts 0, 2, 4 and 6 the first channels, of the others the second ones.
    const __m512i wide = _mm512_add_epi8(order, _mm512_and_si512(order, _mm512_set1_epi8(0x70)));
    codes_of[0] = _mm512_permutex2var_epi8(low, wide, high);
    codes_of[1] = _mm512_permutex2var_epi8(low, _mm512_or_si512(wide, _mm512_set1_epi8(16)), high);
  }
}

// Of 16 V channels from codes[first] on; weights: packed_taps() of a group each, `stride` bytes apart; zero: what they lost.
template <int V>
void dot_packed_taps(const uint8_t* codes, int64_t first, const int8_t* weights, int64_t stride, const Tap* taps,
                     int64_t count, int32_t zero, int32_t* dots, int32_t* sums) {
  const __m512i ones = _mm512_set1_epi8(1);
  __m512i dot[V], sum[V];
  unrolled<V>([&](int v) QK_INLINED { dot[v] = sum[v] = _mm512_setzero_si512(); });
  const auto add = [&](int group) QK_INLINED {
    __m512i codes_of[V];
    load_taps<V>(codes, first, taps, group, codes_of);
    unrolled<V>([&](int v) QK_INLINED {
      dot[v] = _mm512_dpbusd_epi32(dot[v], codes_of[v], _mm512_load_si512(weights + v * 64));
      sum[v] = _mm512_dpbusd_epi32(sum[v], codes_of[v], ones);
    });
  };
  for (; count >= kTapGroup; count -= kTapGroup, taps += kTapGroup, weights += stride) add(kTapGroup);
  if (count > 0) add(static_cast<int>(count));
  unrolled<V>([&](int v) QK_INLINED {
    if (zero) dot[v] = _mm512_add_epi32(dot[v], _mm512_mullo_epi32(sum[v], _mm512_set1_epi32(zero)));
    _mm512_storeu_si512(dots + v * kLanes, dot[v]);
    _mm512_storeu_si512(sums + v * kLanes, sum[v]);
  });
}
#endif

// Sum of `lines` times n codes, stored as bytes or widened; lines are `pitch` apart.
template <class T>
int64_t sum_codes(const T* codes, int64_t n, int64_t lines = 1, int64_t pitch = 0) {
#if defined(__AVX512F__)
  static_assert(sizeof(T) == 1);
  const __m512i zero = _mm512_setzero_si512();
  const __mmask64 rest = n % 64 ? ~0ull >> (64 - n % 64) : 0;
  __m512i sums = zero;
  for (int64_t line = 0; line < lines; ++line, codes += pitch) {
    int64_t i = 0;
    for (; i + 64 <= n; i += 64) sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_loadu_si512(codes + i), zero));
    if (rest) sums = _mm512_add_epi64(sums, _mm512_sad_epu8(_mm512_maskz_loadu_epi8(rest, codes + i), zero));
  }
  return _mm512_reduce_add_epi64(sums);
#else
  int64_t total = 0;
  for (int64_t line = 0; line < lines; ++line, codes += pitch)
    for (int64_t first = 0, run; first < n; first += run) {
      run = n - first < kMaxDepth ? n - first : kMaxDepth;
      int32_t sum = 0;
      for (int64_t i = first; i < first + run; ++i) sum += codes[i];
      total += sum;
    }
  return total;
#endif
}

// To codes of the same width, or widened.
template <class Code>
void copy_codes(Code* to, const uint8_t* from, int64_t n) {
#if defined(__AVX512F__)
  static_assert(sizeof(Code) == 1);
  for (; n >= 64; n -= 64, to += 64, from += 64) _mm512_storeu_si512(to, _mm512_loadu_si512(from));
  if (n > 0) {
    const __mmask64 rest = ~0ull >> (64 - n);
    _mm512_mask_storeu_epi8(to, rest, _mm512_maskz_loadu_epi8(rest, from));
  }
#else
  for (int64_t i = 0; i < n; ++i) to[i] = from[i];
#endif
}

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
// Products of weights of one and two bits by looking up sums: of four activation codes there are sixteen sums of some of
// them, and four bits of a weight's plane say which one its channel wants. A byte permutation looks up 64 of them, which
// stands for 256 products, where vpdpbusd makes 64; that instruction then adds up what was found.
//
// A step is kTableDepth codes of a row. A table of it is 64 bytes: quarter q holds the sums of codes 4 q to 4 q + 3. Codes
// up to kTableCode have one table a step, so that the sums found for two planes fit a byte; others two, of their lower and
// of their higher four bits.
//
// Weights lie in panels of places in these tables, [step][vectors of the panel][planes][kLanes channels][4]: byte q of a
// channel's word is a place in quarter q.

#include <algorithm>

#include "cpu/dot.h"

namespace qk::cpu::QK_CPU_ISA {

inline constexpr int kTableCode = 15;
inline constexpr int kTableDepth = 16;
inline constexpr int kTableBytes = 64;
inline constexpr int kTablePlanes = 2;  // at most: vpdpbusd is as fast with more
inline constexpr int kTableRows = 4;    // of a tile

#if defined(__AVX512F__)

// The tables of 64 codes. Entry i of a quarter is the sum of those of its codes whose bits are set in i, the first code's
// bit being the highest: one of the first two codes' sums, and one of the other two's.
QK_INLINED inline void tables_of(__m512i codes, __m512i (&tables)[4]) {
  // Of codes a and b of each two: a, a + b, b, b. In parts of 128 bits, the first eight codes of each, and the other eight.
  const __m512i sums = _mm512_add_epi8(codes, _mm512_srli_epi16(codes, 8));
  const __m512i low = _mm512_unpacklo_epi8(codes, sums), high = _mm512_unpackhi_epi8(codes, sums);
  struct Orders {
    alignas(64) uint8_t of[4][2][kTableBytes];
  };
  static constexpr Orders kOrders = [] {
    Orders orders{};
    for (int table = 0; table < 4; ++table)
      for (int two = 0; two < 2; ++two)
        for (int at = 0; at < kTableBytes; ++at) {
          constexpr int kSum[] = {0, 2, 0, 1};  // nothing, b, a, a + b
          const int code = at / 16 * 4 + two * 2, bits = at >> (two ? 0 : 2) & 3;
          orders.of[table][two][at] = static_cast<uint8_t>(code / 8 * 64 + table * 16 + code % 8 * 2 + kSum[bits]);
        }
    return orders;
  }();
  // Where entries are the sum of any: bits 2 and 3 of their number, and 0 and 1.
  constexpr __mmask64 kAny[] = {0xfff0fff0fff0fff0, 0xeeeeeeeeeeeeeeee};
  unrolled<4>([&](int t) QK_INLINED {
    const auto two = [&](int i) QK_INLINED {
      return _mm512_maskz_permutex2var_epi8(kAny[i], low, _mm512_load_si512(kOrders.of[t][i]), high);
    };
    tables[t] = _mm512_add_epi8(two(0), two(1));
  });
}

// Tables of n codes to [ceil(n / kTableDepth)][kTables][kTableBytes]; codes past n count as 0.
template <int kTables>
void fill_tables(const uint8_t* codes, int64_t n, uint8_t* to) {
  const __m512i low_bits = _mm512_set1_epi8(kTableCode);
  for (int64_t i = 0; i < n; i += 64) {
    const __mmask64 there = n - i < 64 ? ~0ull >> (64 - (n - i)) : ~0ull;
    const __m512i all = _mm512_maskz_loadu_epi8(there, codes + i);
    const int64_t count = std::min<int64_t>(4, (n - i + kTableDepth - 1) / kTableDepth);
    const auto store = [&](__m512i of, uint8_t* at) QK_INLINED {
      __m512i tables[4];
      tables_of(of, tables);
      unrolled<4>([&](int t) QK_INLINED {
        if (t < count) _mm512_store_si512(at + t * kTables * kTableBytes, tables[t]);
      });
    };
    if constexpr (kTables == 1) {
      store(all, to);
    } else {
      store(_mm512_and_si512(all, low_bits), to);
      store(_mm512_and_si512(_mm512_srli_epi16(all, 4), low_bits), to + kTableBytes);
    }
    to += 4 * kTables * kTableBytes;
  }
}

// As dot_tile(); lines of so many steps, their tables lines.pitch bytes apart. kAdds: to what dots holds.
template <int R, int V, int kPlanes, int kTables, bool kAdds>
void table_tile(const uint8_t* const* tables, const uint8_t* panel, Lines lines, int32_t* dots) {
  static_assert(kPlanes == 1 || kTables == 1);
  constexpr int64_t kStepBytes = V * kPlanes * 64;
  constexpr int kSteps = kPlanes == 1 && kTables == 1 ? 2 : 1;  // together: what is found in them adds up to a byte
  const __m512i ones = _mm512_set1_epi8(1), sixteens = _mm512_set1_epi8(16);
  __m512i sums[R][V];
  unrolled<R>([&](int r) QK_INLINED {
    unrolled<V>([&](int v) QK_INLINED {
      sums[r][v] = kAdds ? _mm512_load_si512(dots + (r * V + v) * kLanes) : _mm512_setzero_si512();
    });
  });
  int64_t at = 0;
  const auto add = [&]<int S>() QK_INLINED {
    __m512i places[S][V][kPlanes];
    unrolled<S>([&](int s) QK_INLINED {
      unrolled<V * kPlanes>([&](int i) QK_INLINED {
        places[s][i / kPlanes][i % kPlanes] = _mm512_load_si512(panel + s * kStepBytes + i * 64);
      });
    });
    panel += S * kStepBytes;
    unrolled<R>([&](int r) QK_INLINED {
      __m512i of[S][kTables];
      unrolled<S * kTables>(
          [&](int i) QK_INLINED { of[i / kTables][i % kTables] = _mm512_load_si512(tables[r] + at + i * kTableBytes); });
      unrolled<V>([&](int v) QK_INLINED {
        unrolled<kTables>([&](int t) QK_INLINED {
          __m512i found = _mm512_permutexvar_epi8(places[0][v][0], of[0][t]);
          if constexpr (kPlanes == 2)
            found = _mm512_add_epi8(found, _mm512_permutexvar_epi8(places[0][v][1], _mm512_add_epi8(of[0][t], of[0][t])));
          if constexpr (S == 2) found = _mm512_add_epi8(found, _mm512_permutexvar_epi8(places[1][v][0], of[1][t]));
          sums[r][v] = _mm512_dpbusd_epi32(sums[r][v], found, t == 0 ? ones : sixteens);
        });
      });
    });
    at += S * kTables * kTableBytes;
  };
  for (int64_t line = 0; line < lines.count; ++line) {
    at = line * lines.pitch;
    for (int64_t step = lines.steps / kSteps; step > 0; --step) add.template operator()<kSteps>();
    if (kSteps == 2 && lines.steps % 2) add.template operator()<1>();
  }
  unrolled<R>([&](int r) QK_INLINED {
    unrolled<V>([&](int v) QK_INLINED { _mm512_store_si512(dots + (r * V + v) * kLanes, sums[r][v]); });
  });
}

// Places from four bits each of the bytes of two channels.
QK_INLINED inline __m512i places_of(__m512i bits, __m512i fields) {
  const __m512i four_bits = _mm512_set1_epi8(15), quarters = _mm512_set1_epi32(0x30201000);
  return _mm512_or_si512(_mm512_and_si512(_mm512_multishift_epi64_epi8(fields, bits), four_bits), quarters);
}

// Of the words of each of kLanes channels in a plane (32 terms, two steps), the places of either step.
QK_INLINED inline void places_of_words(__m512i words, __m512i (&steps)[2]) {
  // The first of eight terms is to be the highest bit.
  const __m512i reversed = _mm512_gf2p8affine_epi64_epi8(words, _mm512_set1_epi64(0x8040201008040201), 0);
  const __m512i fields = _mm512_set1_epi64(0x282c2024080c0004);
  steps[0] = places_of(reversed, fields);
  steps[1] = places_of(reversed, _mm512_add_epi8(fields, _mm512_set1_epi8(16)));
}

// A panel of codes of kBits bits, as many in a byte as fit (cpu/prepacked.h), to one of places, `steps` of them.
template <int kBits>
void place_panel(const uint8_t* packed, int64_t steps, int64_t vectors, uint8_t* to) {
  // The bytes of a channel are its codes k to k + 3 of up to eight steps of four. Turned, byte i is bit i of all: of two
  // channels, the second one's in the lower half. From there four bits each, for one plane of four steps of four.
  const auto fields = [](int first, int next) {
    const auto at = [&](int64_t i) { return i < 4 ? 8 * (first + next * i) + 4 : 8 * (first + next * (i - 4)); };
    int64_t control = 0;
    for (int64_t i = 0; i < 8; ++i) control |= at(i) << (8 * i);
    return _mm512_set1_epi64(control);
  };
  // One bit: four steps and the next four. Two: the lower bits and the higher ones of four steps.
  const __m512i first = kBits == 1 ? fields(0, 1) : fields(0, 2), second = kBits == 1 ? fields(4, 1) : fields(1, 2);
  const int64_t row = vectors * kBits * 64;  // of a step
  for (int64_t step = 0; step < steps; step += 2 / kBits, to += 2 / kBits * row)
    for (int64_t v = 0; v < vectors; ++v, packed += 64) {
      const __m512i turned = transposed_bits(_mm512_loadu_si512(packed));
      uint8_t* const at = to + v * kBits * 64;
      _mm512_store_si512(at, places_of(turned, first));
      if constexpr (kBits == 2)
        _mm512_store_si512(at + 64, places_of(turned, second));
      else if (step + 1 < steps)
        _mm512_store_si512(at + row, places_of(turned, second));
    }
}

#endif

}  // namespace qk::cpu::QK_CPU_ISA

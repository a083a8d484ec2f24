#include "cpu/lowbit.h"

#include <algorithm>
#include <array>

#include "core/algebra.h"
#include "cpu/parallel.h"
#include "cpu/popcount.h"
#include "cpu/prepacked.h"
#include "cpu/transpose.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

bool is_channels_last(const ConvGeometry& g, const int64_t* stride) {
  return (g.in_channels == 1 || stride[1] == 1) && (g.in_width == 1 || stride[3] == g.in_channels) &&
         (g.in_height == 1 || stride[2] == g.in_width * g.in_channels);
}

// Calls f(image, first, n) for pieces of each image's pixels, in parallel.
template <class F>
void for_each_piece(const ConvGeometry& g, int64_t piece, const F& f) {
  const int64_t pixels = g.in_height * g.in_width, pieces = divide_up(pixels, piece);
  parallel_for(g.batch * pieces, std::max<int64_t>(1, (1 << 14) / (piece * std::max<int64_t>(g.in_channels, 1))),
               [&](int64_t begin, int64_t end) {
                 for (int64_t i = begin; i < end; ++i) {
                   const int64_t first = i % pieces * piece;
                   f(i / pieces, first, std::min(piece, pixels - first));
                 }
               });
}

// to_codes(element index, n, out) encodes a contiguous run of x.
template <class F>
void encode_channels_last(const ConvGeometry& g, const F& to_codes, uint8_t* codes) {
  const int64_t numel = g.batch * g.in_height * g.in_width * g.in_channels;
  parallel_for(divide_up(numel, 1 << 14), 1, [&](int64_t begin, int64_t end) {
    const int64_t first = begin << 14;
    to_codes(first, std::min(end << 14, numel) - first, codes + first);
  });
}

template <class F>
void encode_channels_first(const ConvGeometry& g, const F& to_codes, uint8_t* codes) {
  constexpr int64_t kPiece = 256;
  const int64_t pixels = g.in_height * g.in_width, channels = g.in_channels;
  for_each_piece(g, std::clamp<int64_t>(round_up(pixels, 16), 16, kPiece), [&](int64_t image, int64_t first, int64_t n) {
    alignas(64) uint8_t planes[16][kPiece];
    alignas(64) uint8_t turned[16][16];
    for (int64_t c = 0; c < channels; c += 16) {
      const int64_t width = std::min<int64_t>(16, channels - c);
      for (int64_t i = 0; i < width; ++i) to_codes((image * channels + c + i) * pixels + first, n, planes[i]);
      uint8_t* const to = codes + (image * pixels + first) * channels + c;
      for (int64_t p = 0; p < n; p += 16) {
        if (width == 16 && p + 16 <= n) {
          transpose_bytes(planes[0] + p, kPiece, to + p * channels, channels);
          continue;
        }
        transpose_bytes(planes[0] + p, kPiece, turned[0], 16);
        for (int64_t i = 0; i < std::min<int64_t>(16, n - p); ++i) std::memcpy(to + (p + i) * channels, turned[i], width);
      }
    }
  });
}

#if !defined(__AVX512F__)
// spread[b] has bit i of b as the lowest bit of byte i.
constexpr std::array<uint64_t, 256> kSpread = [] {
  std::array<uint64_t, 256> table{};
  for (int b = 0; b < 256; ++b)
    for (int i = 0; i < 8; ++i) table[b] |= static_cast<uint64_t>(b >> i & 1) << (8 * i);
  return table;
}();
#endif

// The codes of one weight row, words * 32 of them.
void unpack_row(const LowbitArgs& args, int64_t row, uint8_t* codes) {
  const int64_t plane = args.geometry.out_channels * args.words, count = args.words;
  const int32_t* const words = args.planes + row * args.words;
  const int planes = args.w_bits;
  int weights[kMaxBits];
  for (int p = 0; p < planes; ++p) weights[p] = plane_weight(args.w_kind, planes, p);
  int64_t word = 0;
#if defined(__AVX512F__)
  for (; word + 2 <= count; word += 2) {
    __m512i sum = _mm512_setzero_si512();
    for (int p = 0; p < planes; ++p) {
      uint64_t bits;
      std::memcpy(&bits, words + p * plane + word, sizeof bits);
      sum = _mm512_mask_add_epi8(sum, bits, sum, _mm512_set1_epi8(static_cast<char>(weights[p])));
    }
    _mm512_storeu_si512(codes + word * 32, sum);
  }
  if (word < count) {
    __m256i sum = _mm256_setzero_si256();
    for (int p = 0; p < planes; ++p)
      sum = _mm256_mask_add_epi8(sum, words[p * plane + word], sum, _mm256_set1_epi8(static_cast<char>(weights[p])));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + word * 32), sum);
  }
#else
  for (; word < count; ++word)
    for (int byte = 0; byte < 4; ++byte) {
      uint64_t sum = 0;
      for (int p = 0; p < planes; ++p) {
        const uint32_t bits = static_cast<uint32_t>(words[p * plane + word]);
        sum += kSpread[bits >> (8 * byte) & 255] * weights[p];
      }
      for (int i = 0; i < 8; ++i) codes[word * 32 + byte * 8 + i] = static_cast<uint8_t>(sum >> (8 * i));
    }
#endif
}

// Arguments by value: stores of bytes may alias anything that is read through a reference.
void recenter(const uint8_t* codes, int64_t n, int32_t zero, Weight* weights) {
  for (int64_t k = 0; k < n; ++k) weights[k] = static_cast<Weight>(codes[k] - zero);
}

// rows [kLanes][stride] of 32-bit words to [words][kLanes], these `to_stride` words apart.
void interleave(const void* rows, int64_t stride, int64_t words, void* to, int64_t to_stride) {
  for (int64_t word = 0; word < words; word += kLanes) {
    alignas(64) float turned[kLanes][kLanes];
    transpose_words(static_cast<const float*>(rows) + word, stride, turned[0], kLanes);
    for (int64_t i = 0; i < std::min<int64_t>(kLanes, words - word); ++i)
      std::memcpy(static_cast<float*>(to) + (word + i) * to_stride, turned[i], sizeof turned[i]);
  }
}

// The weights of kLanes output channels of a group, from `first` on.
struct WeightVector {
  WeightVector(const Plan& plan, int64_t vector)
      : group(vector / plan.group_vectors),
        first(vector % plan.group_vectors * kLanes),
        channels(std::min<int64_t>(kLanes, plan.group_channels - first)),
        slot(vector * kLanes),
        panel(vector % plan.group_vectors / kTileVectors),
        position(vector % plan.group_vectors % kTileVectors),
        panel_vectors(std::min<int64_t>(kTileVectors, plan.group_vectors - panel * kTileVectors)) {}

  int64_t group, first, channels, slot;
  int64_t panel, position, panel_vectors;  // where they go
};

// Where the results of one thread's vectors are prepared.
struct WeightScratch {
  WeightScratch(const LowbitArgs& args, const Plan& plan)
      : columns(round_up(plan.by_planes() ? plan.words() : plan.steps(), kLanes)),
        codes(args.words * 32),
        rows(kLanes * columns) {}

  int64_t columns;  // words a row
  Buffer<uint8_t> codes;
  Buffer<uint32_t> rows;  // [kLanes][columns]
};

void unpack_codes(const LowbitArgs& args, const Plan& plan, const WeightVector& v, WeightScratch& scratch,
                  Weights& weights) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, in_channels = g.in_channels / g.groups, slots = plan.slots();
  static_assert(kDepth * sizeof(Weight) == sizeof(uint32_t));
  scratch.rows.clear();
  for (int64_t lane = 0; lane < v.channels; ++lane) {
    unpack_row(args, v.group * plan.group_channels + v.first + lane, scratch.codes.data());
    for (int64_t tap = 0; tap < taps; ++tap)
      weights.tap_sums[tap * slots + v.slot + lane] = sum_codes(scratch.codes.data() + tap * in_channels, in_channels);
    recenter(scratch.codes.data(), plan.depth, weights.zero,
             reinterpret_cast<Weight*>(scratch.rows.data() + lane * scratch.columns));
  }
  Weight* const to = const_cast<Weight*>(weights.panel(plan, v.group, v.panel)) + v.position * kLanes * kDepth;
  interleave(scratch.rows.data(), scratch.columns, plan.steps(), to, v.panel_vectors * kLanes);
}

// One input channel: a tap has one code.
void unpack_taps(const LowbitArgs& args, const Plan& plan, const WeightVector& v, WeightScratch& scratch, Weights& weights) {
  for (int64_t lane = 0; lane < v.channels; ++lane) {
    unpack_row(args, v.first + lane, scratch.codes.data());
    for (int64_t tap = 0; tap < plan.depth; ++tap) {
      const int64_t at = tap * plan.slots() + v.slot + lane;
      weights.taps[at] = scratch.codes[tap];
      weights.tap_sums[at] = scratch.codes[tap];
    }
  }
}

#if defined(__AVX512F__)
// The words of each plane of kLanes channels.
void turn_planes(const LowbitArgs& args, const Plan& plan, const WeightVector& v, const TurnedPlanes& turned) {
  const int64_t first_row = v.group * plan.group_channels + v.first, words = args.words;
  for (int p = 0; p < args.w_bits; ++p) {
    const int32_t* const rows = args.planes + (p * args.geometry.out_channels + first_row) * words;
    uint32_t* const to = turned.of(v.position) + p * turned.stride;
    int64_t word = 0;
    if (v.channels == kLanes)
      for (; word + kLanes <= words; word += kLanes)
        transpose_words(reinterpret_cast<const float*>(rows + word), words, reinterpret_cast<float*>(to + word * kLanes),
                        kLanes);
    for (; word < words; ++word)
      for (int64_t lane = 0; lane < kLanes; ++lane)
        to[word * kLanes + lane] = lane < v.channels ? static_cast<uint32_t>(rows[lane * words + word]) : 0;
  }
}

// The sums over each tap's input channels of their codes.
void sum_taps(const LowbitArgs& args, const Plan& plan, const WeightVector& v, const TurnedPlanes& turned,
              Weights& weights) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, in_channels = g.in_channels / g.groups;
  for (int64_t tap = 0; tap < taps; ++tap) {
    const int64_t first = tap * in_channels, last = first + in_channels;
    __m512i low = _mm512_setzero_si512(), high = low;  // of eight channels each
    for (int p = 0; p < args.w_bits; ++p) {
      __m512i ones = _mm512_setzero_si512();
      for (int64_t word = first / kWordBits; word * kWordBits < last; ++word) {
        const __m512i within = _mm512_set1_epi32(static_cast<int>(bits_within(word, first, last)));
        const __m512i bits = _mm512_load_si512(turned.of(v.position) + p * turned.stride + word * kLanes);
        ones = _mm512_add_epi32(ones, _mm512_popcnt_epi32(_mm512_and_si512(bits, within)));
      }
      const __m512i weight = _mm512_set1_epi64(plane_weight(args.w_kind, args.w_bits, p));
      low = _mm512_add_epi64(low, _mm512_mul_epu32(_mm512_cvtepu32_epi64(_mm512_castsi512_si256(ones)), weight));
      high = _mm512_add_epi64(high, _mm512_mul_epu32(_mm512_cvtepu32_epi64(_mm512_extracti64x4_epi64(ones, 1)), weight));
    }
    int64_t* const to = weights.tap_sums.data() + tap * plan.slots() + v.slot;
    _mm512_storeu_si512(to, low);
    _mm512_storeu_si512(to + 8, high);
  }
}

// Both, of the vectors of a panel.
void turn_panel(const LowbitArgs& args, const Plan& plan, int64_t group, int64_t index, const TurnedPlanes& turned,
                Weights& weights) {
  const int64_t first = group * plan.group_vectors + index * kTileVectors;
  for (int64_t vector = first; vector < first + plan.panel_vectors(index); ++vector) {
    const WeightVector v(plan, vector);
    turn_planes(args, plan, v, turned);
    sum_taps(args, plan, v, turned, weights);
  }
}

// Of a word of each of kLanes channels in each of kPlanes planes, planes `plane` words apart, the codes as eight steps of
// kDepth a channel: up to three planes by mask registers, which take the bits of a step, more by an affine map over GF(2).
template <int kPlanes>
QK_INLINED inline void expand_word(const uint32_t* words, int64_t plane, const __m512i (&weights)[kPlanes],
                                   __m512i (&steps)[8]) {
  if constexpr (kPlanes < 4) {
    // A byte of each word, four times, and there one bit of it in each.
    const __m512i byte = _mm512_set4_epi32(0x0c0c0c0c, 0x08080808, 0x04040404, 0);
    const __m512i low_bits = _mm512_set1_epi32(0x08040201), high_bits = _mm512_set1_epi32(static_cast<int>(0x80402010));
    unrolled<4>([&](int b) QK_INLINED {
      __m512i low = _mm512_setzero_si512(), high = low;
      unrolled<kPlanes>([&](int p) QK_INLINED {
        const __m512i bits = _mm512_shuffle_epi8(_mm512_load_si512(words + p * plane),
                                                 _mm512_or_si512(byte, _mm512_set1_epi8(static_cast<char>(b))));
        low = _mm512_mask_add_epi8(low, _mm512_test_epi8_mask(bits, low_bits), low, weights[p]);
        high = _mm512_mask_add_epi8(high, _mm512_test_epi8_mask(bits, high_bits), high, weights[p]);
      });
      steps[2 * b] = low;
      steps[2 * b + 1] = high;
    });
  } else {
    // Part b of 128 bits: byte b of each word.
    const __m512i order = _mm512_set_epi64(0x3f3b37332f2b2723, 0x1f1b17130f0b0703, 0x3e3a36322e2a2622, 0x1e1a16120e0a0602,
                                           0x3d3935312d292521, 0x1d1915110d090501, 0x3c3834302c282420, 0x1c1814100c080400);
    __m512i digits[8] = {}, codes[8], a[8];
    unrolled<kPlanes>([&](int p) QK_INLINED {
      digits[kPlanes - 1 - p] = _mm512_permutexvar_epi8(order, _mm512_load_si512(words + p * plane));
    });
    // There the bytes of a channel side by side, which the map makes eight of its codes.
    interleave_eight(digits, codes);
    unrolled<8>([&](int i) QK_INLINED { codes[i] = transposed_bits(codes[i]); });
    // Four of these a step, and from parts of the same number to a register.
    unrolled<4>([&](int i) QK_INLINED {
      const __m512 x = _mm512_castsi512_ps(codes[2 * i]), y = _mm512_castsi512_ps(codes[2 * i + 1]);
      a[i] = _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0x88));
      a[i + 4] = _mm512_castps_si512(_mm512_shuffle_ps(x, y, 0xdd));
    });
    unrolled<2>([&](int half) QK_INLINED {
      const __m512i* const four = a + 4 * half;
      const __m512i low[2] = {_mm512_shuffle_i64x2(four[0], four[1], 0x44), _mm512_shuffle_i64x2(four[2], four[3], 0x44)};
      const __m512i high[2] = {_mm512_shuffle_i64x2(four[0], four[1], 0xee), _mm512_shuffle_i64x2(four[2], four[3], 0xee)};
      steps[half] = _mm512_shuffle_i64x2(low[0], low[1], 0x88);
      steps[half + 2] = _mm512_shuffle_i64x2(low[0], low[1], 0xdd);
      steps[half + 4] = _mm512_shuffle_i64x2(high[0], high[1], 0x88);
      steps[half + 6] = _mm512_shuffle_i64x2(high[0], high[1], 0xdd);
    });
  }
}

// The codes, less `zero`, of a panel of so many vectors, `count` steps of them.
template <int kPlanes>
void expand_planes(Kind kind, const TurnedPlanes& turned, int64_t count, int64_t vectors, int32_t zero, Weight* to) {
  __m512i weights[kPlanes];
  unrolled<kPlanes>([&](int p)
                        QK_INLINED { weights[p] = _mm512_set1_epi8(static_cast<char>(plane_weight(kind, kPlanes, p))); });
  const __m512i less = _mm512_set1_epi8(static_cast<char>(zero));
  const int64_t stride = vectors * kLanes * kDepth;
  for (int64_t first = 0; first < count; first += 8) {
    const int64_t there = std::min<int64_t>(8, count - first);
    for (int64_t v = 0; v < vectors; ++v) {
      __m512i steps[8];
      expand_word<kPlanes>(turned.of(v) + first / 8 * kLanes, turned.stride, weights, steps);
      Weight* const at = to + first * stride + v * kLanes * kDepth;
      if (there == 8) {
        unrolled<8>([&](int i) QK_INLINED { _mm512_store_si512(at + i * stride, _mm512_sub_epi8(steps[i], less)); });
      } else {
        for (int64_t i = 0; i < there; ++i) _mm512_store_si512(at + i * stride, _mm512_sub_epi8(steps[i], less));
      }
    }
  }
}

}  // namespace

void expand_panel(const LowbitArgs& args, const Plan& plan, int64_t group, int64_t index, const TurnedPlanes& turned,
                  Weight* to, Weights& weights) {
  const int64_t vectors = plan.panel_vectors(index);
  turn_panel(args, plan, group, index, turned, weights);
  constexpr auto by_planes = []<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    return std::array{&expand_planes<kIndex + 1>...};
  }(std::make_integer_sequence<int, kMaxBits>{});
  by_planes[args.w_bits - 1](args.w_kind, turned, plan.steps(), vectors, weights.zero, to);
  // What is read past K meets weights of zero.
  if (const int64_t rest = plan.depth % kDepth; rest > 0) {
    const __mmask64 there = 0x1111111111111111u * ((1u << rest) - 1);
    for (int64_t v = 0; v < vectors; ++v) {
      Weight* const last = to + ((plan.steps() - 1) * vectors + v) * kLanes * kDepth;
      _mm512_store_si512(last, _mm512_maskz_loadu_epi8(there, last));
    }
  }
}

namespace {

// The same as places in tables.
void expand_places(const LowbitArgs& args, const Plan& plan, int64_t group, int64_t index, const TurnedPlanes& turned,
                   uint8_t* to, Weights& weights) {
  const int64_t vectors = plan.panel_vectors(index), steps = plan.table_steps(), row = vectors * args.w_bits * 64;
  turn_panel(args, plan, group, index, turned, weights);
  for (int64_t step = 0; step < steps; step += 2)
    for (int64_t v = 0; v < vectors; ++v)
      for (int digit = 0; digit < args.w_bits; ++digit) {
        const auto words = [&](int plane) {
          return _mm512_load_si512(turned.of(v) + plane * turned.stride + step / 2 * kLanes);
        };
        __m512i bits = words(plane_of_digit(args.w_kind, args.w_bits, digit)), places[2];
        // Thermometers 00, 01, 11 are codes 0, 1, 2.
        if (args.w_kind == Kind::kTernary && digit == 0) bits = _mm512_xor_si512(bits, words(1));
        places_of_words(bits, places);
        uint8_t* const at = to + step * row + (v * args.w_bits + digit) * 64;
        _mm512_store_si512(at, places[0]);
        if (step + 1 < steps) _mm512_store_si512(at + row, places[1]);
      }
  // What is read past K is in no sum.
  if (const int64_t rest = plan.depth % kTableDepth; rest > 0) {
    uint32_t there = 0x30303030;
    for (int64_t k = 0; k < rest; ++k) there |= 8u >> k % 4 << k / 4 * 8;
    for (uint8_t* at = to + (steps - 1) * row; at < to + steps * row; at += 64)
      _mm512_store_si512(at, _mm512_and_si512(_mm512_load_si512(at), _mm512_set1_epi32(static_cast<int>(there))));
  }
}
#endif

void arrange_planes(const LowbitArgs& args, const Plan& plan, const WeightVector& v, WeightScratch& scratch,
                    Weights& weights) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, in_channels = g.in_channels / g.groups, slots = plan.slots();
  const bool depthwise = plan.path == Path::kDepthwise;
  for (int digit = 0; digit < plan.w_digits; ++digit) {
    const int64_t first_row =
        plane_of_digit(args.w_kind, args.w_bits, digit) * g.out_channels + v.group * plan.group_channels;
    scratch.rows.clear();
    for (int64_t lane = 0; lane < v.channels; ++lane) {
      const int32_t* const row = args.planes + (first_row + v.first + lane) * args.words;
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t at = (digit * taps + tap) * slots + v.slot + lane;
        weights.tap_sums[at] = count_ones(row, tap * in_channels, (tap + 1) * in_channels);
        if (depthwise) weights.taps[at] = static_cast<int32_t>(weights.tap_sums[at]);
      }
      std::memcpy(scratch.rows.data() + lane * scratch.columns, row, args.words * sizeof *row);
    }
    if (depthwise) continue;
    uint32_t* const to = weights.plane(plan, v.group, v.panel, v.panel_vectors, digit) + v.position * kLanes;
    interleave(scratch.rows.data(), scratch.columns, plan.words(), to, v.panel_vectors * kLanes);
  }
}

// The numbers p[lane] + more as floats.
template <class Sum>
inline Vec floats_of(const Sum* p, Sum more) {
  float lanes[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) lanes[lane] = static_cast<float>(p[lane] + more);
  return load(lanes);
}
inline Vec floats_of(const float* p, float) { return load(p); }
#if defined(__AVX512F__)
inline Vec floats_of(const int32_t* p, int32_t more) {
  return {_mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_loadu_si512(p), _mm512_set1_epi32(more)))};
}
#endif

// Rounded once, as scale_and_shift() of core/algebra.h.
inline Vec fused_multiply_add(Vec a, Vec b, Vec c) {
#if defined(__AVX2__)
  return multiply_add(a, b, c);
#else
  return map([&](int i) { return scale_and_shift(a.v[i], b.v[i], c.v[i]); });
#endif
}

// SW of `count` slots over the taps [rows] x [columns]; tap_sums [taps][slots], from the first of them on.
void add_tap_sums(const int64_t* tap_sums, int64_t slots, int64_t count, int64_t kernel_width, TapRange rows,
                  TapRange columns, int64_t* sums) {
  std::fill(sums, sums + count, 0);
  for (int64_t kh = rows.first; kh < rows.last; ++kh)
    for (int64_t kw = columns.first; kw < columns.last; ++kw) {
      const int64_t* const tap = tap_sums + (kh * kernel_width + kw) * slots;
      for (int64_t s = 0; s < count; ++s) sums[s] += tap[s];
    }
}

// By tables, how many steps a pixel adds to those of its block: windows share theirs, but for what surrounds the block.
int64_t steps_a_pixel(const ConvGeometry& g, const Plan& plan) {
  const bool shared =
      plan.path == Path::kPatches && g.groups == 1 && g.dilation_width == 1 && g.in_channels % kTableDepth == 0;
  const int64_t around = 2 * g.stride_height * g.stride_width * g.in_channels / kTableDepth;
  return shared ? std::min(plan.table_steps(), around) : plan.table_steps();
}

// Sets plan.tables and plan.table_planes where sums looked up are faster than products.
void choose_tables([[maybe_unused]] const LowbitArgs& args, [[maybe_unused]] int64_t pixels, [[maybe_unused]] Plan& plan) {
#if defined(__AVX512F__)
  // Quarters of cycles: a step of codes and a lookup for a vector of channels, and a table.
  constexpr int64_t kFewestPixels = 8, kProduct = 4, kLookup = 6, kTable = 20;
  const int tables = args.x_levels > kTableCode ? 2 : 1;
  const int64_t lookups = args.w_bits * tables;
  if (plan.by_planes() || plan.path == Path::kDepthwise || plan.wide || plan.depth == 0) return;
  if (lookups > kTablePlanes || pixels < kFewestPixels) return;
  const int64_t by_codes = plan.steps() * plan.group_vectors * kProduct;
  const int64_t by_tables =
      plan.table_steps() * plan.group_vectors * lookups * kLookup + steps_a_pixel(args.geometry, plan) * tables * kTable;
  if (by_tables >= by_codes) return;
  plan.tables = tables;
  plan.table_planes = args.w_bits;
#endif
}

// So many pixels that their rows, or the tables of these, and a panel of weights share the L2 cache.
int64_t most_pixels(const ConvGeometry& g, const Plan& plan) {
  constexpr int64_t kRowBytes = 1 << 18, kTablesBytes = 1 << 20;
  const int64_t row = plan.steps() * kDepth * static_cast<int64_t>(sizeof(Activation));
  const int64_t fit = plan.by_tables() ? kTablesBytes / (steps_a_pixel(g, plan) * plan.tables * kTableBytes)
                                       : kRowBytes / std::max<int64_t>(1, row);
  return std::clamp<int64_t>(fit, plan.tile_rows(), 16 * kTileRows);
}
}  // namespace

Plan plan_of(const LowbitArgs& args) {
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, in_channels = g.in_channels / g.groups;
  Plan plan{};
  plan.depth = taps * in_channels;
  plan.wide = plan.depth > kMaxDepth;
  if (has_learned_basis(args)) {
    plan.x_digits = bits_of(args.x_kind, args.x_levels);
    plan.w_digits = args.w_bits;
  }
  const bool depthwise = g.groups > 1 && in_channels == 1 && g.out_channels == g.groups && !plan.wide;
  const bool in_bounds = g.pad_top == 0 && g.pad_left == 0 && (g.out_height - 1) * g.stride_height < g.in_height &&
                         (g.out_width - 1) * g.stride_width < g.in_width;
  const bool bytes = sizeof(Activation) == 1 || plan.by_planes();
  plan.path = depthwise ? Path::kDepthwise : taps == 1 && in_bounds && bytes ? Path::kRows : Path::kPatches;
  plan.groups = depthwise ? 1 : g.groups;
  plan.group_channels = g.out_channels / plan.groups;
  plan.group_vectors = divide_up(plan.group_channels, kLanes);

  const int64_t pixels = g.batch * g.out_height * g.out_width;
  choose_tables(args, pixels, plan);
  int64_t fewest_blocks = std::max<int64_t>(1, divide_up(pixels, most_pixels(g, plan)));
  // So many that a few threads have as much to do each.
  constexpr int64_t kMany = 8, kThreads = 4;
  if (plan.by_tables() && fewest_blocks > kMany) fewest_blocks = round_up(fewest_blocks, kThreads);
  plan.block = round_up(std::max<int64_t>(1, divide_up(pixels, fewest_blocks)), plan.tile_rows());
  // Enough tasks for the threads of a large machine; a task of more panels reuses its rows more.
  constexpr int64_t kTasks = 64;
  const int64_t blocks = plan.groups * divide_up(std::max<int64_t>(1, pixels), plan.block);
  plan.chunk = std::max<int64_t>(1, plan.panels() / std::max<int64_t>(1, kTasks / blocks));
  return plan;
}

Codes encode_activation(const LowbitArgs& args, const Plan& plan) {
  const ConvGeometry& g = args.geometry;
  const bool channels_last = is_channels_last(g, args.x_stride);
  // Rows are read in whole groups of kDepth codes, depthwise channels in whole vectors: only multiples of these end inside
  // the tensor of the user.
  const bool ends_inside = plan.by_planes()                ? true
                           : plan.path == Path::kRows      ? plan.depth % kDepth == 0
                           : plan.path == Path::kDepthwise ? g.in_channels % kLanes == 0
                                                           : true;
  if (args.x_dtype == DType::kUInt8 && channels_last && ends_inside) return {static_cast<const uint8_t*>(args.x), {}};
  Codes codes{nullptr, Buffer<uint8_t>(g.batch * g.in_height * g.in_width * g.in_channels)};
  codes.data = codes.owned.data();
  const auto encode = [&](const auto& to_codes) {
    channels_last ? encode_channels_last(g, to_codes, codes.owned.data())
                  : encode_channels_first(g, to_codes, codes.owned.data());
  };
  if (args.x_dtype == DType::kUInt8) {
    const uint8_t* const x = static_cast<const uint8_t*>(args.x);
    encode([&](int64_t first, int64_t n, uint8_t* to) { std::memcpy(to, x + first, n); });
    return codes;
  }
  const Encoder encoder(args.x_kind, args.x_levels, args.epilogue.x_grid);
  with_type(args.x_dtype, [&]<class T>(T*) {
    const T* const x = static_cast<const T*>(args.x);
    encode([&](int64_t first, int64_t n, uint8_t* to) { encoder.run(x + first, {n}, to); });
  });
  return codes;
}

TapClasses::TapClasses(const WindowAxis& axis) {
  of.reserve(axis.out_size);
  for (int64_t o = 0; o < axis.out_size; ++o) {
    const TapRange range = axis.taps(o);
    // Along a dimension both ends only fall, so equal ranges are neighbours.
    if (ranges.empty() || !(ranges.back() == range)) ranges.push_back(range);
    of.push_back(static_cast<int32_t>(ranges.size() - 1));
  }
}

#if defined(__AVX512F__)
namespace {
Weights unpack_prepacked(const LowbitArgs& args, const Plan& plan) {
  const Prepacked prepacked(args, plan);
  Weights weights;
  weights.zero = zero_of(args);
  weights.sums_there = prepacked.tap_sums();
  if (plan.by_tables()) return weights;  // as they are found by the tasks that look them up
  if (prepacked.width() == 8) {
    weights.panels_there = prepacked.expanded(0, 0, 0, nullptr);
    return weights;
  }
  // For a few blocks of rows each is expanded by the task that multiplies it.
  constexpr int64_t kFewBlocks = 4;
  const ConvGeometry& g = args.geometry;
  if (divide_up(g.batch * g.out_height * g.out_width, plan.block) <= kFewBlocks) return weights;
  weights.panels = Buffer<Weight>(plan.slots() * plan.steps() * kDepth);
  const int64_t panel_codes = kPanelLanes * plan.steps() * kDepth;
  parallel_for(plan.groups * plan.panels(), std::max<int64_t>(1, (1 << 16) / panel_codes), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t group = i / plan.panels(), index = i % plan.panels();
      prepacked.expanded(group, index, plan.panel_vectors(index), const_cast<Weight*>(weights.panel(plan, group, index)));
    }
  });
  return weights;
}
}  // namespace
#endif

Weights unpack_weights(const LowbitArgs& args, const Plan& plan) {
#if defined(__AVX512F__)
  if (args.prepacked) return unpack_prepacked(args, plan);
#endif
  const ConvGeometry& g = args.geometry;
  const int64_t taps = g.kernel_height * g.kernel_width, slots = plan.slots(), digits = std::max(plan.w_digits, 1);
  Weights weights;
  weights.zero = plan.by_planes() ? 0 : zero_of(args);
  weights.tap_sums = Buffer<int64_t>(digits * taps * slots);
  weights.tap_sums.clear();
  if (plan.path == Path::kDepthwise) {
    weights.taps = Buffer<int32_t>(digits * taps * slots);
    weights.taps.clear();
  } else if (plan.by_planes()) {
    weights.planes = Buffer<uint32_t>(slots * plan.w_digits * plan.words());
  } else {
    weights.panels = Buffer<Weight>(slots * (plan.slot_bytes() / static_cast<int64_t>(sizeof(Weight))));
  }
  const int64_t grain = std::max<int64_t>(1, (1 << 14) / std::max<int64_t>(1, plan.depth * kLanes));
#if defined(__AVX512F__)
  if (!plan.by_planes() && plan.path != Path::kDepthwise) {
    parallel_for(plan.groups * plan.panels(), divide_up(grain, kTileVectors), [&](int64_t begin, int64_t end) {
      const TurnedPlanes turned(args);
      for (int64_t i = begin; i < end; ++i) {
        const int64_t group = i / plan.panels(), index = i % plan.panels();
        Weight* const panel = const_cast<Weight*>(weights.panel(plan, group, index));
        if (plan.by_tables())
          expand_places(args, plan, group, index, turned, reinterpret_cast<uint8_t*>(panel), weights);
        else
          expand_panel(args, plan, group, index, turned, panel, weights);
      }
    });
    return weights;
  }
#endif
  parallel_for(plan.groups * plan.group_vectors, grain, [&](int64_t begin, int64_t end) {
    WeightScratch scratch(args, plan);
    const auto arrange = plan.by_planes() ? arrange_planes : plan.path == Path::kDepthwise ? unpack_taps : unpack_codes;
    for (int64_t vector = begin; vector < end; ++vector) arrange(args, plan, WeightVector(plan, vector), scratch, weights);
  });
  return weights;
}

Epilogue::Epilogue(const LowbitArgs& args, const Plan& plan, const Window& window)
    : args_(args),
      plan_(plan),
      window_(window),
      x_digits_(plan.x_digits),
      activation_step_(plan.by_planes() ? 1.0f : args.epilogue.x_grid[1]),
      lower_(args.epilogue.lower),
      upper_(args.epilogue.upper),
      has_bias_(args.epilogue.bias != nullptr),
      has_scale_(args.epilogue.scale != nullptr),
      slots_(plan.slots()),
      step_(slots_),
      offset_(slots_),
      bias_(has_bias_ ? slots_ : 0),
      scale_(has_scale_ ? slots_ : 0),
      shift_(has_scale_ ? slots_ : 0),
      window_terms_(window.count() * slots_) {
  if (!plan.by_planes()) return;
  const EpilogueArgs& e = args.epilogue;
  for (int j = 0; j < plan.x_digits; ++j) activation_steps_[j] = step_of_digit(args.x_kind, e.x_grid, j);
  pair_steps_ = Buffer<float>(plan.w_digits * plan.x_digits * slots_);
  for (int i = 0; i < plan.w_digits; ++i) {
    const Buffer<float> steps(slots_);
    by_slot(0, slots_, steps.data(), [&](int64_t c) { return step_of_digit(args.w_kind, weight_grid(c), i); });
    for (int j = 0; j < plan.x_digits; ++j)
      for (int64_t s = 0; s < slots_; ++s)
        pair_steps_[(i * x_digits_ + j) * slots_ + s] = pair_step(steps[s], activation_steps_[j]);
  }
}

template <class F>
void Epilogue::by_slot(int64_t first, int64_t last, float* to, const F& value) const {
  const int64_t group_slots = plan_.group_vectors * kLanes;
  for (int64_t slot = first, next; slot < last; slot = next) {
    const int64_t group = slot / group_slots, within = slot % group_slots, channel = group * plan_.group_channels + within;
    next = std::min(last, slot - within + group_slots);
    const int64_t there = std::clamp<int64_t>(plan_.group_channels - within, 0, next - slot);
    for (int64_t i = 0; i < there; ++i) *to++ = value(channel + i);
    to = std::fill_n(to, next - slot - there, 0.0f);
  }
}

void Epilogue::take(const Weights& weights, int64_t first, int64_t last) {
  const EpilogueArgs& e = args_.epilogue;
  by_slot(first, last, offset_.data() + first, [&](int64_t c) { return weight_grid(c)[0]; });
  by_slot(first, last, step_.data() + first, [&](int64_t c) { return plan_.by_planes() ? 1.0f : weight_grid(c)[1]; });
  if (e.bias) by_slot(first, last, bias_.data() + first, [&](int64_t c) { return e.bias[c]; });
  if (e.scale) by_slot(first, last, scale_.data() + first, [&](int64_t c) { return e.scale[c]; });
  if (e.shift) by_slot(first, last, shift_.data() + first, [&](int64_t c) { return e.shift[c]; });
  for (int64_t slot = first; slot < last; slot += kSlotsAtOnce)
    take_taps(weights, slot, std::min(kSlotsAtOnce, last - slot));
}

void Epilogue::take_taps(const Weights& weights, int64_t slot, int64_t count) {
  const ConvGeometry& g = args_.geometry;
  const int64_t plane = g.kernel_height * g.kernel_width * slots_;
  const int digits = std::max(plan_.w_digits, 1);
  int64_t sums[kSlotsAtOnce];
  float steps[kMaxBits][kSlotsAtOnce], total[kSlotsAtOnce];
  if (plan_.by_planes())
    for (int i = 0; i < digits; ++i)
      by_slot(slot, slot + count, steps[i], [&](int64_t c) { return step_of_digit(args_.w_kind, weight_grid(c), i); });
  else
    std::copy_n(step_.data() + slot, count, steps[0]);
  float* terms = window_terms_.data() + slot;
  for (const TapRange& rows : window_.rows.ranges)
    for (const TapRange& columns : window_.columns.ranges) {
      std::fill_n(total, count, 0.0f);
      for (int i = 0; i < digits; ++i) {
        add_tap_sums(weights.sums() + i * plane + slot, slots_, count, g.kernel_width, rows, columns, sums);
        for (int64_t s = 0; s < count; ++s) total[s] = add_digit(total[s], steps[i][s], static_cast<float>(sums[s]));
      }
      const float taps = static_cast<float>(rows.count() * columns.count() * (g.in_channels / g.groups));
      for (int64_t s = 0; s < count; ++s)
        terms[s] = window_term(total[s], taps, args_.epilogue.x_grid[0], 1.0f, offset_[slot + s]);
      terms += slots_;
    }
}

template <class Sum, bool kEachLane>
void Epilogue::finish(const Sums<Sum, kEachLane>& of, int64_t rows, int64_t slot, int64_t n, float* y) const {
  const auto with = [&]<bool kBias, bool kScale>() {
    const Sums<Sum, kEachLane> sums = of;  // copies: stores to y might alias whatever is read through a reference
    const int64_t slots = slots_;
    const Vec activation_step = splat(activation_step_), lower = splat(lower_), upper = splat(upper_);
    for (int64_t i = 0; i < n; i += kLanes) {
      // Once for all rows.
      const int64_t at = slot + i;
      const Vec step = load(step_.data() + at), offset = load(offset_.data() + at);
      [[maybe_unused]] const Vec bias = kBias ? load(bias_.data() + at) : step;
      [[maybe_unused]] const Vec scale = kScale ? load(scale_.data() + at) : step;
      [[maybe_unused]] const Vec shift = kScale ? load(shift_.data() + at) : step;
      const float* const window = window_terms_.data() + at;
      const Sum *dots = sums.dots + i, *activations = sums.activations + (kEachLane ? i : 0);
      float* to = y + i;
      for (int64_t row = 0; row < rows; ++row, dots += sums.stride, to += kPanelLanes) {
        Vec dot, activation;
        if constexpr (kEachLane) {
          dot = floats_of(dots, Sum{0});
          activation = floats_of(activations, Sum{0});
          activations += sums.stride;
        } else {
          const Sum sum = *activations++;
          dot = floats_of(dots, static_cast<Sum>(sums.zero * sum));
          activation = splat(static_cast<float>(sum));
        }
        const int64_t window_class = sums.window_class ? sums.window_class[row] : 0;
        Vec result = activation_step * (step * dot + offset * activation) + load(window + window_class * slots);
        if constexpr (kBias) result = result + bias;
        if constexpr (kScale) result = fused_multiply_add(result, scale, shift);
        store(to, min(upper, max(lower, result)));
      }
    }
  };
  if (has_bias_) return has_scale_ ? with.template operator()<true, true>() : with.template operator()<true, false>();
  has_scale_ ? with.template operator()<false, true>() : with.template operator()<false, false>();
}

template void Epilogue::finish(const Sums<int32_t, false>&, int64_t, int64_t, int64_t, float*) const;
template void Epilogue::finish(const Sums<int32_t, true>&, int64_t, int64_t, int64_t, float*) const;
template void Epilogue::finish(const Sums<int64_t, false>&, int64_t, int64_t, int64_t, float*) const;
template void Epilogue::finish(const Sums<float, false>&, int64_t, int64_t, int64_t, float*) const;
template void Epilogue::finish(const Sums<float, true>&, int64_t, int64_t, int64_t, float*) const;

Output::Output(const LowbitArgs& args)
    : args_(args),
      image_(args.geometry.out_height * args.geometry.out_width),
      channels_last_(args.out_stride[1] == 1 || args.geometry.out_channels == 1) {
  const EpilogueArgs& e = args.epilogue;
  if (e.out_grid) encoder_.emplace(e.out_kind, e.out_levels, e.out_grid);
}

void Output::store_rows(int64_t at, int64_t out_stride, const float* y, int64_t stride, int64_t count, int64_t n) const {
  if (encoder_) return encoder_->run(y, {n, count, stride, out_stride}, static_cast<uint8_t*>(args_.out) + at);
  with_type(args_.epilogue.out_dtype, [&]<class T>(T*) {
    T* to = static_cast<T*>(args_.out) + at;
    for (int64_t row = 0; row < count; ++row, to += out_stride, y += stride) {
      int64_t i = 0;
      for (; i + kLanes <= n; i += kLanes) store(to + i, load(y + i));
      if (i < n) store(to + i, load(y + i, static_cast<int>(n - i)), static_cast<int>(n - i));
    }
  });
}

void Output::write(const float* staged, int64_t pixel, int64_t pixels, int64_t channel, int64_t columns,
                   float* turned) const {
  const int64_t channels = args_.geometry.out_channels;
  if (channels_last_) return store_rows(pixel * channels + channel, channels, staged, kPanelLanes, pixels, columns);
  const int64_t stride = round_up(pixels, kLanes);
  for (int64_t c = 0; c < columns; c += kLanes)
    for (int64_t p = 0; p < pixels; p += kLanes)
      transpose_words(staged + p * kPanelLanes + c, kPanelLanes, turned + c * stride + p, stride);
  for (int64_t p = 0; p < pixels;) {
    const int64_t image = (pixel + p) / image_, first = (pixel + p) % image_, run = std::min(pixels - p, image_ - first);
    store_rows((image * channels + channel) * image_ + first, image_, turned + p, stride, columns, run);
    p += run;
  }
}

}  // namespace qk::cpu::QK_CPU_ISA

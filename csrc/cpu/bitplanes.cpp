// Codes, and their bits as planes of words: csrc/core/bitplanes.h says which bit goes where.

#include "core/bitplanes.h"

#include <atomic>
#include <bit>
#include <optional>
#include <type_traits>

#include "cpu/bitplanes.h"
#include "cpu/encoder.h"
#include "cpu/half_lines.h"
#include "cpu/split.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

inline constexpr int64_t kChunk = 2048;  // codes between encoding and packing: they stay in L1
inline constexpr int64_t kGrainCodes = 1 << 15;
static_assert(std::endian::native == std::endian::little, "a 64-bit word is stored as two 32-bit ones");

template <Kind kKind, class T>
struct Encode {
  static constexpr int kSums = 0;
  const T* x;
  uint8_t* codes;
  Vec levels;

  template <class Field>
  GridVec params(Field field) const {
    return grid_params(field);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, const GridVec& grid, Vec*) const {
    store_codes(codes + i, unrounded_code<kKind>(load(x + i, lanes), grid, levels), lanes);
  }
};

// codes: at most a chunk of one row; planes: their words in plane 0, other planes `plane_stride` words on. Adds the ones to
// counts[bits]. The words are collected first: planes often lie a power of two apart, and writing them in turns would throw
// each other's lines out of the cache.
void pack_codes(const uint8_t* codes, int64_t n, Kind kind, int bits, int32_t* planes, int64_t plane_stride,
                int32_t* counts) {
  Word words[kMaxBits][kChunk / kBytes];
  const int64_t groups = (n + kBytes - 1) / kBytes;
  for (int64_t group = 0; group < groups; ++group) {
    Word digits[kMaxBits];
    const int length = static_cast<int>(std::min<int64_t>(kBytes, n - group * kBytes));
    split_bits(load_bytes(codes + group * kBytes, length), bits, digits);
    if (kind == Kind::kTernary) digits[0] |= digits[1];  // codes 0, 1, 2 as thermometers 00, 01, 11
    for (int digit = 0; digit < bits; ++digit) words[digit][group] = digits[digit];
  }
  for (int plane = 0; plane < bits; ++plane) {
    const Word* const from = words[digit_of_plane(kind, bits, plane)];
    for (int64_t group = 0; group < groups; ++group) counts[plane] += std::popcount(from[group]);
    std::memcpy(planes + plane * plane_stride, from, words_of(n) * sizeof(int32_t));
  }
}

// As many of the first n values as are whole blocks, from floats to planes; returns how many. Adds the ones to counts[bits],
// bits <= kDigits.
template <Kind kKind, int kDigits, class T>
int64_t quantize_pack_blocks([[maybe_unused]] const T* x, [[maybe_unused]] int64_t n, [[maybe_unused]] GridVec grid,
                             [[maybe_unused]] Vec levels, [[maybe_unused]] int bits, [[maybe_unused]] int32_t* planes,
                             [[maybe_unused]] int64_t plane_stride, [[maybe_unused]] int32_t* counts) {
#if defined(__AVX512F__)
  __m512i ones[kDigits] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m512i rows[kMaxBits], digits[kDigits];
#pragma GCC unroll 8
    for (int row = 0; row < kMaxBits; ++row) {
      Vec values[4];
      load_block(x + i + row * kBytes, values);
#pragma GCC unroll 4
      for (Vec& value : values) value = unclamped_code<kKind>(value, grid, levels);
      rows[row] = split_values<T>(values);
    }
#pragma GCC unroll 2
    for (int first = 0; first < kDigits; first += 4) gather_four_digits(rows, first, digits + first);
    if constexpr (kKind == Kind::kTernary) digits[0] = _mm512_or_si512(digits[0], digits[1]);  // thermometers
#pragma GCC unroll 8
    for (int digit = 0; digit < kDigits; ++digit) {
      if (digit >= bits) continue;
      const int plane = digit_of_plane(kKind, bits, digit);  // and the other way round
      ones[digit] = _mm512_add_epi64(ones[digit], _mm512_popcnt_epi64(digits[digit]));
      _mm512_storeu_si512(planes + plane * plane_stride + i / kWordBits, digits[digit]);
    }
  }
#pragma GCC unroll 8
  for (int digit = 0; digit < kDigits; ++digit)
    if (digit < bits)
      counts[digit_of_plane(kKind, bits, digit)] += static_cast<int32_t>(_mm512_reduce_add_epi64(ones[digit]));
  return i;
#else
  return 0;
#endif
}

#if defined(__AVX512F__)
// A function of its own: the loop that seldom calls it needs all registers.
[[gnu::noinline]] void quantize_pack_special_block(const Half* x, const GridVec& grid, const Vec& levels, int bits,
                                                   int32_t* planes, int64_t plane_stride, int32_t* counts) {
  quantize_pack_blocks<Kind::kUniform, 4>(x, kBlock, grid, levels, bits, planes, plane_stride, counts);
}

// The same by lines; blocks with a number that is not finite as above.
int64_t quantize_pack_by_lines(const HalfLines& lines, const Half* x, int64_t n, GridVec grid, Vec levels, int bits,
                               int32_t* planes, int64_t plane_stride, int32_t* counts) {
  __m512i ones[HalfLines::kMostBits] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m512i rows[kMaxBits], digits[HalfLines::kMostBits], specials = _mm512_setzero_si512();
#pragma GCC unroll 8
    for (int row = 0; row < kMaxBits; ++row) {
      const Half* const at = x + i + row * kBytes;
      const __m512i low = lines.positions(load_bits(at), specials);
      rows[row] = split_positions(low, lines.positions(load_bits(at + kBytes / 2), specials));
    }
    if (HalfLines::any_special(specials)) {
      quantize_pack_special_block(x + i, grid, levels, bits, planes + i / kWordBits, plane_stride, counts);
      continue;
    }
    gather_four_digits(rows, 8 - bits, digits);
#pragma GCC unroll 4
    for (int digit = 0; digit < HalfLines::kMostBits; ++digit) {
      if (digit >= bits) continue;
      if (digit == bits - 1) digits[digit] = ~digits[digit];  // positions are less 2^15
      ones[digit] = _mm512_add_epi64(ones[digit], _mm512_popcnt_epi64(digits[digit]));
      _mm512_storeu_si512(planes + (bits - 1 - digit) * plane_stride + i / kWordBits, digits[digit]);
    }
  }
#pragma GCC unroll 4
  for (int digit = 0; digit < HalfLines::kMostBits; ++digit)
    if (digit < bits) counts[bits - 1 - digit] += static_cast<int32_t>(_mm512_reduce_add_epi64(ones[digit]));
  return i;
}

// Where one grid serves so many numbers that they are worth the search for lines.
std::optional<HalfLines> lines_for(const QuantizePackArgs& args) {
  constexpr int64_t kFewest = 1 << 17;
  const bool one_grid = !args.per_row || args.rows == 1, all_codes = args.levels == (1 << args.bits) - 1;
  if (!one_grid || !all_codes || args.bits > HalfLines::kMostBits || args.rows * args.columns < kFewest) return std::nullopt;
  return HalfLines::fit(args.grid, args.bits);
}
#endif

void unpack_codes(const int32_t* planes, int64_t plane_stride, int64_t n, Kind kind, int bits, uint8_t* codes) {
  for (int64_t i = 0; i < n; i += kBytes) {
    const int length = static_cast<int>(std::min<int64_t>(kBytes, n - i));
    const size_t size = (length + kWordBits - 1) / kWordBits * sizeof(int32_t);
    Bytes sum = zero_bytes();
    for (int plane = 0; plane < bits; ++plane) {
      Word word = 0;
      std::memcpy(&word, planes + plane * plane_stride + i / kWordBits, length == kBytes ? sizeof word : size);
      sum = add_where(sum, word, plane_weight(kind, bits, plane));
    }
    store_bytes(codes + i, sum, length);
  }
}

// body(row, begin, n): parts of rows, in parallel, cut at whole chunks.
template <class F>
void for_each_part(int64_t rows, int64_t columns, const F& body) {
  const int64_t chunks = (columns + kChunk - 1) / kChunk;
  const int64_t grain = std::max<int64_t>(1, kGrainCodes / std::min(std::max<int64_t>(columns, 1), kChunk));
  parallel_for(rows * chunks, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last;) {
      const int64_t row = unit / chunks, of_row = std::min(last, (row + 1) * chunks) - unit;
      const int64_t begin = unit % chunks * kChunk;
      body(row, begin, std::min(of_row * kChunk, columns - begin));
      unit += of_row;
    }
  });
}

// body(begin, n): the chunks of n codes.
template <class F>
void for_each_chunk(int64_t n, const F& body) {
  for (int64_t begin = 0; begin < n; begin += kChunk) body(begin, std::min(kChunk, n - begin));
}

// blocks: quantize_pack_blocks() or what does the same.
template <Kind kKind, class T, class Blocks>
void quantize_pack_part(const QuantizePackArgs& args, const GridVec& grid, const Blocks& blocks, int64_t row, int64_t begin,
                        int64_t n) {
  const T* const x = static_cast<const T*>(args.x) + row * args.columns + begin;
  const Vec levels = splat(static_cast<float>(args.levels));
  int32_t* const planes = args.planes + row * args.words + begin / kWordBits;
  const int64_t plane_stride = args.rows * args.words;
  int32_t counts[kMaxBits] = {};
  const int64_t done = blocks(x, n, grid, levels, args.bits, planes, plane_stride, counts);
  for_each_chunk(n - done, [&](int64_t chunk, int64_t length) {
    uint8_t codes[kChunk];
    run_piece(Encode<kKind, T>{x + done + chunk, codes, levels}, grid, 0, length, nullptr);
    pack_codes(codes, length, kKind, args.bits, planes + (done + chunk) / kWordBits, plane_stride, counts);
  });
  for (int plane = 0; plane < args.bits; ++plane) {
    int32_t& sum = args.plane_sums[plane * args.rows + row];
    if (n == args.columns) {
      sum = counts[plane];
    } else {  // integers: exact in whatever order the parts of a row come
      std::atomic_ref<int32_t>(sum).fetch_add(counts[plane], std::memory_order_relaxed);
    }
  }
}

}  // namespace

void encode(const EncodeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const ChannelTable table = grid_table(args.layout, walk, args.grid);
  const Vec levels = splat(static_cast<float>(args.levels));
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      traverse(args.layout, walk, table, Encode<kKind, T>{static_cast<const T*>(args.x), args.codes, levels});
    });
  });
}

void pack_bitplanes(const PackArgs& args) {
  for_each_part(args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t n) {
    int32_t counts[kMaxBits] = {};
    const uint8_t* const codes = args.codes + row * args.columns + begin;
    int32_t* const planes = args.planes + row * args.words + begin / kWordBits;
    for_each_chunk(n, [&](int64_t chunk, int64_t length) {
      pack_codes(codes + chunk, length, args.kind, args.bits, planes + chunk / kWordBits, args.rows * args.words, counts);
    });
  });
}

void unpack_bitplanes(const UnpackArgs& args) {
  for_each_part(args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t n) {
    unpack_codes(args.planes + row * args.words + begin / kWordBits, args.rows * args.words, n, args.kind, args.bits,
                 args.codes + row * args.columns + begin);
  });
}

void quantize_pack(const QuantizePackArgs& args) {
  std::fill_n(args.plane_sums, args.bits * args.rows, 0);
  const Layout grids{1, args.per_row ? args.rows : 1, args.columns};
  const ChannelTable table = grid_table(grids, Walk{}, args.grid);  // an entry a row, however short rows are
  with_type(args.dtype, [&]<class T>(T*) {
    with_kind(args.kind, [&]<Kind kKind>() {
      const auto pack = [&](const auto& blocks) {
        for_each_part(args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t n) {
          const int64_t channel = args.per_row ? row : 0;
          const GridVec grid = grid_params([&](int field) { return table.of_channel(field, channel); });
          quantize_pack_part<kKind, T>(args, grid, blocks, row, begin, n);
        });
      };
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<T, Half> && kKind == Kind::kUniform)
        if (const std::optional<HalfLines> lines = lines_for(args))
          return pack([&](auto... block) { return quantize_pack_by_lines(*lines, block...); });
#endif
      pack(args.bits > 4 ? quantize_pack_blocks<kKind, 8, T> : quantize_pack_blocks<kKind, 4, T>);
    });
  });
}

}  // namespace qk::cpu::QK_CPU_ISA

// Codes, and their bits as planes of words: csrc/core/bitplanes.h says which bit goes where.

#include "core/bitplanes.h"

#include <atomic>
#include <bit>
#include <optional>
#include <type_traits>

#include "cpu/bitplanes.h"
#include "cpu/encoder.h"
#include "cpu/half_cells.h"
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

#if defined(__AVX512F__)
// As many of the first n values as are whole blocks, from floats to planes; returns how many. row(i): bits of values i to
// i + 63, as split_values() makes them. Adds the ones to counts[bits], bits <= kDigits.
template <Kind kKind, int kDigits, class Row>
QK_INLINED inline int64_t quantize_pack_rows(const Row& row, int64_t n, int bits, int32_t* planes, int64_t plane_stride,
                                             int32_t* counts) {
  __m512i ones[kDigits] = {};
  int64_t i = 0;
  for (; i + kBlock <= n; i += kBlock) {
    __m512i rows[kMaxBits], digits[kDigits];
#pragma GCC unroll 8
    for (int r = 0; r < kMaxBits; ++r) rows[r] = row(i + r * kBytes);
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
}

template <int kInACell>
int64_t quantize_pack_by_cells(const HalfCells& of_grid, const Half* x, int64_t n, int bits, int32_t* planes,
                               int64_t plane_stride, int32_t* counts) {
  const HalfCells cells = of_grid;  // a copy that stores cannot alias
  const auto row = [&](int64_t i) QK_INLINED { return transposed_bits(cells.codes<kInACell>(x + i)); };
  return quantize_pack_rows<Kind::kUniform, HalfCells::kMostBits>(row, n, bits, planes, plane_stride, counts);
}

int64_t quantize_pack_by_cells(const HalfCells& cells, const Half* x, int64_t n, int bits, int32_t* planes,
                               int64_t plane_stride, int32_t* counts) {
  const int most = cells.most_in_a_cell();
  const auto run = most == 1 ? quantize_pack_by_cells<1> : most == 2 ? quantize_pack_by_cells<2> : quantize_pack_by_cells<3>;
  return run(cells, x, n, bits, planes, plane_stride, counts);
}
#endif

// As many of the first n values as are whole blocks, where the instruction set has them.
template <Kind kKind, int kDigits, class T>
int64_t quantize_pack_blocks([[maybe_unused]] const T* x, [[maybe_unused]] int64_t n, [[maybe_unused]] GridVec grid,
                             [[maybe_unused]] Vec levels, [[maybe_unused]] int bits, [[maybe_unused]] int32_t* planes,
                             [[maybe_unused]] int64_t plane_stride, [[maybe_unused]] int32_t* counts) {
#if defined(__AVX512F__)
  const auto row = [&](int64_t i) QK_INLINED {
    Vec values[4];
    load_block(x + i, values);
#pragma GCC unroll 4
    for (Vec& value : values) value = unclamped_code<kKind>(value, grid, levels);
    return split_values<T>(values);
  };
  return quantize_pack_rows<kKind, kDigits>(row, n, bits, planes, plane_stride, counts);
#else
  return 0;
#endif
}

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

// What quantize_pack makes of a grid, once for all rows that share it.
struct RowGrid {
  GridVec grid;
#if defined(__AVX512F__)
  std::optional<HalfCells> cells;
#endif
};

template <Kind kKind, class T>
RowGrid row_grid([[maybe_unused]] const QuantizePackArgs& args, const ChannelTable& table, int64_t channel) {
  RowGrid made;
  made.grid = grid_params([&](int field) { return table.of_channel(field, channel); });
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Half> && kKind == Kind::kUniform) {
    constexpr int64_t kFewest = 1024;  // numbers that are worth a search for cells
    const bool all_codes = args.levels == (1 << args.bits) - 1;
    const int64_t numbers = (args.per_row ? 1 : args.rows) * args.columns;
    if (all_codes && args.bits <= HalfCells::kMostBits && numbers >= kFewest)
      made.cells = HalfCells::fit(made.grid, args.bits);
  }
#endif
  return made;
}

// The part of a row that goes by whole blocks; returns how many of its n elements.
template <Kind kKind, class T>
int64_t quantize_pack_whole(const RowGrid& of_row, const T* x, int64_t n, Vec levels, int bits, int32_t* planes,
                            int64_t plane_stride, int32_t* counts) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, Half>)
    if (of_row.cells) return quantize_pack_by_cells(*of_row.cells, x, n, bits, planes, plane_stride, counts);
#endif
  const auto run = bits > 4 ? quantize_pack_blocks<kKind, 8, T> : quantize_pack_blocks<kKind, 4, T>;
  return run(x, n, of_row.grid, levels, bits, planes, plane_stride, counts);
}

template <Kind kKind, class T>
void quantize_pack_part(const QuantizePackArgs& args, const RowGrid& of_row, int64_t row, int64_t begin, int64_t n) {
  const T* const x = static_cast<const T*>(args.x) + row * args.columns + begin;
  const Vec levels = splat(static_cast<float>(args.levels));
  int32_t* const planes = args.planes + row * args.words + begin / kWordBits;
  const int64_t plane_stride = args.rows * args.words;
  int32_t counts[kMaxBits] = {};
  const int64_t done = quantize_pack_whole<kKind>(of_row, x, n, levels, args.bits, planes, plane_stride, counts);
  for_each_chunk(n - done, [&](int64_t chunk, int64_t length) {
    uint8_t codes[kChunk];
    run_piece(Encode<kKind, T>{x + done + chunk, codes, levels}, of_row.grid, 0, length, nullptr);
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
      const auto grid_of = [&](int64_t row) { return row_grid<kKind, T>(args, table, row); };
      const RowGrid shared = args.per_row ? RowGrid{} : grid_of(0);
      for_each_part(args.rows, args.columns, [&](int64_t row, int64_t begin, int64_t n) {
        if (args.per_row) return quantize_pack_part<kKind, T>(args, grid_of(row), row, begin, n);
        quantize_pack_part<kKind, T>(args, shared, row, begin, n);
      });
    });
  });
}

}  // namespace qk::cpu::QK_CPU_ISA

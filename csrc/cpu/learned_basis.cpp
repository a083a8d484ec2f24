// q = the nearest level of a learned basis, and what the next basis is made of (LQ-Nets, QEM): B B^T and B x, in one pass.
//
// A digit e_j of the code is looked up like the level itself, so that B B^T takes a multiply-add an entry of its upper
// triangle. Its sums are whole numbers, exact while a partial sum has fewer than 2^24 terms.

#include "cpu/learned_basis.h"

#include <bit>

#include "cpu/grid.h"
#include "cpu/levels.h"

namespace qk::cpu::QK_CPU_ISA {
namespace {

// Where the levels are looked up: in registers, of the one channel of a run; among vectors, of the columns' channels; or, of
// any number of bits, in memory, lane by lane.
enum class Lookup { kRegisters, kColumns, kMemory };

// For lookups in registers and memory: the channel travels through the ChannelTable as the bits of an int.
ChannelTable channel_numbers(const Layout& layout, const Walk& walk) {
  return ChannelTable(layout, walk, 1, [&](const auto& field) {
    for (int64_t c = 0; c < layout.channels; ++c) field(0)[c] = std::bit_cast<float>(static_cast<int32_t>(c));
  });
}

// For lookups among columns: the first `fields` fields of the channels' tables.
ChannelTable column_tables(const Layout& layout, const Walk& walk, const LevelTables& tables, int bits, int fields) {
  const int entries = level_entries(bits), leaves = 1 << bits;
  return ChannelTable(layout, walk, fields * entries, [&](const auto& field) {
    const auto copy = [&](int at) {
      float* const to = field(at);
      for (int64_t c = 0; c < layout.channels; ++c) to[c] = tables.of(c)[at];
    };
    for (int node = 1; node < leaves; ++node) copy(kThresholds * entries + node);
    for (int f = 1; f < fields; ++f)
      for (int leaf = leaves; leaf < 2 * leaves; ++leaf) copy(f * entries + (leaf & (entries - 1)));
  });
}

template <Lookup kLookup, int kBits>
auto levels_of_channels(const LevelTables& tables, int bits, Vec channels) {
  float lanes[kLanes];
  store(lanes, channels);
  if constexpr (kLookup == Lookup::kRegisters) {
    return SharedLevels<kBits>(tables.of(std::bit_cast<int32_t>(lanes[0])));
  } else {
    LaneLevels levels{};
    levels.count = bits;
    for (int lane = 0; lane < kLanes; ++lane) levels.table[lane] = tables.of(std::bit_cast<int32_t>(lanes[lane]));
    return levels;
  }
}

enum class Result { kValues, kMoments, kCodes };  // kMoments: values as well

// kBits: 0 where levels are looked up in memory.
template <Lookup kLookup, int kBits, Result kResult, class T>
struct Forward {
  static constexpr int kRoom = kBits ? kBits : kMaxBits;  // digits that there are accumulators for
  static constexpr int kFirstField = kResult == Result::kCodes ? kCodes : kLevels;
  static constexpr int kFields = kResult == Result::kMoments ? 1 + kBits : 1;
  static constexpr int kSums = kResult == Result::kMoments ? moment_sums(kRoom) : 0;
  using Out = std::conditional_t<kResult == Result::kCodes, uint8_t*, Results<T>>;
  const T* x;
  Out out;
  const LevelTables& tables;
  int bits;

  template <class Field>
  auto params(Field field) const {
    if constexpr (kLookup == Lookup::kColumns) {
      return ColumnLevels<kBits, kFirstField, kFields>(field);
    } else {
      return levels_of_channels<kLookup, kBits>(tables, bits, field(0));
    }
  }

  template <class Lanes, class Levels>
  void operator()(int64_t i, Lanes lanes, const Levels& levels, Vec* sums) const {
    const Vec value = load(x + i, lanes);
    const auto leaf = nearest(value, levels);
    if constexpr (kResult == Result::kCodes) {
      store_codes(out + i, levels(kCodes, leaf), lanes);
    } else {
      out.put(i, levels(kLevels, leaf), lanes);
    }
    if constexpr (kResult == Result::kMoments) {
      Vec digit[kRoom];
      unrolled<kRoom>([&](int j) { digit[j] = j < levels.bits() ? levels(kDigits + j, leaf) : splat(0.0f); });
      int s = 0;
#pragma GCC unroll 8
      for (int a = 0; a < kRoom; ++a)
#pragma GCC unroll 8
        for (int b = a; b < kRoom; ++b, ++s) sums[s] = multiply_add(digit[a], digit[b], sums[s]);
      unrolled<kRoom>(
          [&](int j) { sums[gram_sums(kRoom) + j] = multiply_add(digit[j], value, sums[gram_sums(kRoom) + j]); });
    }
  }
};

// g where x is not above the top level.
template <class T>
struct Backward {
  static constexpr int kSums = 0;
  const T* grad;
  const T* x;
  Results<T> out;

  template <class Field>
  Vec params(Field field) const {
    return field(0);
  }

  template <class Lanes>
  void operator()(int64_t i, Lanes lanes, Vec top, Vec*) const {
    out.put_where(i, less_equal(load(x + i, lanes), top), grad + i, lanes);
  }
};

// [channels, 1 + bits]
std::vector<float> rows_of(const LearnedBasisArgs& args) {
  std::vector<float> rows(args.layout.channels * (1 + args.bits));
  for (int64_t c = 0; c < args.layout.channels; ++c)
    row_of_basis(args.basis + c * args.bits, args.bits, args.encoding, &rows[c * (1 + args.bits)]);
  return rows;
}

// totals: the accumulators of Forward, [moment_sums(room)][channels].
void put_moments(const LearnedBasisArgs& args, int room, const std::vector<double>& totals) {
  const int n = args.bits;
  const int64_t channels = args.layout.channels;
  for (int64_t c = 0; c < channels; ++c) {
    float* const gram = args.gram + c * n * n;
    const double* total = &totals[c];
    for (int i = 0; i < room; ++i)
      for (int j = i; j < room; ++j, total += channels)
        if (j < n) gram[i * n + j] = gram[j * n + i] = static_cast<float>(*total);
    for (int i = 0; i < n; ++i, total += channels) args.product[c * n + i] = static_cast<float>(*total);
  }
}

// The last one in the order of levels.
float top_level(const float* row, int bits) {
  int top = 0;
  for (int code = 1; code < 1 << bits; ++code)
    if (comes_before(level_of(row, top), top, level_of(row, code), code)) top = code;
  return level_of(row, top);
}

// Calls f.template operator()<kLookup, kBits>().
template <class F>
void with_lookup(const Walk& walk, int bits, const F& f) {
  with_table_bits(bits, [&]<int kBits>() {
    if constexpr (kBits == 0) {
      f.template operator()<Lookup::kMemory, 0>();
    } else {
      walk.by_columns ? f.template operator()<Lookup::kColumns, kBits>()
                      : f.template operator()<Lookup::kRegisters, kBits>();
    }
  });
}

// Returns the accumulators.
template <Lookup kLookup, int kBits, Result kResult, class T, class Out>
std::vector<double> run(const Layout& layout, const T* x, const Out& out, const LevelTables& tables, int bits) {
  using Op = Forward<kLookup, kBits, kResult, T>;
  const Walk walk = walk_of(layout);
  const Op op{x, out, tables, bits};
  std::vector<double> totals(Op::kSums * layout.channels);
  if constexpr (kLookup == Lookup::kColumns) {
    const ChannelTable table = column_tables(layout, walk, tables, bits, Op::kFirstField + Op::kFields);
    traverse_columns(layout, walk, table, op, totals.data());
  } else {
    const ChannelTable table = channel_numbers(layout, walk);
    if constexpr (kLookup == Lookup::kMemory)
      if (walk.by_columns) {
        traverse_columns(layout, walk, table, op, totals.data());
        return totals;
      }
    traverse_runs(layout, walk, table, op, totals.data());
  }
  return totals;
}

}  // namespace

void learned_basis_forward(const LearnedBasisArgs& args) {
  const Walk walk = walk_of(args.layout);
  const auto rows = rows_of(args);
  const LevelTables tables(rows.data(), args.layout.channels, args.bits, args.encoding);
  with_type(args.dtype, [&]<class T>(T*) {
    const Results<T> out(args.out, args.layout, walk,
                         kInPairs<T> && no_subnormals(rows.data(), args.layout.channels * (1 + args.bits)));
    const T* const x = static_cast<const T*>(args.x);
    with_lookup(walk, args.bits, [&]<Lookup kLookup, int kBits>() {
      if (args.gram) {
        constexpr int kRoom = Forward<kLookup, kBits, Result::kMoments, T>::kRoom;
        put_moments(args, kRoom, run<kLookup, kBits, Result::kMoments>(args.layout, x, out, tables, args.bits));
      } else {
        run<kLookup, kBits, Result::kValues>(args.layout, x, out, tables, args.bits);
      }
    });
  });
}

void learned_basis_encode(const LearnedEncodeArgs& args) {
  const Walk walk = walk_of(args.layout);
  const LevelTables tables(args.grid, args.layout.channels, args.bits, Encoding::kUnsigned);
  with_type(args.dtype, [&]<class T>(T*) {
    const T* const x = static_cast<const T*>(args.x);
    with_lookup(walk, args.bits, [&]<Lookup kLookup, int kBits>() {
      run<kLookup, kBits, Result::kCodes>(args.layout, x, args.codes, tables, args.bits);
    });
  });
}

void learned_basis_backward(const LearnedBasisArgs& args) {
  const Walk walk = walk_of(args.layout);
  const std::vector<float> rows = rows_of(args);
  const ChannelTable limits(args.layout, walk, 1, [&](const auto& field) {
    for (int64_t c = 0; c < args.layout.channels; ++c) field(0)[c] = top_level(&rows[c * (1 + args.bits)], args.bits);
  });
  with_type(args.dtype, [&]<class T>(T*) {
    traverse(args.layout, walk, limits,
             Backward<T>{static_cast<const T*>(args.grad), static_cast<const T*>(args.x),
                         Results<T>(args.out, args.layout, walk)});
  });
}

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
// The nearest of 2^n levels, in every lane: n steps down the search tree of core/learned_basis.h, a look into a table each.

#include <algorithm>
#include <utility>

#include "core/learned_basis.h"
#include "cpu/buffer.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

// A node of the tree in each lane.
struct Nodes {
  int32_t v[kLanes];
};

// A table of 8 or 16 floats that lanes look into: table[node] is entry `node` modulo kEntries. It lives in registers where
// the instruction set permutes across them.
template <int kEntries>
struct Table;

#if defined(__AVX512F__)

struct Index {
  __m512i v;
};
inline Index root() { return {_mm512_set1_epi32(1)}; }
// The right child where m, else the left one.
inline Index child(Index i, Mask m) {
  const __m512i left = _mm512_add_epi32(i.v, i.v);
  return {_mm512_mask_or_epi32(left, m, left, _mm512_set1_epi32(1))};
}
inline Nodes nodes_of(Index i) {
  Nodes nodes;
  _mm512_storeu_si512(nodes.v, i.v);
  return nodes;
}
template <>
struct Table<8> {
  __m512 v;
  Table() = default;
  explicit Table(const float* p) : v(_mm512_broadcast_f32x8(_mm256_loadu_ps(p))) {}
  Vec operator[](Index i) const { return {_mm512_permutexvar_ps(i.v, v)}; }
};
template <>
struct Table<16> {
  __m512 v;
  Table() = default;
  explicit Table(const float* p) : v(_mm512_loadu_ps(p)) {}
  Vec operator[](Index i) const { return {_mm512_permutexvar_ps(i.v, v)}; }
};

#elif defined(__AVX2__)

struct Index {
  __m256i v;
};
inline Index root() { return {_mm256_set1_epi32(1)}; }
inline Index child(Index i, Mask m) { return {_mm256_sub_epi32(_mm256_add_epi32(i.v, i.v), _mm256_castps_si256(m))}; }
inline Nodes nodes_of(Index i) {
  Nodes nodes;
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(nodes.v), i.v);
  return nodes;
}
template <>
struct Table<8> {
  __m256 v;
  Table() = default;
  explicit Table(const float* p) : v(_mm256_loadu_ps(p)) {}
  Vec operator[](Index i) const { return {_mm256_permutevar8x32_ps(v, i.v)}; }
};
template <>
struct Table<16> {
  __m256 low, high;
  Table() = default;
  explicit Table(const float* p) : low(_mm256_loadu_ps(p)), high(_mm256_loadu_ps(p + 8)) {}
  Vec operator[](Index i) const {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(i.v, 28));  // bit 3 becomes the sign, which selects
    return {_mm256_blendv_ps(_mm256_permutevar8x32_ps(low, i.v), _mm256_permutevar8x32_ps(high, i.v), upper)};
  }
};

#else

using Index = Nodes;
inline Index root() {
  Index r;
  for (int32_t& node : r.v) node = 1;
  return r;
}
inline Index child(Index i, Mask m) {
  for (int lane = 0; lane < kLanes; ++lane) i.v[lane] = 2 * i.v[lane] + (m.v[lane] & 1);
  return i;
}
inline Nodes nodes_of(Index i) { return i; }
template <int kEntries>
struct Table {
  const float* p;
  Table() = default;
  explicit Table(const float* p) : p(p) {}
  Vec operator[](Index i) const {
    const Nodes at = nodes_of(i);
    float values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = p[at.v[lane] & (kEntries - 1)];
    return load(values);
  }
};

#endif

// What a channel's tables hold, each by node of the tree, modulo their size: thresholds by inner nodes, the others by
// leaves.
enum LevelField : int { kThresholds, kCodes, kLevels, kDigits };  // kDigits + j: e_j

inline constexpr int kMaxTableBits = 4;  // beyond it tables stay in memory
inline constexpr int level_entries(int bits) { return bits <= 3 ? 8 : 1 << bits; }

// Calls f.template operator()<kBits>() with 1 to kMaxTableBits bits, or with 0 for more.
template <class F>
inline void with_table_bits(int bits, const F& f) {
  switch (bits) {
    case 1:
      return f.template operator()<1>();
    case 2:
      return f.template operator()<2>();
    case 3:
      return f.template operator()<3>();
    case 4:
      return f.template operator()<4>();
    default:
      return f.template operator()<0>();
  }
}

class LevelTables {
 public:
  // rows [channels, 1 + bits]: offset and steps, as row_of_basis makes them.
  LevelTables(const float* rows, int64_t channels, int bits, Encoding encoding)
      : entries_(level_entries(bits)), stride_((kDigits + bits) * entries_), values_(channels * stride_) {
    with_table_bits(bits, [&]<int kBits>() {
      // Mostly by the thread that will use them.
      parallel_for(channels, 64, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c)
          fill(rows + c * (1 + bits), kBits ? kBits : bits, encoding, values_.data() + c * stride_);
      });
    });
  }

  // [fields][entries]
  const float* of(int64_t channel) const { return values_.data() + channel * stride_; }

 private:
  QK_INLINED void fill(const float* row, int bits, Encoding encoding, float* table) const {
    float levels[kMaxLearnedLevels];
    int codes[kMaxLearnedLevels];
    const int count = 1 << bits;
    for (int code = 0; code < count; ++code) {
      const float level = level_of(row, code);
      int rank = code;  // levels come nearly sorted: insertion
      for (; rank > 0 && comes_before(level, code, levels[rank - 1], codes[rank - 1]); --rank) {
        levels[rank] = levels[rank - 1];
        codes[rank] = codes[rank - 1];
      }
      levels[rank] = level;
      codes[rank] = code;
    }
    std::fill_n(table, stride_, 0.0f);
    for (int rank = 1; rank < count; ++rank)
      table[kThresholds * entries_ + node_below(rank, count)] = midpoint(levels[rank - 1], levels[rank]);
    for (int rank = 0; rank < count; ++rank) {
      float* const leaf = table + ((count + rank) & (entries_ - 1));
      leaf[kLevels * entries_] = levels[rank];
      leaf[kCodes * entries_] = static_cast<float>(codes[rank]);
      for (int j = 0; j < bits; ++j) leaf[(kDigits + j) * entries_] = digit_of(codes[rank], j, encoding);
    }
  }

  int64_t entries_, stride_;
  Buffer<float> values_;
};

// One channel for all lanes.
template <int kBits>
struct SharedLevels {
  using One = Table<level_entries(kBits)>;
  One field[kDigits + kBits];

  explicit SharedLevels(const float* table) {
    for (int f = 0; f < kDigits + kBits; ++f) field[f] = One(table + f * level_entries(kBits));
  }
  static constexpr int kMost = kBits;
  static constexpr int bits() { return kBits; }
  Vec operator()(int f, Index i) const { return field[f][i]; }
};

// A channel of its own for each lane: vectors of what the channels have at one place of the tree, and a lookup selects among
// them. Of the fields of leaves there are kCount, from kFirst on.
template <int kBits, int kFirst, int kCount>
struct ColumnLevels {
  static constexpr int kMost = kBits;
  static constexpr int kLeaves = 1 << kBits;
  struct Path {
    Mask right[kBits];  // at each depth
  };
  Vec threshold[kLeaves];  // by node; there is no node 0
  Vec leaf[kCount][kLeaves];

  ColumnLevels() = default;
  // field(f * level_entries(kBits) + node): what the tables of the lanes' channels hold.
  template <class Field>
  explicit ColumnLevels(Field field) {
    constexpr int kEntries = level_entries(kBits);
    threshold[0] = splat(0.0f);
    for (int node = 1; node < kLeaves; ++node) threshold[node] = field(kThresholds * kEntries + node);
    for (int f = 0; f < kCount; ++f)
      for (int rank = 0; rank < kLeaves; ++rank)
        leaf[f][rank] = field((kFirst + f) * kEntries + ((kLeaves + rank) & (kEntries - 1)));
  }
  static constexpr int bits() { return kBits; }
  Vec operator()(int f, const Path& path) const { return chosen<kBits>(leaf[f - kFirst], path); }

  // Of the 2^kDepth nodes at one depth, the one that the path leads to.
  template <int kDepth>
  static Vec chosen(const Vec* nodes, const Path& path) {
    if constexpr (kDepth == 0) {
      return nodes[0];
    } else {
      constexpr int kHalf = 1 << (kDepth - 1);
      Vec below[kHalf];
#pragma GCC unroll 8
      for (int i = 0; i < kHalf; ++i) below[i] = select(path.right[kDepth - 1], nodes[2 * i + 1], nodes[2 * i]);
      return chosen<kDepth - 1>(below, path);
    }
  }
};

template <int kBits, int kFirst, int kCount>
inline auto nearest(Vec x, const ColumnLevels<kBits, kFirst, kCount>& levels) {
  typename ColumnLevels<kBits, kFirst, kCount>::Path path;
  [&]<int... kDepth>(std::integer_sequence<int, kDepth...>) {
    ((path.right[kDepth] = less(levels.template chosen<kDepth>(levels.threshold + (1 << kDepth), path), x)), ...);
  }(std::make_integer_sequence<int, kBits>{});
  return path;
}

// A channel of its own for each lane, any number of bits. Seldom, so one piece of code does.
struct LaneLevels {
  static constexpr int kMost = kMaxBits;
  const float* table[kLanes];
  int count;

  int bits() const { return count; }
  Vec operator()(int f, Index i) const {
    const Nodes at = nodes_of(i);
    const int entries = level_entries(count);
    float values[kLanes];
    for (int lane = 0; lane < kLanes; ++lane) values[lane] = table[lane][f * entries + (at.v[lane] & (entries - 1))];
    return load(values);
  }
};

// One table in all lanes, for kBits as with_table_bits gives it.
template <int kBits>
auto levels_for_all(const float* table, int bits) {
  if constexpr (kBits > 0) {
    return SharedLevels<kBits>(table);
  } else {
    LaneLevels levels{};
    levels.count = bits;
    std::fill_n(levels.table, kLanes, table);
    return levels;
  }
}

// The leaf of the nearest level; that of a NaN is the lowest.
template <class Levels>
inline Index nearest(Vec x, const Levels& levels) {
  Index node = root();
#pragma GCC unroll 8
  for (int depth = 0; depth < Levels::kMost; ++depth)
    if (depth < levels.bits()) node = child(node, less(levels(kThresholds, node), x));
  return node;
}

}  // namespace qk::cpu::QK_CPU_ISA

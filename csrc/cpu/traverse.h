#pragma once
// How an element-wise kernel walks a tensor seen as [outer, channels, inner], in parallel, without knowing what it computes.
//
// Runs: inner is long, so a channel's parameters are broadcast once and used for a whole run.
// Columns: channels are innermost (channels_last) or runs are short and come again many times, so parameters change from
// lane to lane: they are expanded once to one table entry a column, and several rows share each load of them.
//
// An Op loads, computes and stores one vector of elements:
//   static constexpr int kSums                     accumulators a channel, 0 for none
//   static constexpr Combine combine(int s)        optional; without it every accumulator is a sum
//   Params params(field)                           field(f) gives column f of the ChannelTable for the lanes at hand
//   void operator()(int64_t i, Lanes, const Params&, Vec* sums)      elements [i, i + lanes): Whole{} or First{n}
// It may also take two vectors at a time, where kSums is 0:
//   void pair(int64_t i, const Params& low, const Params& high)     elements [i, i + 2 * kLanes)
// or as many as it likes, in runs:
//   int64_t run(int64_t i, int64_t end, const Params&)              elements [i, r); returns r <= end
// or, of half types, two vectors in the order of TwoVecs, with accumulators of a form of its own that begin empty:
//   struct Pairs { bool settled() const; }         optional; settled: from here on less work will do for finish(), and
//                                                  settled_together(): for totals()
//   template <bool kSettled> void add(int64_t i, const Params& first, const Params& second, Pairs&) const
//   void finish(const Pairs&, Vec (&sums)[2][kSums + 1]) const      of at least one add: as operator() would have them
//   void totals(const Pairs&, float* of_run) const                  optional; the same across lanes, [kSums]
//   template <Reach> void prefetch_pair(int64_t i) const         elements [i, i + 2 * kLanes); without it in runs alone
// It may take the totals of its channels itself, in whatever thread has them first:
//   void finish_channel(int64_t channel, const float* totals) const      [kSums]
//   template <int kNext, int kOther> void finish_channels(int64_t channel, const float* totals) const
//                                                  of kLanes channels: total s of channel + c is totals[c * kNext + s *
//                                                  kOther]
// Where it wants no more than totals over all channels, to which each adds by its own parameters, columns need no
// accumulators in memory:
//   static constexpr int kTotals                   how many; traverse() returns them where walk.by_columns
//   void weigh(const Params&, const Vec* sums, Vec* totals) const       adds what accumulators of a vector of columns, of
//                                                  any rows, come to
// In columns it may take the elements of several rows before it stores results, as the processor holds back a load from an
// address whose low 12 bits are those of a store shortly before:
//   auto read(int64_t i, Lanes)                    what operator() loads of elements [i, i + lanes)
//   void write(int64_t i, Lanes, read, const Params&)               and the rest of it; kSums is 0
// or, with accumulators, those of several rows and two vectors before it does more, so that many loads are under way at
// once:
//   void add_up(read, const Params&, Vec* sums)    the rest of operator()
// or say how many rows it takes side by side, where it does better than with rows_together():
//   static constexpr int kRows
// or ask for what it will read where that is far away, which an op of several tensors needs: the rows under way are more
// streams than prefetchers follow:
//   template <Reach> void prefetch(int64_t i) const                 elements [i, i + kLanes)
// Accumulators are reduced in an order that depends on the layout alone, never on the number of threads.

#include <algorithm>
#include <atomic>
#include <limits>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu/blocks.h"
#include "cpu/buffer.h"
#include "cpu/halves.h"
#include "cpu/isa.h"
#include "cpu/parallel.h"

namespace qk::cpu::QK_CPU_ISA {

inline constexpr int64_t kMinRun = 32;           // shorter runs go by columns,
inline constexpr int64_t kMinRows = 8;           // unless too few rows share the tables: then a run of
inline constexpr int64_t kShortRun = 4;          // this length is better off with a partial vector
inline constexpr int64_t kPiece = 1 << 14;       // elements of float32 a task takes at a time: its tensors stay in L2
inline constexpr int64_t kShortRow = 256;        // columns: elements of a row that is repeated until it has as many
inline constexpr int64_t kAskedRows = 28;        // columns: rows that are walked while as many are asked for
inline constexpr int64_t kAskedBytes = 8 << 20;  // in tensors of this size
inline constexpr int64_t kStripRows = 256;       // strips: rows whose accumulators stay in registers, for ops of pairs,
inline constexpr int kRowsAhead = 8;             // how far ahead they are asked for,
inline constexpr int kRowsFarAhead = 48;         // and how far for the second-level cache, which takes more requests at once
inline constexpr int64_t kUnsettledSteps = 16;   // of pairs, after which they are asked whether they are settled,
inline constexpr int64_t kUnsettledTogether = 2;  // or are so together
inline constexpr int64_t kLeastSteps = 3;         // columns: fewer groups of rows than this a block are not taken apart
inline constexpr int64_t kMaxBlocks = 16;         // column blocks of a reduction, each with partial sums of its own
inline constexpr int64_t kMaxBlockRows = 2560;    // on average, so that a float32 partial sum stays accurate
inline constexpr int64_t kStreamBytes = 8 << 20;  // results of this size leave the caches before they are read again
inline constexpr int64_t kStreamAhead = 8 << 10;  // bytes that are asked for ahead of a stream: beyond the page at hand

struct Walk {
  bool by_columns;
  int64_t period;  // columns: entries in a parameter table; runs: unused
  int64_t rows;    // runs: outer * channels; columns: rows of `period`, the last one perhaps partial
  int64_t pieces;  // runs: pieces a run is cut into; columns: blocks of rows of a reduction
  int64_t piece;   // runs: elements a piece; columns: rows a block, on average

  // Columns: where a block begins in `count` rows or groups of rows. Four blocks in turn are as 4, 3, 2 and 1: the last
  // that a thread takes is small, so that nobody waits long for it.
  int64_t begin_of(int64_t block, int64_t count) const {
    return count * before(block) / std::max<int64_t>(before(pieces), 1);
  }

 private:
  static int64_t before(int64_t block) {
    constexpr int64_t kBefore[] = {0, 4, 7, 9};
    return block / 4 * 10 + kBefore[block % 4];
  }
};

inline Walk walk_of(const Layout& layout, DType dtype = DType::kFloat32) {
  Walk walk{};
  const int64_t piece = dtype == DType::kFloat32 ? kPiece : 2 * kPiece;  // as many bytes
  walk.by_columns = layout.channels > 1 && layout.inner < kMinRun && (layout.inner < kShortRun || layout.outer >= kMinRows);
  if (!walk.by_columns) {
    walk.rows = layout.outer * layout.channels;
    walk.piece = std::min(piece, std::max<int64_t>(layout.inner, 1));
    walk.pieces = (layout.inner + walk.piece - 1) / walk.piece;
    return walk;
  }
  const int64_t row = layout.channels * layout.inner;
  // A short row is repeated until it fills whole vectors, so that no row ends in a partial one, and enough of them that the
  // accumulators of one have been stored when they are wanted again.
  const int64_t whole = row * (kLanes / std::gcd<int64_t>(row, kLanes));
  walk.period = row >= kShortRow ? row : whole * ((kShortRow + whole - 1) / whole);
  walk.rows = (layout.numel() + walk.period - 1) / walk.period;
  const int64_t enough = std::max(8 * kPiece / walk.period, std::min(walk.rows / kMaxBlocks, kMaxBlockRows));
  walk.piece = std::max<int64_t>(1, enough);
  walk.pieces = (walk.rows + walk.piece - 1) / walk.piece;
  return walk;
}

// Where an op writes its results. Those that would not stay in the cache until their reader comes are streamed past it: the
// lines need not be read first, and what is in the cache stays there.
template <class T>
struct Results {
  T* data;
  bool streams;
  bool rounds_pairs;  // by one instruction

  // no_subnormals: what will be put is never subnormal.
  Results(void* out, const Layout& layout, const Walk& walk, bool no_subnormals = false)
      : data(static_cast<T*>(out)),
        streams(layout.numel() * static_cast<int64_t>(sizeof(T)) >= kStreamBytes &&
                reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0 &&
                (walk.rows == 1 || (walk.by_columns ? walk.period : layout.inner) % kLanes == 0)),
        rounds_pairs(kInPairs<T> && no_subnormals && rounds_to_bfloat16()) {}

  // Asks for the cache line some way ahead of p, which may lie past the end of the tensor, where results are streamed: into
  // the first-level cache and past the others, for it is not read again before it would have left them.
  QK_INLINED void ask_ahead(const T* p) const {
    if (streams) __builtin_prefetch(reinterpret_cast<const char*>(p) + kStreamAhead, 0, 0);
  }

  void put(int64_t i, Vec v, Whole) const {
#if defined(__AVX512F__)
    if constexpr (kInPairs<T>)
      if (rounds_pairs) return put_half(i, narrow_normal(v));
#endif
    if (streams) {
      stream(data + i, v);
    } else {
      store(data + i, v);
    }
  }
  void put(int64_t i, Vec v, First lanes) const { store(data + i, v, lanes); }
  // Elements from elsewhere, 0 in place of those that are not chosen: where the instruction set can, the bits as they are.
  template <class Lanes>
  void put_where(int64_t i, Mask chosen, const T* from, Lanes lanes) const {
#if defined(__AVX512F__)
    if constexpr (!std::is_same_v<T, float> && std::is_same_v<Lanes, Whole>)
      return put_half(i, _mm256_maskz_loadu_epi16(chosen, from));
#endif
    put(i, keep(chosen, load(from, lanes)), lanes);
  }
#if defined(__AVX512F__)
  // Two vectors of elements of BFloat16 in the order of TwoVecs.
  void put_two(int64_t i, TwoVecs two) const {
    if (rounds_pairs) return put_bits(i, interleaved(narrow_normal(two.first, two.second)));
    const __m512i even = _mm512_srli_epi32(round_to_bfloat16(two.first), 16);
    put_bits(i, _mm512_mask_blend_epi16(0xaaaaaaaa, even, round_to_bfloat16(two.second)));
  }
#endif
  // Two vectors side by side.
  void put_pair(int64_t i, Vec low, Vec high) const {
#if defined(__AVX512F__)
    if constexpr (!std::is_same_v<T, float>) return put_bits(i, narrow_pair(low, high));
#endif
    put(i, low, Whole{});
    put(i + kLanes, high, Whole{});
  }
#if defined(__AVX512F__)
  // Elements of a half type.
  __m512i narrow_pair(Vec low, Vec high) const {
    if constexpr (kInPairs<T>)
      if (rounds_pairs) return narrow_normal(low, high);
    return _mm512_inserti64x4(_mm512_castsi256_si512(narrow(low, data)), narrow(high, data), 1);
  }
  void put_half(int64_t i, __m256i bits) const {
    const auto to = reinterpret_cast<__m256i*>(data + i);
    streams ? _mm256_stream_si256(to, bits) : _mm256_storeu_si256(to, bits);
  }
  void put_bits(int64_t i, __m512i bits) const {
    if (streams) {  // which asks for no more alignment than a vector of T has
      _mm256_stream_si256(reinterpret_cast<__m256i*>(data + i), _mm512_castsi512_si256(bits));
      _mm256_stream_si256(reinterpret_cast<__m256i*>(data + i + kLanes), _mm512_extracti64x4_epi64(bits, 1));
    } else {
      _mm512_storeu_si512(data + i, bits);
    }
  }
#endif
};

// Parameters of the channels. Runs: a field after the other, an entry a channel. Columns: an entry a column, and the fields
// of a vector of columns side by side, for fields that lie 2 KiB apart share eight lines of the first-level cache.
class ChannelTable {
 public:
  // fill(field) writes the channels' values of every field f to field(f)[channel].
  template <class F>
  ChannelTable(const Layout& layout, const Walk& walk, int fields, const F& fill)
      : fields_(fields),
        entries_(walk.by_columns ? (walk.period + kLanes - 1) / kLanes * kLanes : layout.channels),
        values_(fields * entries_) {
    const auto filled = [&](const Buffer<float>& values) {
      fill([&](int field) { return values.data() + field * entries_; });
    };
    if (!walk.by_columns) {
      filled(values_);
      return;
    }
    const Buffer<float> by_field(fields * entries_);
    filled(by_field);
    for (int f = 0; f < fields; ++f) {
      float* const values = by_field.data() + f * entries_;
      expand(layout, walk, values);
      std::fill(values + walk.period, values + entries_, 0.0f);
      for (int64_t column = 0; column < entries_; column += kLanes)
        store(values_.data() + column * fields + f * kLanes, load(values + column));
    }
  }

  Vec of_channel(int field, int64_t c) const { return splat(values_[field * entries_ + c]); }
  // Of the vector of columns that begins with this one.
  Vec of_columns(int field, int64_t column) const { return load(values_.data() + column * fields_ + field * kLanes); }

 private:
  // From a value a channel to a value a column.
  static void expand(const Layout& layout, const Walk& walk, float* values) {
    const int64_t row = layout.channels * layout.inner;
    if (layout.inner > 1)
      for (int64_t c = layout.channels - 1; c >= 0; --c)
        std::fill_n(values + c * layout.inner, layout.inner, float{values[c]});
    for (int64_t at = row; at < walk.period; at += row) std::copy_n(values, row, values + at);
  }

  int64_t fields_, entries_;
  Buffer<float> values_;  // aligned: a load that crosses cache lines costs two
};

// Asks for the cache line of p, which may lie past the end of the tensor: now, or to come as near as the second-level cache.
enum class Reach { kNear, kFar };
template <Reach kReach, class T>
QK_INLINED inline void prefetch_line(const T* p) {
  __builtin_prefetch(p, 0, kReach == Reach::kNear ? 3 : 2);
}

enum class Combine { kSum, kMin, kMax };

template <class Op>
constexpr Combine combine_of(int s) {
  if constexpr (requires { Op::combine(0); }) return Op::combine(s);
  return Combine::kSum;
}

template <class Op>
QK_INLINED inline void reset_sums(Vec* sums) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  unrolled<Op::kSums>([&](int s) QK_INLINED {
    sums[s] = splat(combine_of<Op>(s) == Combine::kSum ? 0.0f : combine_of<Op>(s) == Combine::kMin ? kInfinity : -kInfinity);
  });
}

template <class Op>
QK_INLINED inline void merge_sums(Vec* into, const Vec* from) {
  unrolled<Op::kSums>([&](int s) QK_INLINED {
    into[s] = combine_of<Op>(s) == Combine::kSum   ? into[s] + from[s]
              : combine_of<Op>(s) == Combine::kMin ? min(into[s], from[s])
                                                   : max(into[s], from[s]);
  });
}

template <class Op>
inline float across_lanes(int s, Vec v) {
  return combine_of<Op>(s) == Combine::kSum ? lane_sum(v) : combine_of<Op>(s) == Combine::kMin ? lane_min(v) : lane_max(v);
}

inline double merge(Combine how, double a, double b) {
  return how == Combine::kSum ? a + b : how == Combine::kMin ? std::min(a, b) : std::max(a, b);
}

// The lanes past the end must not reach the accumulators.
template <class Op, class Params>
inline void apply_first(const Op& op, int64_t i, int n, const Params& params, Vec* sums) {
  Vec before[Op::kSums + 1];
  unrolled<Op::kSums>([&](int s) QK_INLINED { before[s] = sums[s]; });
  op(i, First{n}, params, sums);
  unrolled<Op::kSums>([&](int s) QK_INLINED { sums[s] = select(first_lanes(n), sums[s], before[s]); });
}

// Vectors in flight: enough to hide latencies, as far as the accumulators leave registers.
template <class Op>
constexpr int unroll_of() {
  return Op::kSums == 0 ? 4 : Op::kSums * 4 <= kRegisters / 2 ? 4 : Op::kSums * 2 <= kRegisters / 2 ? 2 : 1;
}

template <class Op>
concept TakesPairs = requires { typename Op::Pairs; };

template <class Op>
inline constexpr bool kFinishes = requires(const Op& op, const float* totals) { op.finish_channel(0, totals); };

// `count` steps from i on: each adds kPairs pairs of vectors that lie side by side. ask(i): called before each pair.
template <int kPairs, bool kTogether, class Op, class Params, class Ask>
inline void run_pairs(const Op& op, const Params (&params)[kPairs][2], int64_t i, int64_t stride, int64_t count,
                      typename Op::Pairs* pairs, const Ask& ask) {
  const auto run = [&]<bool kSettled>(int64_t steps) {
#pragma GCC unroll 2
    for (; steps > 0; --steps, i += stride)
      unrolled<kPairs>([&](int p) QK_INLINED {
        ask(i + p * 2 * kLanes);
        op.template add<kSettled>(i + p * 2 * kLanes, params[p][0], params[p][1], pairs[p]);
      });
  };
  if constexpr (requires { pairs->settled(); }) {
    const int64_t first = std::min(count, kTogether ? kUnsettledTogether : kUnsettledSteps);
    run.template operator()<false>(first);
    count -= first;
    bool settled = true;
    for (int p = 0; p < kPairs; ++p) settled = settled && (kTogether ? pairs[p].settled_together() : pairs[p].settled());
    if (settled) return run.template operator()<true>(count);
  }
  run.template operator()<false>(count);
}

// Adds what the pairs have to the sums of two vectors, which may be the same.
template <class Op>
QK_INLINED inline void merge_pairs(const Op& op, const typename Op::Pairs& pairs, Vec* low, Vec* high) {
  if constexpr (Op::kSums > 0) {
    Vec both[2][Op::kSums + 1];
    op.finish(pairs, both);
    merge_sums<Op>(low, both[0]);
    merge_sums<Op>(high, both[1]);
  }
}

// partial: [kSums]
template <class Op, class Params>
inline void run_piece(const Op& shared, const Params& params, int64_t i, int64_t end, float* partial) {
  constexpr int kUnroll = TakesPairs<Op> ? 1 : unroll_of<Op>();
  const Op op = shared;  // vector stores may alias whatever a reference leads to: it would be loaded anew after each
  Vec sums[kUnroll][Op::kSums + 1];
  unrolled<kUnroll>([&](int u) QK_INLINED { reset_sums<Op>(sums[u]); });
  if constexpr (requires { op.run(i, end, params); }) i = op.run(i, end, params);
  if constexpr (TakesPairs<Op>) {
    if (const int64_t count = (end - i) / (2 * kLanes); count > 0) {
      typename Op::Pairs pairs;
      const Params both[1][2] = {{params, params}};
      const bool alone = i + count * 2 * kLanes == end;
      if constexpr (requires { pairs.settled_together(); })
        if (alone) {
          run_pairs<1, true>(op, both, i, 2 * kLanes, count, &pairs, [](int64_t) {});
          return op.totals(pairs, partial);
        }
      run_pairs<1, false>(op, both, i, 2 * kLanes, count, &pairs, [](int64_t) {});
      if constexpr (requires { op.totals(pairs, partial); })
        if (alone) return op.totals(pairs, partial);
      merge_pairs(op, pairs, sums[0], sums[0]);
      i += count * 2 * kLanes;
    }
  }
  for (; i + kUnroll * kLanes <= end; i += kUnroll * kLanes)
    if constexpr (requires { op.pair(i, params, params); }) {
#pragma GCC unroll 2
      for (int u = 0; u < kUnroll; u += 2) op.pair(i + u * kLanes, params, params);
    } else {
      for (int u = 0; u < kUnroll; ++u) op(i + u * kLanes, Whole{}, params, sums[u]);
    }
  for (; i + kLanes <= end; i += kLanes) op(i, Whole{}, params, sums[0]);
  unrolled<kUnroll - 1>([&](int u) QK_INLINED { merge_sums<Op>(sums[0], sums[u + 1]); });
  if (i < end) {
    Vec rest[Op::kSums + 1];  // others are in registers, as nobody asks for their address
    reset_sums<Op>(rest);
    apply_first(op, i, static_cast<int>(end - i), params, rest);
    merge_sums<Op>(sums[0], rest);
  }
  unrolled<Op::kSums>([&](int s) QK_INLINED { partial[s] = across_lanes<Op>(s, sums[0][s]); });
}

// totals: [kSums][channels]
template <class Op>
void traverse_runs(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, double* totals) {
  const int64_t units = walk.rows * walk.pieces;
  std::vector<float> partial(units * Op::kSums);
  parallel_for(units, std::max<int64_t>(1, kPiece / walk.piece), [&](int64_t begin, int64_t end) {
    // Counted along: divisions would hold up the loads of the next run.
    int64_t row = begin / walk.pieces, piece = begin % walk.pieces, channel = row % layout.channels;
    for (int64_t unit = begin; unit < end; ++unit) {
      const int64_t start = piece * walk.piece, i = row * layout.inner + start;
      const auto params = op.params([&](int field) { return table.of_channel(field, channel); });
      run_piece(op, params, i, i + std::min(walk.piece, layout.inner - start), partial.data() + unit * Op::kSums);
      if (++piece < walk.pieces) continue;
      piece = 0;
      ++row;
      if (++channel == layout.channels) channel = 0;
    }
    finish_streams();
  });
  if constexpr (Op::kSums > 0) {
    const float* from = partial.data();
    for (int64_t outer = 0; outer < layout.outer; ++outer)
      for (int64_t c = 0; c < layout.channels; ++c)
        for (int64_t piece = 0; piece < walk.pieces; ++piece, from += Op::kSums)
          unrolled<Op::kSums>([&](int s) QK_INLINED {
            double& total = totals[s * layout.channels + c];
            total = merge(combine_of<Op>(s), total, from[s]);
          });
  }
}

// Where a channel is one piece: its totals go no further than the thread that added them up.
template <class Op>
void traverse_channels(const Layout& layout, const ChannelTable& table, const Op& op) {
  const Buffer<float> totals(layout.channels * Op::kSums);
  parallel_for(layout.channels, std::max<int64_t>(1, kPiece / layout.inner), [&](int64_t begin, int64_t end) {
    for (int64_t channel = begin; channel < end; ++channel) {
      const auto params = op.params([&](int field) { return table.of_channel(field, channel); });
      const int64_t i = channel * layout.inner;
      run_piece(op, params, i, i + layout.inner, totals.data() + channel * Op::kSums);
    }
    // Later: what has just been stored by the number cannot be loaded by the vector.
    int64_t channel = begin;
    for (; channel + kLanes <= end; channel += kLanes)
      op.template finish_channels<Op::kSums, 1>(channel, totals.data() + channel * Op::kSums);
    for (; channel < end; ++channel) op.finish_channel(channel, totals.data() + channel * Op::kSums);
  });
}

// The accumulators of the columns: kSums vectors for each vector of columns, side by side as a strip loads and stores them.
template <class Op>
class ColumnSums {
 public:
  explicit ColumnSums(float* values) : values_(values) {}
  static int64_t size(const Walk& walk) { return (walk.period + kLanes - 1) / kLanes * kLanes * Op::kSums; }

  void empty(const Walk& walk) const {
    Vec sums[Op::kSums + 1];
    reset_sums<Op>(sums);
    for (int64_t column = 0; column < walk.period; column += kLanes) store_to(column, sums);
  }
  QK_INLINED void load_from(int64_t column, Vec* sums) const {
    unrolled<Op::kSums>([&](int s) QK_INLINED { sums[s] = load(values_ + column * Op::kSums + s * kLanes); });
  }
  QK_INLINED void store_to(int64_t column, const Vec* sums) const {
    unrolled<Op::kSums>([&](int s) QK_INLINED { store(values_ + column * Op::kSums + s * kLanes, sums[s]); });
  }

  // What is done with those of a vector of columns, before some rows and after them.
  QK_INLINED void take(int64_t column, Vec* sums) const { load_from(column, sums); }
  template <class Params>
  QK_INLINED void give(const Op&, int64_t column, const Params&, const Vec* sums) const {
    store_to(column, sums);
  }
  void end_row() const {}
  // Of the columns from this one to the last of its vector.
  const float* at(int64_t column, int s) const {
    return values_ + (column / kLanes * Op::kSums + s) * kLanes + column % kLanes;
  }

 private:
  float* values_;
};

template <class Op>
concept Weighs = requires { Op::kTotals; };

// The totals of an op that weighs, in place of ColumnSums. Those of a row are added up before they meet the others, as a
// long row of float32 would lose what it adds to a large sum.
template <class Op>
class RunningTotals {
 public:
  RunningTotals() {
    unrolled<Op::kTotals>([&](int s) QK_INLINED { all_[s] = of_row_[s] = splat(0.0f); });
  }

  QK_INLINED void take(int64_t, Vec* sums) const { reset_sums<Op>(sums); }
  template <class Params>
  QK_INLINED void give(const Op& op, int64_t, const Params& params, const Vec* sums) {
    op.weigh(params, sums, of_row_);
  }
  QK_INLINED void end_row() {
    unrolled<Op::kTotals>([&](int s) QK_INLINED {
      all_[s] = all_[s] + of_row_[s];
      of_row_[s] = splat(0.0f);
    });
  }
  float total(int s) const { return lane_sum(all_[s]); }

 private:
  Vec all_[Op::kTotals], of_row_[Op::kTotals];
};

template <class Op>
using SumsOf = std::conditional_t<Weighs<Op>, RunningTotals<Op>, ColumnSums<Op>>;

// The accumulators of the blocks, which become those of block 0: merged in pairs of neighbours, in pairs of pairs and so on,
// each by the thread that comes with the second of the two. It has that one in its cache and often both, and who merges
// does not change what is added to what.
template <class Op>
class BlockSums {
 public:
  explicit BlockSums(const Walk& walk)
      : walk_(walk),
        size_(ColumnSums<Op>::size(walk)),
        bytes_(walk.pieces * size_ * sizeof(float)),
        values_(static_cast<float*>(take_block(bytes_))),  // malloc would ask the system for as much at each call
        arrived_(walk.pieces) {
    if (!values_) throw std::bad_alloc();
  }
  ~BlockSums() { give_block(values_, bytes_); }
  BlockSums(const BlockSums&) = delete;
  BlockSums& operator=(const BlockSums&) = delete;

  ColumnSums<Op> of(int64_t block) const { return ColumnSums<Op>(values_ + block * size_); }

  // Returns whether it was the last one, and all are merged.
  bool finish(int64_t block) {
    for (int64_t width = 1; width < walk_.pieces; width *= 2) {
      const int64_t left = block / (2 * width) * 2 * width, right = left + width;
      if (right < walk_.pieces) {
        if (arrived_[right].fetch_add(1, std::memory_order_acq_rel) == 0) return false;
        merge(of(left), of(right));
      }
      block = left;
    }
    return true;
  }

 private:
  void merge(ColumnSums<Op> into, ColumnSums<Op> from) const {
    for (int64_t column = 0; column < walk_.period; column += kLanes) {
      Vec sums[Op::kSums], more[Op::kSums];
      into.load_from(column, sums);
      from.load_from(column, more);
      merge_sums<Op>(sums, more);
      into.store_to(column, sums);
    }
  }

  const Walk walk_;
  const int64_t size_;
  const size_t bytes_;
  float* const values_;
  std::vector<std::atomic<int>> arrived_;  // at the pair whose second half begins with this block
};

// totals: [kSums][channels], of which several columns may be one. One thread does this, so where neighbours are different
// channels, it adds a vector of them at a time.
template <class Op>
inline void combine_columns(const Layout& layout, const Walk& walk, ColumnSums<Op> sums, double* totals) {
  const int64_t alike = layout.inner, row = layout.channels * alike;
  unrolled<Op::kSums>([&](int s) QK_INLINED {
    for (int64_t column = 0, count; column < walk.period; column += count) {
      const float* const from = sums.at(column, s);
      double* const total = totals + s * layout.channels + column % row / alike;
      count = alike > 1 ? 1 : std::min(kLanes - column % kLanes, row - column % row);
      for (int64_t i = 0; i < count; ++i) total[i] = merge(combine_of<Op>(s), total[i], from[i]);
    }
  });
}

// Where every column is a channel, of an op that takes their totals.
template <class Op>
inline void finish_columns(const Layout& layout, const Op& op, ColumnSums<Op> sums) {
  int64_t channel = 0;
  for (; channel + kLanes <= layout.channels; channel += kLanes)
    op.template finish_channels<1, kLanes>(channel, sums.at(channel, 0));
  for (; channel < layout.channels; ++channel) {
    float totals[Op::kSums];
    unrolled<Op::kSums>([&](int s) QK_INLINED { totals[s] = *sums.at(channel, s); });
    op.finish_channel(channel, totals);
  }
}

// The columns from `first_column` on, whatever their number, of `count` rows `apart` from one another, which need not be
// whole.
template <class Op>
inline void run_columns(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, int64_t row,
                        int64_t apart, int64_t count, int64_t first_column, SumsOf<Op>& partial) {
  for (int64_t column = first_column; column < walk.period; column += kLanes) {
    const auto params = op.params([&](int field) { return table.of_columns(field, column); });
    const int64_t width = std::min<int64_t>(kLanes, walk.period - column);
    Vec sums[Op::kSums + 1];
    partial.take(column, sums);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t i = (row + r * apart) * walk.period + column, n = std::min(width, layout.numel() - i);
      if (n == kLanes) {
        op(i, Whole{}, params, sums);
      } else if (n > 0) {
        apply_first(op, i, static_cast<int>(n), params, sums);
      }
    }
    partial.give(op, column, params, sums);
  }
  partial.end_row();
}

// Beyond a few accumulators, and without vectors, the copies are large and gain nothing.
#if defined(__AVX2__)
template <class Op>
inline constexpr bool kUnrollsRows = Op::kSums <= 4;
#else
template <class Op>
inline constexpr bool kUnrollsRows = false;
#endif

template <class Op>
inline constexpr bool kReadsFirst = kUnrollsRows<Op> && requires(const Op& op) { op.read(0, Whole{}); };

// Of rows that are walked side by side, how far apart they are. An odd number of rows, for rows are often 1 or 2 KiB, and
// addresses that agree in their low 12 bits share eight lines of the first-level cache.
inline int64_t odd(int64_t rows) { return rows - (rows % 2 == 0); }

// Two vectors of columns, as lines come in pairs, of kRows rows `stride` elements from one another: first all loads.
template <int kRows, class Op>
QK_INLINED inline void run_two_vectors(const ChannelTable& table, const Op& op, int64_t first, int64_t stride,
                                       int64_t column, SumsOf<Op>& partial) {
  decltype(op.read(first, Whole{})) read[2][kRows];
  unrolled<kRows>([&](int r) QK_INLINED {
    unrolled<2>([&](int v) QK_INLINED { read[v][r] = op.read(first + r * stride + v * kLanes, Whole{}); });
  });
  unrolled<2>([&](int v) QK_INLINED {
    const int64_t own = column + v * kLanes;
    const auto params = op.params([&](int field) QK_INLINED { return table.of_columns(field, own); });
    Vec sums[Op::kSums + 1];
    partial.take(own, sums);
    unrolled<kRows>([&](int r) QK_INLINED { op.add_up(read[v][r], params, sums); });
    partial.give(op, own, params, sums);
  });
}

// `count` rows, and with each kRows - 1 more, `apart` from one another: a vector of them all shares one load of parameters
// and of accumulators, and one store. Each row goes on to the one that follows it in memory, as prefetchers like it, so that
// they are far apart. kAsks: the rows after the last of them are asked for in the order of memory.
template <int kRows, bool kAsks, class Op>
inline void run_rows(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& shared, int64_t row,
                     int64_t count, int64_t apart, SumsOf<Op>& partial) {
  const Op op = shared;  // as in run_piece
  SumsOf<Op> own = partial;
  const int64_t period = walk.period, whole = period / kLanes * kLanes, stride = apart * period;
  int64_t ahead = (row + apart * kRows) * period;
  for (int64_t step = row; step < row + count; ++step) {
    const int64_t begin = step * period;
    for (int64_t column = 0; column < whole; column += kLanes, ahead += kRows * kLanes) {
      const auto params = op.params([&](int field) QK_INLINED { return table.of_columns(field, column); });
      const auto at = [&](int r) QK_INLINED { return begin + column + r * stride; };
      constexpr bool kFit = sizeof(params) <= kRegisters / 4 * sizeof(Vec);  // two of them, beside what is computed
      if constexpr (kFit && requires { op.pair(begin, params, params); })
        if (column + 2 * kLanes <= whole) {
          const auto next = op.params([&](int field) QK_INLINED { return table.of_columns(field, column + kLanes); });
          unrolled<kRows>([&](int r) QK_INLINED { op.pair(at(r), params, next); });
          column += kLanes;
          continue;
        }
      if constexpr (kReadsFirst<Op> && Op::kSums > 0) {
        if (column + 2 * kLanes <= whole) {
          run_two_vectors<kRows>(table, op, begin + column, stride, column, own);
          column += kLanes;
          continue;
        }
      } else if constexpr (kReadsFirst<Op>) {
        decltype(op.read(row, Whole{})) read[kRows];
        unrolled<kRows>([&](int r) QK_INLINED { read[r] = op.read(at(r), Whole{}); });
        unrolled<kRows>([&](int r) QK_INLINED { op.write(at(r), Whole{}, read[r], params); });
        continue;
      }
      Vec sums[Op::kSums + 1];
      own.take(column, sums);
      if constexpr (kUnrollsRows<Op>) {
        unrolled<kRows>([&](int r) QK_INLINED {
          if constexpr (kAsks) op.template prefetch<Reach::kFar>(ahead + r * kLanes);
          op(at(r), Whole{}, params, sums);
        });
      } else {
        for (int r = 0; r < kRows; ++r) op(at(r), Whole{}, params, sums);
      }
      own.give(op, column, params, sums);
    }
    own.end_row();
  }
  partial = own;
  if (whole < period)
    for (int64_t step = row; step < row + count; ++step)
      run_columns(layout, walk, table, op, step, apart, kRows, whole, partial);
}

// Whether an op reads several tensors, and says what it reads.
template <class Op>
concept Prefetches = requires(const Op& op) { op.template prefetch<Reach::kFar>(0); };

// Other tensors and results are streams of their own, and without accumulators there is less to share.
template <class Op>
constexpr int rows_together() {
  if constexpr (requires { Op::kRows; }) return Op::kRows;
  return kReadsFirst<Op> || Prefetches<Op> ? 4 : Op::kSums > 0 ? 6 : 2;
}

template <bool kAsks, class Op>
inline void run_all_rows(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, int64_t row,
                         int64_t last_row, SumsOf<Op>& partial) {
  constexpr int kRows = rows_together<Op>();
  while (row + kRows <= last_row) {
    const int64_t apart = odd(std::min(last_row - row, kAsks ? kAskedRows : last_row) / kRows);
    run_rows<kRows, kAsks>(layout, walk, table, op, row, apart, apart, partial);
    row += apart * kRows;
  }
  run_rows<1, false>(layout, walk, table, op, row, last_row - row, 0, partial);
}

// Whether an op is walked in strips: where vectors come in halves, what is kept in registers outweighs what prefetchers do.
template <class Op>
concept TakesStrips = !kWholeVectors && requires(const Op& op) { op.template prefetch_pair<Reach::kNear>(0); };

// Parameters of two vectors of columns, in the order of TwoVecs.
template <class Op>
inline auto params_of_pair(const ChannelTable& table, const Op& op, int64_t column, bool second) {
  return op.params([&](int field) QK_INLINED {
    const TwoVecs two = apart({table.of_columns(field, column), table.of_columns(field, column + kLanes)}, op.x);
    return second ? two.second : two.first;
  });
}

// A strip of kPairs pairs of vectors of columns, whose parameters and accumulators stay in registers. Each row of it is a
// cache line or two, far from those of the next row, so they are asked for ahead, first from the second-level cache and then
// from the first. kAsks: the former from `far` on and in the order of memory, as many as are read.
template <int kPairs, bool kAsks, class Op>
inline void run_strip_of_pairs(const Walk& walk, const ChannelTable& table, const Op& shared, int64_t row, int64_t last_row,
                               int64_t column, int64_t far, SumsOf<Op>& partial) {
  const Op op = shared;  // as in run_piece
  typename Op::Pairs pairs[kPairs];
  decltype(params_of_pair(table, op, column, false)) params[kPairs][2];
  unrolled<kPairs>([&](int p) QK_INLINED {
    for (int second = 0; second < 2; ++second)
      params[p][second] = params_of_pair(table, op, column + 2 * p * kLanes, second);
  });
  const auto params_of = [&](int64_t first) QK_INLINED {
    return op.params([&](int field) QK_INLINED { return table.of_columns(field, first); });
  };
  const int64_t ahead = kRowsAhead * walk.period, far_ahead = kRowsFarAhead * walk.period;
  run_pairs<kPairs, false>(
      op, params, row * walk.period + column, walk.period, last_row - row, pairs, [&](int64_t i) QK_INLINED {
        op.template prefetch_pair<Reach::kNear>(i + ahead);
        op.template prefetch_pair<Reach::kFar>(kAsks ? std::exchange(far, far + 2 * kLanes) : i + far_ahead);
      });
  if constexpr (Op::kSums > 0)
    unrolled<kPairs>([&](int p) QK_INLINED {
      const int64_t low = column + 2 * p * kLanes, high = low + kLanes;
      Vec sums[2][Op::kSums + 1];
      partial.take(low, sums[0]);
      partial.take(high, sums[1]);
      merge_pairs(op, pairs[p], sums[0], sums[1]);
      partial.give(op, low, params_of(low), sums[0]);
      partial.give(op, high, params_of(high), sums[1]);
    });
}

// Of an op that takes pairs.
template <bool kAsks, class Op>
inline void run_strips_of_pairs(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, int64_t row,
                                int64_t last_row, SumsOf<Op>& partial) {
  using Params = decltype(params_of_pair(table, op, 0, false));
  constexpr bool kFit = 2 * (sizeof(typename Op::Pairs) + 2 * sizeof(Params)) <= kRegisters * sizeof(Vec) / 2;
  constexpr int kPairs = kFit ? 2 : 1, kWidth = kPairs * 2 * kLanes;
  for (int64_t end; row < last_row; row = end) {
    end = std::min(row + kStripRows, last_row);
    int64_t column = 0;
    int64_t far = end * walk.period;
    for (; column + kWidth <= walk.period; column += kWidth, far += (end - row) * kWidth)
      run_strip_of_pairs<kPairs, kAsks>(walk, table, op, row, end, column, far, partial);
    run_columns(layout, walk, table, op, row, 1, end - row, column, partial);
  }
}

// Rows that lie side by side, of which the last may be partial.
template <class Op>
inline void run_range(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, int64_t row,
                      int64_t last_row, bool asks, SumsOf<Op>& partial) {
  const int64_t whole_rows = layout.numel() / walk.period, end = std::min(last_row, whole_rows);
  if constexpr (TakesStrips<Op>) {
    (asks ? run_strips_of_pairs<true, Op> : run_strips_of_pairs<false, Op>)(layout, walk, table, op, row, end, partial);
  } else if constexpr (kUnrollsRows<Op> && Prefetches<Op>) {
    (asks ? run_all_rows<true, Op> : run_all_rows<false, Op>)(layout, walk, table, op, row, end, partial);
  } else {
    run_all_rows<false>(layout, walk, table, op, row, end, partial);
  }
  if (end < last_row) run_columns(layout, walk, table, op, whole_rows, 1, 1, 0, partial);
}

// A block of a reduction. Where rows are walked side by side, they are of all parts of the tensor and each block has some of
// each part, so that a thread goes on from block to block where it is; the last block takes what is left over. Rows that are
// asked for in the order of memory lie side by side in a block, and so do those of which there are few.
template <class Op>
inline void run_block(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, int64_t block,
                      bool asks, SumsOf<Op>& partial) {
  if constexpr (!TakesStrips<Op>) {
    constexpr int kRows = rows_together<Op>();
    const int64_t apart = odd(layout.numel() / walk.period / kRows), begin = walk.begin_of(block, apart);
    if (apart >= kLeastSteps * walk.pieces && !(Prefetches<Op> && asks)) {
      run_rows<kRows, false>(layout, walk, table, op, begin, walk.begin_of(block + 1, apart) - begin, apart, partial);
      if (block + 1 == walk.pieces) run_range(layout, walk, table, op, apart * kRows, walk.rows, false, partial);
      return;
    }
  }
  run_range(layout, walk, table, op, walk.begin_of(block, walk.rows), walk.begin_of(block + 1, walk.rows), asks, partial);
}

template <class Op>
void traverse_columns(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op, double* totals) {
  const bool asks = !kWholeVectors && layout.numel() * static_cast<int64_t>(sizeof(*op.x)) >= kAskedBytes;
  if constexpr (Op::kSums == 0) {  // no partial sums, so rows may go to as many threads as there are
    parallel_for(walk.rows, std::max<int64_t>(1, kPiece / walk.period), [&](int64_t begin, int64_t end) {
      ColumnSums<Op> none(nullptr);
      run_range(layout, walk, table, op, begin, end, asks, none);
      finish_streams();
    });
  } else if constexpr (Weighs<Op>) {
    std::vector<float> of_blocks(walk.pieces * Op::kTotals);
    parallel_for(walk.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        RunningTotals<Op> sums;
        run_block(layout, walk, table, op, block, asks, sums);
        for (int s = 0; s < Op::kTotals; ++s) of_blocks[block * Op::kTotals + s] = sums.total(s);
      }
    });
    for (int64_t block = 0; block < walk.pieces; ++block)
      for (int s = 0; s < Op::kTotals; ++s) totals[s] += of_blocks[block * Op::kTotals + s];
  } else {
    BlockSums<Op> sums(walk);
    const auto take = [&] {
      if constexpr (kFinishes<Op>)
        if (totals == nullptr) return finish_columns(layout, op, sums.of(0));
      combine_columns<Op>(layout, walk, sums.of(0), totals);
    };
    parallel_for(walk.pieces, 1, [&](int64_t begin, int64_t end) {
      for (int64_t block = begin; block < end; ++block) {
        ColumnSums<Op> partial = sums.of(block);
        partial.empty(walk);
        run_block(layout, walk, table, op, block, asks, partial);
        if (sums.finish(block)) take();  // by the thread that has them in its cache
      }
      finish_streams();
    });
    if (walk.pieces == 0) take();
  }
}

// Runs op over the tensor. Returns its accumulators, [kSums][channels], unless it took them itself; or its totals.
template <class Op>
std::vector<double> traverse(const Layout& layout, const Walk& walk, const ChannelTable& table, const Op& op) {
  if constexpr (kFinishes<Op>) {
    if (walk.by_columns && walk.period == layout.channels) {
      traverse_columns(layout, walk, table, op, nullptr);
      return {};
    }
    if (!walk.by_columns && walk.pieces == 1 && layout.outer == 1) {
      traverse_channels(layout, table, op);
      return {};
    }
  }
  if constexpr (Weighs<Op>) {
    if (walk.by_columns) {
      std::vector<double> totals(Op::kTotals);
      traverse_columns(layout, walk, table, op, totals.data());
      return totals;
    }
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  std::vector<double> totals(Op::kSums * layout.channels);
  for (int s = 0; s < Op::kSums; ++s)
    if (combine_of<Op>(s) != Combine::kSum)
      std::fill_n(&totals[s * layout.channels], layout.channels,
                  combine_of<Op>(s) == Combine::kMin ? kInfinity : -kInfinity);
  (walk.by_columns ? traverse_columns<Op> : traverse_runs<Op>)(layout, walk, table, op, totals.data());
  if constexpr (kFinishes<Op>)
    for (int64_t c = 0; c < layout.channels; ++c) {
      float of_one[Op::kSums];
      for (int s = 0; s < Op::kSums; ++s) of_one[s] = static_cast<float>(totals[s * layout.channels + c]);
      op.finish_channel(c, of_one);
    }
  return totals;
}

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
// How an element-wise kernel walks a tensor seen as [outer, channels, inner], in parallel, without knowing what it computes.
//
// Runs: inner is long, so a channel's parameters are broadcast once and used for a whole run.
// Columns: channels are innermost (channels_last) or runs are short, so parameters change from lane to lane: they are
// expanded once to one table entry a column, and several rows share each load of them.
//
// An Op has Params, broadcast(channel), at(column), at(column, n), and
//   forward:  Vec operator()(Vec x, const Params&)
//   backward: Vec operator()(Vec g, Vec x, const Params&, Vec (&sums)[kSums])

#include <algorithm>
#include <numeric>
#include <vector>

#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace qk::cpu::QK_CPU_ISA {

inline constexpr int64_t kMinRun = 32;       // shorter runs go by columns
inline constexpr int64_t kPiece = 1 << 14;   // elements a task takes at a time: its tensors stay in L2
inline constexpr int64_t kRowBlock = 8;      // rows that share one load of the column tables

struct Walk {
  bool by_columns;
  int64_t period;  // columns: entries in a parameter table; runs: unused
  int64_t rows;    // runs: outer * channels; columns: rows of `period`, the last one perhaps partial
  int64_t pieces;  // runs: pieces a run is cut into; columns: blocks of rows
  int64_t piece;   // runs: elements a piece; columns: rows a block
};

inline Walk walk_of(const Layout& layout) {
  Walk walk{};
  walk.by_columns = layout.channels > 1 && layout.inner < kMinRun;
  if (!walk.by_columns) {
    walk.rows = layout.outer * layout.channels;
    walk.piece = std::min(kPiece, std::max<int64_t>(layout.inner, 1));
    walk.pieces = (layout.inner + walk.piece - 1) / walk.piece;
    return walk;
  }
  const int64_t row = layout.channels * layout.inner;
  // A short row is repeated until it fills whole vectors, so that no row ends in a partial one.
  walk.period = row >= kPiece / 64 ? row : row * (kLanes / std::gcd<int64_t>(row, kLanes));
  walk.rows = (layout.numel() + walk.period - 1) / walk.period;
  walk.piece = std::max<int64_t>(kRowBlock, kPiece / walk.period / kRowBlock * kRowBlock);
  walk.pieces = (walk.rows + walk.piece - 1) / walk.piece;
  return walk;
}

// One table entry a column: value(channel) repeated along inner and over the period.
template <class F>
std::vector<float> expand(const Layout& layout, const Walk& walk, F value) {
  std::vector<float> table(walk.by_columns ? walk.period : layout.channels);
  for (size_t i = 0; i < table.size(); ++i)
    table[i] = value(walk.by_columns ? static_cast<int64_t>(i) / layout.inner % layout.channels : static_cast<int64_t>(i));
  return table;
}

// body(row, begin, n): elements [begin, begin + n) lie in one run, the row'th.
template <class F>
void for_each_run(const Layout& layout, const Walk& walk, const F& body) {
  const int64_t grain = std::max<int64_t>(1, kPiece / walk.piece);
  parallel_for(walk.rows * walk.pieces, grain, [&](int64_t first, int64_t last) {
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t row = unit / walk.pieces, start = unit % walk.pieces * walk.piece;
      body(unit, row % layout.channels, row * layout.inner + start, std::min(walk.piece, layout.inner - start));
    }
  });
}

// body(block, first_row, rows): rows of `period` elements, of which the very last may be short.
template <class F>
void for_each_block(const Walk& walk, const F& body) {
  parallel_for(walk.pieces, 1, [&](int64_t first, int64_t last) {
    for (int64_t block = first; block < last; ++block)
      body(block, block * walk.piece, std::min(walk.piece, walk.rows - block * walk.piece));
  });
}

// y = op(x), element by element. Out is the stored type: T, or uint8_t for codes.
template <class T, class Out, class Op>
void map_elements(const Layout& layout, const Walk& walk, const Op& op, const T* x, Out* y) {
  const int64_t numel = layout.numel();
  const auto put = [](Out* p, Vec v, int n) {
    if constexpr (sizeof(Out) == 1) {
      n == kLanes ? store_codes(p, v) : store_codes(p, v, n);
    } else {
      n == kLanes ? store(p, v) : store(p, v, n);
    }
  };
  if (!walk.by_columns) {
    for_each_run(layout, walk, [&](int64_t, int64_t channel, int64_t begin, int64_t n) {
      const auto params = op.broadcast(channel);
      const T* from = x + begin;
      Out* to = y + begin;
      int64_t i = 0;
      for (; i + 4 * kLanes <= n; i += 4 * kLanes)
        for (int u = 0; u < 4; ++u) put(to + i + u * kLanes, op(load(from + i + u * kLanes), params), kLanes);
      for (; i + kLanes <= n; i += kLanes) put(to + i, op(load(from + i), params), kLanes);
      if (i < n) put(to + i, op(load(from + i, static_cast<int>(n - i)), params), static_cast<int>(n - i));
    });
    return;
  }
  for_each_block(walk, [&](int64_t, int64_t first_row, int64_t rows) {
    for (int64_t row = first_row; row < first_row + rows; row += kRowBlock) {
      const int64_t last = std::min(row + kRowBlock, first_row + rows);
      for (int64_t column = 0; column < walk.period; column += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(kLanes, walk.period - column));
        const auto params = width == kLanes ? op.at(column) : op.at(column, width);
        for (int64_t r = row; r < last; ++r) {
          const int64_t i = r * walk.period + column;
          const int n = static_cast<int>(std::min<int64_t>(width, numel - i));
          if (n == kLanes) {
            put(y + i, op(load(x + i), params), kLanes);
          } else if (n > 0) {
            put(y + i, op(load(x + i, n), params), n);
          }
        }
      }
    }
  });
}

// out = op(grad, x) with kSums sums a channel, each reduced in a fixed order whatever the number of threads.
// sums: [channels, kSums].
template <int kSums, class T, class Op>
void map_and_reduce(const Layout& layout, const Walk& walk, const Op& op, const T* grad, const T* x, T* out, float* sums) {
  const int64_t numel = layout.numel();
  std::vector<double> total(layout.channels * kSums, 0.0);
  if (!walk.by_columns) {
    std::vector<float> partial(walk.rows * walk.pieces * kSums);
    for_each_run(layout, walk, [&](int64_t unit, int64_t channel, int64_t begin, int64_t n) {
      const auto params = op.broadcast(channel);
      Vec acc[2][kSums];
      for (auto& half : acc) std::fill(half, half + kSums, splat(0.0f));
      int64_t i = begin;
      const int64_t end = begin + n;
      for (; i + 2 * kLanes <= end; i += 2 * kLanes)
        for (int u = 0; u < 2; ++u) {
          const int64_t at = i + u * kLanes;
          store(out + at, op(load(grad + at), load(x + at), params, acc[u]));
        }
      for (; i < end; i += kLanes) {
        const int m = static_cast<int>(std::min<int64_t>(kLanes, end - i));
        store(out + i, op(load(grad + i, m), load(x + i, m), params, acc[0]), m);
      }
      for (int s = 0; s < kSums; ++s) partial[unit * kSums + s] = lane_sum(acc[0][s] + acc[1][s]);
    });
    for (int64_t unit = 0; unit < walk.rows * walk.pieces; ++unit)
      for (int s = 0; s < kSums; ++s)
        total[unit / walk.pieces % layout.channels * kSums + s] += partial[unit * kSums + s];
  } else {
    // partial[block][s][column]
    std::vector<float> partial(walk.pieces * kSums * walk.period, 0.0f);
    for_each_block(walk, [&](int64_t block, int64_t first_row, int64_t rows) {
      float* const mine = partial.data() + block * kSums * walk.period;
      for (int64_t column = 0; column < walk.period; column += kLanes) {
        const int width = static_cast<int>(std::min<int64_t>(kLanes, walk.period - column));
        const auto params = width == kLanes ? op.at(column) : op.at(column, width);
        Vec acc[kSums];
        std::fill(acc, acc + kSums, splat(0.0f));
        for (int64_t r = first_row; r < first_row + rows; ++r) {
          const int64_t i = r * walk.period + column;
          const int n = static_cast<int>(std::min<int64_t>(width, numel - i));
          if (n == kLanes) {
            store(out + i, op(load(grad + i), load(x + i), params, acc));
          } else if (n > 0) {
            store(out + i, op(load(grad + i, n), load(x + i, n), params, acc), n);
          }
        }
        for (int s = 0; s < kSums; ++s) store(mine + s * walk.period + column, acc[s], width);
      }
    });
    for (int64_t block = 0; block < walk.pieces; ++block)
      for (int s = 0; s < kSums; ++s)
        for (int64_t column = 0; column < walk.period; ++column)
          total[column / layout.inner % layout.channels * kSums + s] += partial[(block * kSums + s) * walk.period + column];
  }
  for (size_t i = 0; i < total.size(); ++i) sums[i] = static_cast<float>(total[i]);
}

}  // namespace qk::cpu::QK_CPU_ISA

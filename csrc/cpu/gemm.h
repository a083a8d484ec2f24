#pragma once
// Rows of activation codes times panels of weights, from the codes to the finished output.
//
// A Source provides the rows: fill(first pixel, pixels, group, Rows&) sets rows.row[i] to plan.steps() * kDepth readable
// codes, or K by planes. What is read past K meets weights of zero. kGives<Code>: whether it has codes of that type.

#include <algorithm>
#include <optional>

#include "core/algebra.h"
#include "cpu/lowbit.h"
#include "cpu/parallel.h"
#include "cpu/popcount.h"
#include "cpu/prepacked.h"

namespace qk::cpu::QK_CPU_ISA {

template <class Code>
struct Rows {
  // width: codes a row that are gathered.
  Rows(int64_t count, int64_t width) : row(count), window_class(count), gathered(count * width) {
    this->gathered.clear();  // the codes past K stay zero
  }

  Buffer<const Code*> row;       // [count]
  Buffer<int64_t> window_class;  // [count]
  Buffer<Code> gathered;         // [count][width], or empty
  int64_t lines = 1, pitch = 0;  // in which a row lies: each a whole number of steps, the next one `pitch` codes on
};

// What multiplies a block of rows, a tile at a time: rows [first, first + count) by the vectors of a panel.
//
//   using Code, Sum
//   static constexpr int kRows                           of a tile
//   void take(const Rows<Code>& rows, int64_t count)     a new block
//   const Sum* activations() const                       SA, a row each
//   void begin(int64_t group, int64_t panel)             before that panel is multiplied
//   const Sum* multiply(int64_t first, int count, int64_t group, int64_t panel, int vectors, Sum* scratch) [count][vectors]

// Integer sums of codes. Sum is int64_t where K may overflow int32.
template <class SumOfCodes>
class CodeTiles {
 public:
  using Code = Activation;
  using Sum = SumOfCodes;
  static constexpr int kRows = kTileRows;

  CodeTiles([[maybe_unused]] const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue&)
      : plan_(plan), weights_(weights), sums_(plan.block) {
#if defined(__AVX512F__)
    if (weights.has_panels()) return;
    prepacked_.emplace(args, plan);
    expanded_ = Buffer<Weight>(kPanelLanes * plan.steps() * kDepth);
#endif
  }

  void begin(int64_t group, int64_t index) {
#if defined(__AVX512F__)
    if (prepacked_) {
      panel_ = prepacked_->expanded(group, index, plan_.panel_vectors(index), expanded_.data());
      return;
    }
#endif
    panel_ = weights_.panel(plan_, group, index);
  }

  void take(const Rows<Code>& rows, int64_t count) {
    rows_ = rows.row.data();
    lines_ = {plan_.steps() / rows.lines, rows.lines, rows.pitch};
    for (int64_t i = 0; i < count; ++i)
      sums_[i] = static_cast<Sum>(sum_codes(rows_[i], plan_.depth / rows.lines, rows.lines, rows.pitch));
  }
  const Sum* activations() const { return sums_.data(); }

  const Sum* multiply(int64_t first, int count, int64_t, int64_t, int vectors, Sum* dots) const {
    if constexpr (sizeof(Sum) == sizeof(int32_t)) {
      run_tile(rows_ + first, count, panel_, vectors, lines_, dots);
    } else {
      constexpr int64_t kSteps = kMaxDepth / kDepth;
      const int n = count * vectors * kLanes;
      int32_t partial[kTileRows * kPanelLanes];
      const Activation* at[kTileRows];
      std::fill(dots, dots + n, 0);
      for (int64_t step = 0; step < plan_.steps(); step += kSteps) {
        for (int r = 0; r < count; ++r) at[r] = rows_[first + r] + step * kDepth;
        run_tile(at, count, panel_ + step * vectors * kLanes * kDepth, vectors, {std::min(kSteps, plan_.steps() - step)},
                 partial);
        for (int i = 0; i < n; ++i) dots[i] += partial[i];
      }
    }
    return dots;
  }

 private:
  static void run_tile(const Code* const* rows, int count, const Weight* panel, int vectors, Lines lines, int32_t* dots) {
    with_tile(count, vectors, [&]<int R, int V>() { dot_tile<R, V>(rows, panel, lines, dots); });
  }

  const Plan& plan_;
  const Weights& weights_;
#if defined(__AVX512F__)
  std::optional<Prepacked> prepacked_;  // where there are no panels
  Buffer<Weight> expanded_;             // one of them
#endif
  const Weight* panel_ = nullptr;
  const Code* const* rows_ = nullptr;
  Lines lines_{};
  Buffer<Sum> sums_;  // [block]
};

// Pairs of planes, each an integer sum, added up with their steps in the order of core/algebra.h.
class PlaneTiles {
 public:
  using Code = uint8_t;
  using Sum = float;
  static constexpr int kRows = kTileRows;

  PlaneTiles(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue& epilogue)
      : kind_(args.x_kind),
        plan_(plan),
        weights_(weights),
        epilogue_(epilogue),
        planes_(plan.x_digits * plan.block * plan.words()),
        sums_(plan.block) {}

  void take(const Rows<Code>& rows, int64_t count) {
    int64_t ones[kMaxBits];
    for (int64_t i = 0; i < count; ++i) {
      split_row(rows.row[i], plan_.depth, kind_, plan_.x_digits, row(0, i), plan_.block * plan_.words(), ones);
      sums_[i] = 0.0f;
      for (int j = 0; j < plan_.x_digits; ++j)
        sums_[i] = add_digit(sums_[i], epilogue_.activation_step(j), static_cast<float>(ones[j]));
    }
  }
  const Sum* activations() const { return sums_.data(); }
  void begin(int64_t, int64_t) {}

  const Sum* multiply(int64_t first, int count, int64_t group, int64_t index, int vectors, Sum* dots) const {
    const int lanes = vectors * kLanes;
    const int64_t slot = (group * plan_.group_vectors + index * kTileVectors) * kLanes;
    std::fill(dots, dots + count * lanes, 0.0f);
    for (int i = 0; i < plan_.w_digits; ++i)
      for (int j = 0; j < plan_.x_digits; ++j) {
        const uint32_t* rows[kTileRows];
        for (int r = 0; r < count; ++r) rows[r] = row(j, first + r);
        int32_t counts[kTileRows * kPanelLanes];
        const uint32_t* const panel = weights_.plane(plan_, group, index, vectors, i);
        with_tile(count, vectors, [&]<int R, int V>() { count_tile<R, V>(rows, panel, plan_.words(), counts); });
        const float* const step = epilogue_.pair_steps(i, j) + slot;
        for (int r = 0; r < count; ++r)
          for (int c = 0; c < lanes; ++c)
            dots[r * lanes + c] = add_digit(dots[r * lanes + c], step[c], static_cast<float>(counts[r * lanes + c]));
      }
    return dots;
  }

 private:
  uint32_t* row(int digit, int64_t i) const { return planes_.data() + (digit * plan_.block + i) * plan_.words(); }

  Kind kind_;
  const Plan& plan_;
  const Weights& weights_;
  const Epilogue& epilogue_;
  Buffer<uint32_t> planes_;  // [digits][block][words]
  Buffer<float> sums_;       // [block]
};

#if defined(__AVX512F__)
// Integer sums of codes, looked up in tables.
class TableTiles {
 public:
  using Code = uint8_t;
  using Sum = int32_t;
  static constexpr int kRows = kTableRows;

  TableTiles(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue&)
      : plan_(plan),
        weights_(weights),
        step_bytes_(plan.tables * kTableBytes),
        row_(plan.table_steps() * kTableDepth),
        tables_(plan.block * plan.table_steps() * step_bytes_),
        first_(plan.block),
        sums_(plan.block),
        dots_(plan.block * kPanelLanes) {
    if (weights.has_panels()) return;
    prepacked_.emplace(args, plan);
    places_ = Buffer<uint8_t>(kPieceBytes + kPanelLanes * kTablePlanes * 4);
  }

  // Multiplies all rows, by so much of the panel at a time as stays in the first-level cache.
  void begin(int64_t group, int64_t index) {
    const int64_t vectors = plan_.panel_vectors(index), step_bytes = vectors * plan_.table_planes * 64;
    const int64_t most = kPieceBytes / step_bytes;
    const uint8_t* const panel =
        prepacked_ ? prepacked_->panel(group, index) : reinterpret_cast<const uint8_t*>(weights_.panel(plan_, group, index));
    if (lines_.steps <= most) {  // whole lines
      const int64_t together = most / lines_.steps;
      for (int64_t line = 0; line < lines_.count; line += together)
        multiply_piece(panel, vectors, line * lines_.steps, line * lines_.pitch,
                       {lines_.steps, std::min(together, lines_.count - line), lines_.pitch});
      return;
    }
    for (int64_t line = 0; line < lines_.count; ++line)
      for (int64_t step = 0; step < lines_.steps; step += most)
        multiply_piece(panel, vectors, line * lines_.steps + step, line * lines_.pitch + step * step_bytes_,
                       {std::min(most, lines_.steps - step)});
  }

  void take(const Rows<Code>& rows, int64_t count) {
    const int64_t line = plan_.depth / rows.lines;
    count_ = count;
    for (int64_t i = 0; i < count; ++i) sums_[i] = static_cast<Sum>(sum_codes(rows.row[i], line, rows.lines, rows.pitch));
    if (overlap(rows, count, line)) {
      // Windows share codes, so tables of all from the first to the last.
      const Code* const first = rows.row[0];
      fill(first, rows.row[count - 1] - first + (rows.lines - 1) * rows.pitch + line, tables_.data());
      for (int64_t i = 0; i < count; ++i) first_[i] = table_at((rows.row[i] - first) / kTableDepth);
      lines_ = {divide_up(line, kTableDepth), rows.lines, rows.pitch / kTableDepth * step_bytes_};
      return;
    }
    lines_ = {plan_.table_steps()};
    for (int64_t i = 0; i < count; ++i) {
      const Code* row = rows.row[i];
      if (rows.lines > 1) {
        for (int64_t l = 0; l < rows.lines; ++l) copy_codes(row_.data() + l * line, row + l * rows.pitch, line);
        row = row_.data();
      }
      uint8_t* const to = table_at(i * plan_.table_steps());
      fill(row, plan_.depth, to);
      first_[i] = to;
    }
  }
  const Sum* activations() const { return sums_.data(); }

  const Sum* multiply(int64_t first, int, int64_t, int64_t, int vectors, Sum*) const {
    return dots_.data() + first * vectors * kLanes;
  }

 private:
  static constexpr int64_t kPieceBytes = 20 << 10;

  // All rows by steps of the panel from `first_step` on, whose tables are `at` bytes behind the rows' first ones.
  void multiply_piece(const uint8_t* panel, int64_t vectors, int64_t first_step, int64_t at, Lines lines) const {
    const int64_t row = vectors * plan_.table_planes * 64, count = lines.steps * lines.count;
    const uint8_t* places = panel + first_step * row;
    if (prepacked_) {
      const int64_t shared = kTablePlanes / plan_.table_planes;  // steps that lie in the same bytes
      const int64_t from = first_step / shared * shared;
      (plan_.table_planes == 1 ? place_panel<1> : place_panel<2>)(panel + from / shared * vectors * 64,
                                                                  first_step + count - from, vectors, places_.data());
      places = places_.data() + (first_step - from) * row;
    }
    const auto run = [&]<int kPlanes, int kTables>() {
      for (int64_t first = 0; first < count_; first += kRows) {
        const int rows = static_cast<int>(std::min<int64_t>(kRows, count_ - first));
        const uint8_t* tables[kRows];
        for (int r = 0; r < rows; ++r) tables[r] = first_[first + r] + at;
        Sum* const dots = dots_.data() + first * vectors * kLanes;
        with_tile(rows, static_cast<int>(vectors), [&]<int R, int V>() {
          if constexpr (R <= kRows)
            (first_step ? table_tile<R, V, kPlanes, kTables, true>
                        : table_tile<R, V, kPlanes, kTables, false>)(tables, places, lines, dots);
        });
      }
    };
    if (plan_.table_planes == 2) return run.template operator()<2, 1>();
    plan_.tables == 2 ? run.template operator()<1, 2>() : run.template operator()<1, 1>();
  }

  // Whether rows lie in memory so that tables of a step of one are those of a step of another, and fewer do for all.
  bool overlap(const Rows<Code>& rows, int64_t count, int64_t line) const {
    const auto whole = [](int64_t codes) { return codes % kTableDepth == 0; };
    if (rows.lines > 1 && !(whole(line) && whole(rows.pitch))) return false;
    for (int64_t i = 1; i < count; ++i)
      if (rows.row[i] < rows.row[i - 1] || !whole(rows.row[i] - rows.row[i - 1])) return false;
    const int64_t all = rows.row[count - 1] - rows.row[0] + (rows.lines - 1) * rows.pitch + line;
    return divide_up(all, kTableDepth) <= count * plan_.table_steps();
  }

  uint8_t* table_at(int64_t step) const { return tables_.data() + step * step_bytes_; }
  void fill(const Code* codes, int64_t n, uint8_t* to) const {
    (plan_.tables == 1 ? fill_tables<1> : fill_tables<2>)(codes, n, to);
  }

  const Plan& plan_;
  const Weights& weights_;
  const int64_t step_bytes_;
  std::optional<Prepacked> prepacked_;  // where there are no panels
  Buffer<uint8_t> places_;              // a piece of one
  Buffer<Code> row_;                    // whose lines lie apart
  Buffer<uint8_t> tables_;              // [steps][tables][kTableBytes]
  Buffer<const uint8_t*> first_;        // [block]: where each row's begin
  Buffer<Sum> sums_;                    // [block]
  Buffer<Sum> dots_;                    // [block][channels of the panel]
  int64_t count_ = 0;
  Lines lines_{};
};
#endif

template <class Tiles, class Source>
void multiply(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue& epilogue,
              const Source& source) {
  using Sum = typename Tiles::Sum;
  const Output output(args);
  const int64_t pixels = args.geometry.batch * args.geometry.out_height * args.geometry.out_width;
  const int64_t blocks = divide_up(pixels, plan.block), chunks = divide_up(plan.panels(), plan.chunk);
  const auto tasks = [&](int64_t begin, int64_t end) {
    Rows<typename Tiles::Code> rows(plan.block, Source::kGathers ? plan.steps() * kDepth : 0);
    Tiles tiles(args, plan, weights, epilogue);
    const int64_t padded = round_up(plan.block, kLanes);
    Buffer<float> staged(padded * kPanelLanes), turned(padded * kPanelLanes);
    constexpr int kRows = Tiles::kRows;
    Sum scratch[kRows * kPanelLanes];
    for (int64_t task = begin; task < end; ++task) {
      const int64_t chunk = task % chunks, block = task / chunks % blocks, group = task / chunks / blocks;
      const int64_t pixel = block * plan.block, count = std::min(plan.block, pixels - pixel);
      if (task == begin || chunk == 0) {
        source.fill(pixel, count, group, rows);
        tiles.take(rows, count);
      }
      for (int64_t index = chunk * plan.chunk; index < std::min((chunk + 1) * plan.chunk, plan.panels()); ++index) {
        const int vectors = plan.panel_vectors(index);
        const int64_t slot = (group * plan.group_vectors + index * kTileVectors) * kLanes;
        tiles.begin(group, index);
        for (int64_t first = 0; first < count; first += kRows) {
          const int tile = static_cast<int>(std::min<int64_t>(kRows, count - first));
          const Sum* const dots = tiles.multiply(first, tile, group, index, vectors, scratch);
          epilogue.finish(Sums<Sum, false>{dots, vectors * kLanes, tiles.activations() + first,
                                           rows.window_class.data() + first, static_cast<Sum>(weights.zero)},
                          tile, slot, vectors * kLanes, staged.data() + first * kPanelLanes);
        }
        const int64_t column = index * kPanelLanes;
        output.write(staged.data(), pixel, count, group * plan.group_channels + column,
                     std::min<int64_t>(kPanelLanes, plan.group_channels - column), turned.data());
      }
    }
  };
  // A piece prepares its first rows anew, which a large product can afford for threads that are not equally fast.
  constexpr double kLarge = 1 << 28;
  const double products = static_cast<double>(pixels) * args.geometry.out_channels * plan.depth;
  parallel_for(plan.groups * blocks * chunks, 1, tasks, products > kLarge ? 4 : 1);
}

#if defined(__AVX512F__)
// Whether a product is one of multiply_panels(): rows that lie in memory as they are, panels for many threads, and not so
// many rows that to read them again for each panel costs more than to arrange the weights. Of few rows any that is
// prepacked.
inline constexpr int64_t kFewRows = 48;
inline bool suits_panels(const LowbitArgs& args, const Plan& plan, int64_t pixels) {
  constexpr int64_t kFewestPanels = 16, kMostRows = 4096;
  return plan.path == Path::kRows && plan.groups == 1 && plan.depth > 0 && !plan.wide && !plan.by_planes() &&
         !plan.by_tables() &&
         ((plan.panels() >= kFewestPanels && pixels <= kMostRows) || (args.prepacked && pixels <= kFewRows));
}

// The panels of a call, each made by the thread that multiplies all rows with it, and not kept: it is read from the
// second-level cache, and no memory is written for it.
class PanelMaker {
 public:
  PanelMaker(const LowbitArgs& args, const Plan& plan, int64_t rows)
      : args_(args), plan_(plan), prepacked_(args, plan), few_(args.prepacked && rows <= kFewRows) {
    weights.zero = zero_of(args);
    if (args.prepacked)
      weights.sums_there = prepacked_.tap_sums();
    else
      weights.tap_sums = Buffer<int64_t>(plan.slots());
  }

  // Rows that are multiplied at a time: prepacked weights stay in registers with fewer.
  int tile_rows() const { return few_ ? kFewTileRows : kTileRows; }

  // What a thread has of its own.
  struct Scratch {
    std::optional<TurnedPlanes> turned;
    Buffer<Weight> codes;
    const Weight* panel = nullptr;
  };
  Scratch scratch() const {
    Scratch made;
    if (!args_.prepacked) made.turned.emplace(args_);
    if (!few_) made.codes = Buffer<Weight>(kPanelLanes * plan_.steps() * kDepth);
    return made;
  }

  void make(int64_t index, Scratch& scratch) {
    if (few_) return;
    scratch.panel = scratch.codes.data();
    if (args_.prepacked) {
      scratch.panel = prepacked_.expanded(0, index, plan_.panel_vectors(index), scratch.codes.data());
    } else {
      expand_panel(args_, plan_, 0, index, *scratch.turned, scratch.codes.data(), weights);
    }
  }

  // Of a panel that was made.
  void multiply(const Scratch& scratch, int64_t index, const uint8_t* const* rows, int count, int32_t* dots) const {
    const int vectors = plan_.panel_vectors(index);
    if (!few_)
      return with_tile(count, vectors, [&]<int R, int V>() { dot_tile<R, V>(rows, scratch.panel, {plan_.steps()}, dots); });
    with_tile(count, vectors, [&]<int R, int V>() {
      if constexpr (R <= kFewTileRows)
        with_width(prepacked_.width(), [&]<int kWidth>() {
          dot_packed_tile<R, V, kWidth>(rows, prepacked_.panel(0, index), plan_.steps(), dots);
        });
    });
  }

  Weights weights;  // their sums alone

 private:
  static constexpr int kFewTileRows = 4;

  const LowbitArgs& args_;
  const Plan& plan_;
  const Prepacked prepacked_;
  const bool few_;
};

template <class Source>
void multiply_panels(const LowbitArgs& args, const Plan& plan, const Window& window, const Source& source) {
  const int64_t pixels = args.geometry.batch * args.geometry.out_height * args.geometry.out_width;
  Rows<uint8_t> rows(pixels, 0);
  source.fill(0, pixels, 0, rows);
  Buffer<int32_t> sums(pixels);
  parallel_for(pixels, std::max<int64_t>(1, (1 << 16) / plan.depth), [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) sums[i] = static_cast<int32_t>(sum_codes(rows.row[i], plan.depth));
  });
  PanelMaker maker(args, plan, pixels);
  Epilogue epilogue(args, plan, window);
  const Output output(args);
  const int64_t grain = std::max<int64_t>(1, (1 << 16) / (kPanelLanes * plan.depth * pixels));
  parallel_for(plan.panels(), grain, [&](int64_t begin, int64_t end) {
    auto scratch = maker.scratch();
    const int64_t padded = round_up(std::min(plan.block, pixels), kLanes);
    Buffer<float> staged(padded * kPanelLanes), turned(padded * kPanelLanes);
    int32_t dots[kTileRows * kPanelLanes];
    for (int64_t index = begin; index < end; ++index) {
      const int vectors = plan.panel_vectors(index);
      maker.make(index, scratch);
      epilogue.take(maker.weights, index * kPanelLanes, index * kPanelLanes + vectors * kLanes);
      const int64_t channel = index * kPanelLanes, columns = std::min<int64_t>(kPanelLanes, plan.group_channels - channel);
      for (int64_t pixel = 0; pixel < pixels; pixel += plan.block) {
        const int64_t count = std::min(plan.block, pixels - pixel);
        for (int64_t first = 0; first < count; first += maker.tile_rows()) {
          const int tile = static_cast<int>(std::min<int64_t>(maker.tile_rows(), count - first));
          maker.multiply(scratch, index, rows.row.data() + pixel + first, tile, dots);
          epilogue.finish(
              Sums<int32_t, false>{dots, vectors * kLanes, sums.data() + pixel + first, nullptr, maker.weights.zero}, tile,
              channel, vectors * kLanes, staged.data() + first * kPanelLanes);
        }
        output.write(staged.data(), pixel, count, channel, columns, turned.data());
      }
    }
  });
}
#endif

template <class Source>
void run_gemm(const LowbitArgs& args, const Plan& plan, const Weights& weights, const Epilogue& epilogue,
              const Source& source) {
  if constexpr (Source::template kGives<PlaneTiles::Code>)
    if (plan.by_planes()) return multiply<PlaneTiles>(args, plan, weights, epilogue, source);
#if defined(__AVX512F__)
  if (plan.by_tables()) return multiply<TableTiles>(args, plan, weights, epilogue, source);
#endif
  if constexpr (Source::template kGives<Activation>)
    plan.wide ? multiply<CodeTiles<int64_t>>(args, plan, weights, epilogue, source)
              : multiply<CodeTiles<int32_t>>(args, plan, weights, epilogue, source);
}

}  // namespace qk::cpu::QK_CPU_ISA

#pragma once
// Runs of values to codes, one quantizer of any kind for the whole tensor.

#include <optional>

#include "cpu/grid.h"
#include "cpu/levels.h"

namespace qk::cpu::QK_CPU_ISA {

class Encoder {
 public:
  // grid: [3], of a learned basis [1 + bits].
  Encoder(Kind kind, int64_t levels, const float* grid) : kind_(kind), levels_(splat(static_cast<float>(levels))) {
    if (kind == Kind::kLearned) {
      bits_ = bits_of(kind, levels);
      tables_.emplace(grid, 1, bits_, Encoding::kUnsigned);
    } else {
      grid_ = {splat(grid[0]), splat(grid[1]), splat(inverse_step(grid[1])), splat(grid[2])};
    }
  }

  template <class T>
  void run(const T* x, int64_t n, uint8_t* codes) const {
    if (kind_ == Kind::kLearned) {
      with_table_bits(bits_, [&]<int kBits>() {
        const auto levels = levels_for_all<kBits>(tables_->of(0), bits_);
        run(x, n, codes, [&](Vec v) { return levels(kCodes, nearest(v, levels)); });
      });
    } else {
      with_kind(kind_, [&]<Kind kKind>() {
        const GridVec grid = grid_;  // copies that the stores of bytes cannot alias
        const Vec levels = levels_;
        run(x, n, codes, [&](Vec v) { return code_of<kKind>(v, grid, levels); });
      });
    }
  }

 private:
  template <class T, class CodeOf>
  static void run(const T* x, int64_t n, uint8_t* codes, const CodeOf& code_of) {
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes) store_codes(codes + i, code_of(load(x + i)));
    const int rest = static_cast<int>(n - i);
    if (rest > 0) store_codes(codes + i, code_of(load(x + i, rest)), rest);
  }

  Kind kind_;
  Vec levels_;
  GridVec grid_;
  int bits_ = 0;
  std::optional<LevelTables> tables_;
};

}  // namespace qk::cpu::QK_CPU_ISA

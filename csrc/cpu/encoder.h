#pragma once
// Runs of values to codes, one quantizer of any kind for the whole tensor.

#include <optional>

#include "cpu/grid.h"
#include "cpu/levels.h"

namespace qk::cpu::QK_CPU_ISA {

// What a conversion to bytes, which rounds, makes the code.
template <Kind kKind>
inline Vec unrounded_code(Vec value, const GridVec& grid, Vec levels) {
  if constexpr (kKind == Kind::kUniform) return clamp_code(position_of(value, grid), levels);
  return code_of<kKind>(value, grid, levels);
}

#if defined(__AVX512F__)
// What a conversion to bytes that also saturates below makes the code.
template <Kind kKind>
inline Vec unclamped_code(Vec value, const GridVec& grid, Vec levels) {
  if constexpr (kKind == Kind::kUniform) return min(levels, position_of(value, grid));
  return code_of<kKind>(value, grid, levels);
}

// That conversion: up to 255, rounded to the nearest, ties to even; negative ones and NaN (the integer indefinite is
// negative) become 0.
inline void store_saturated(uint8_t* p, const Vec (&values)[4]) {
  const __m512i low = _mm512_packus_epi32(_mm512_cvtps_epi32(values[0].v), _mm512_cvtps_epi32(values[1].v));
  const __m512i high = _mm512_packus_epi32(_mm512_cvtps_epi32(values[2].v), _mm512_cvtps_epi32(values[3].v));
  // Packing keeps to parts of 128 bits: word 4 part + i has values 4 part and on of vector i.
  const __m512i order = _mm512_set_epi32(15, 11, 7, 3, 14, 10, 6, 2, 13, 9, 5, 1, 12, 8, 4, 0);
  _mm512_storeu_si512(p, _mm512_permutexvar_epi32(order, _mm512_packus_epi16(low, high)));
}
#endif

// Rows of values: [count][n], `stride` apart, their codes `code_stride` apart.
struct RowsOfValues {
  int64_t n, count = 1, stride = 0, code_stride = 0;
};

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
  void run(const T* x, const RowsOfValues& rows, uint8_t* codes) const {
    if (kind_ == Kind::kLearned) {
      with_table_bits(bits_, [&]<int kBits>() {
        const auto levels = levels_for_all<kBits>(tables_->of(0), bits_);
        const auto code = [&](Vec v) { return levels(kCodes, nearest(v, levels)); };
        run(x, rows, codes, code, code);
      });
    } else {
      with_kind(kind_, [&]<Kind kKind>() {
        const GridVec grid = grid_;  // copies that the stores of bytes cannot alias
        const Vec levels = levels_;
        const auto code = [&](Vec v) { return unrounded_code<kKind>(v, grid, levels); };
#if defined(__AVX512F__)
        run(x, rows, codes, [&](Vec v) { return unclamped_code<kKind>(v, grid, levels); }, code);
#else
        run(x, rows, codes, code, code);
#endif
      });
    }
  }

 private:
  // fast: in its place where codes saturate on their way.
  template <class T, class Fast, class CodeOf>
  static void run(const T* x, const RowsOfValues& rows, uint8_t* codes, [[maybe_unused]] const Fast& fast,
                  const CodeOf& code_of) {
    for (int64_t row = 0; row < rows.count; ++row, x += rows.stride, codes += rows.code_stride) {
      int64_t i = 0;
#if defined(__AVX512F__)
      for (; i + 4 * kLanes <= rows.n; i += 4 * kLanes) {
        Vec values[4];
        unrolled<4>([&](int v) QK_INLINED { values[v] = fast(load(x + i + v * kLanes)); });
        store_saturated(codes + i, values);
      }
#endif
      for (; i + kLanes <= rows.n; i += kLanes) store_codes(codes + i, code_of(load(x + i)));
      const int rest = static_cast<int>(rows.n - i);
      if (rest > 0) store_codes(codes + i, code_of(load(x + i, rest)), rest);
    }
  }

  Kind kind_;
  Vec levels_;
  GridVec grid_;
  int bits_ = 0;
  std::optional<LevelTables> tables_;
};

}  // namespace qk::cpu::QK_CPU_ISA

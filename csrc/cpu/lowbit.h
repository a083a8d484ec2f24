#pragma once
// The parts of a low-bit product that linear layers and convolutions share: the plan, the activation as channels-last codes,
// the weights in panels, and the epilogue.

#include <algorithm>
#include <vector>

#include "core/bitplanes.h"
#include "core/window.h"
#include "cpu/buffer.h"
#include "cpu/dot.h"
#include "cpu/encoder.h"
#include "cpu/tables.h"

namespace qk::cpu::QK_CPU_ISA {

inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }

// How a product is computed.
enum class Path {
  kRows,       // every output pixel reads one run of the activation: linear layers, 1 x 1 convolutions
  kPatches,    // the window of each output pixel is gathered into a row first
  kDepthwise,  // one input channel an output channel: directly from the activation
};

struct Plan {
  Path path;
  int64_t depth;  // K: terms of a dot product
  bool wide;      // K is too large for int32 sums
  // Digits of either operand where a basis is learned, and planes are multiplied; else 0.
  int x_digits, w_digits;
  // By tables of sums (cpu/tables.h): how many a step of the activation has, and the planes of a weight; else 0.
  int tables, table_planes;
  int64_t block;  // output pixels whose rows are prepared together
  int64_t chunk;  // panels of output channels a task multiplies them with
  // Output channels by group, each group padded to whole vectors: "slots".
  int64_t groups, group_channels, group_vectors;

  bool by_planes() const { return w_digits > 0; }
  int64_t words() const { return words_of(depth); }
  int64_t slots() const { return groups * group_vectors * kLanes; }
  int64_t steps() const { return (depth + kDepth - 1) / kDepth; }
  bool by_tables() const { return tables > 0; }
  int64_t table_steps() const { return (depth + kTableDepth - 1) / kTableDepth; }
  int tile_rows() const { return by_tables() ? kTableRows : kTileRows; }
  // Of a panel, for each slot.
  int64_t slot_bytes() const {
    return by_tables() ? table_steps() * table_planes * 4 : steps() * kDepth * static_cast<int64_t>(sizeof(Weight));
  }
  int64_t panels() const { return (group_vectors + kTileVectors - 1) / kTileVectors; }
  int panel_vectors(int64_t index) const {
    return static_cast<int>(std::min<int64_t>(kTileVectors, group_vectors - index * kTileVectors));
  }
};

Plan plan_of(const LowbitArgs& args);

// The activation's codes, [batch, height, width, channels].
struct Codes {
  const uint8_t* data;
  Buffer<uint8_t> owned;  // empty where x holds such codes itself
};

Codes encode_activation(const LowbitArgs& args, const Plan& plan);

// Output positions along one dimension by the taps that are valid there: a few ranges, whatever the image's size.
struct TapClasses {
  std::vector<TapRange> ranges;
  std::vector<int32_t> of;  // [output size]: index into ranges

  explicit TapClasses(const WindowAxis& axis);
};

struct Window {
  TapClasses rows, columns;

  explicit Window(const ConvGeometry& g) : rows(row_axis(g)), columns(column_axis(g)) {}

  int64_t count() const { return static_cast<int64_t>(rows.ranges.size() * columns.ranges.size()); }
  int64_t of(int64_t oy, int64_t ox) const {
    return rows.of[oy] * static_cast<int64_t>(columns.ranges.size()) + columns.of[ox];
  }
};

struct Weights {
  Buffer<Weight> panels;     // [groups][panels][steps][channels of the panel][kDepth], or by tables; not for kDepthwise
  Buffer<uint32_t> planes;   // [groups][panels][digits][words][channels of the panel]; in their place by planes
  Buffer<int32_t> taps;      // [digits or 1][taps][slots]: codes, or their digits; kDepthwise only
  Buffer<int64_t> tap_sums;  // [digits or 1][taps][slots]: sum of those over the group's input channels
  int32_t zero;              // what was subtracted from the codes in the panels
  // Where the panels or the tap_sums lie in memory already.
  const Weight* panels_there = nullptr;
  const int64_t* sums_there = nullptr;

  bool has_panels() const { return panels_there || panels.data(); }
  const int64_t* sums() const { return sums_there ? sums_there : tap_sums.data(); }

  const Weight* panel(const Plan& plan, int64_t group, int64_t index) const {
    return (panels_there ? panels_there : panels.data()) +
           (group * plan.group_vectors + index * kTileVectors) * kLanes * (plan.slot_bytes() / sizeof(Weight));
  }
  // Of a digit; vectors: of this panel.
  uint32_t* plane(const Plan& plan, int64_t group, int64_t index, int64_t vectors, int digit) const {
    const int64_t first = (group * plan.group_vectors + index * kTileVectors) * plan.w_digits + digit * vectors;
    return planes.data() + first * kLanes * plan.words();
  }
};

Weights unpack_weights(const LowbitArgs& args, const Plan& plan);

// What codes lose to become weights, for those above 127 do not fit signed bytes.
inline int32_t zero_of(const LowbitArgs& args) { return sizeof(Weight) == 1 && args.w_levels > 127 ? 128 : 0; }

#if defined(__AVX512F__)
// Planes of the vectors of a panel, with the words of a vector's channels side by side.
struct TurnedPlanes {
  explicit TurnedPlanes(const LowbitArgs& args)
      : bits(args.w_bits),
        stride((args.words + 1) * kLanes),  // a cache line more: planes a power of two apart would share few
        words(kTileVectors * bits * stride) {}

  uint32_t* of(int64_t vector) const { return words.data() + vector * bits * stride; }

  int64_t bits;
  int64_t stride;          // of planes, in words
  Buffer<uint32_t> words;  // [kTileVectors][bits][stride]: [args.words][kLanes]
};

// One panel as unpack_weights() makes it, and the tap_sums of its slots: not by planes, and not for depthwise windows.
void expand_panel(const LowbitArgs& args, const Plan& plan, int64_t group, int64_t index, const TurnedPlanes& turned,
                  Weight* to, Weights& weights);
#endif

// The integer sums of some output pixels; by planes floats, with the steps in them.
template <class Sum, bool kEachLane>
struct Sums {
  const Sum* dots;  // D [rows][stride]
  int64_t stride;
  const Sum* activations;       // SA [rows] of all slots; kEachLane: [rows][stride]
  const int64_t* window_class;  // [rows], or null where there is one class
  Sum zero = 0;                 // what the codes in D lack
};

// Tables by slot, and the formulas of core/algebra.h lane by lane.
class Epilogue {
 public:
  // To be given the weights of all slots before they are finished. args, plan and window must outlive it.
  Epilogue(const LowbitArgs& args, const Plan& plan, const Window& window);

  // Of slots [first, last): their parameters, and what their weights add whatever the activation. first: of a vector.
  void take(const Weights& weights, int64_t first, int64_t last);

  // y [rows][kPanelLanes] from the sums of `rows` output pixels and n slots from `slot` on, n a multiple of kLanes.
  template <class Sum, bool kEachLane>
  void finish(const Sums<Sum, kEachLane>& sums, int64_t rows, int64_t slot, int64_t n, float* y) const;

  // By planes: sw_i*sa_j [slots], and sa_j.
  const float* pair_steps(int i, int j) const { return pair_steps_.data() + (i * x_digits_ + j) * slots_; }
  float activation_step(int j) const { return activation_steps_[j]; }

 private:
  // to[slot - first] = value(channel), 0 where a group has fewer channels than slots.
  template <class F>
  void by_slot(int64_t first, int64_t last, float* to, const F& value) const;
  const float* weight_grid(int64_t c) const {
    return args_.epilogue.w_grid + (args_.epilogue.w_per_channel ? c * args_.epilogue.w_columns : 0);
  }
  // window_terms_ of at most kSlotsAtOnce slots.
  static constexpr int64_t kSlotsAtOnce = 64;
  void take_taps(const Weights& weights, int64_t slot, int64_t count);

  const LowbitArgs& args_;
  const Plan& plan_;
  const Window& window_;
  int x_digits_;
  float activation_steps_[kMaxBits];
  float activation_step_, lower_, upper_;
  bool has_bias_, has_scale_;
  int64_t slots_;
  Buffer<float> step_, offset_, bias_, scale_, shift_;  // [slots]
  Buffer<float> pair_steps_;                            // [w_digits][x_digits][slots]
  Buffer<float> window_terms_;                          // [classes][slots]: oa*(sw*SW + ow*V)
};

// Where finished values go: as floats of any type or as codes, in the output's layout.
class Output {
 public:
  explicit Output(const LowbitArgs& args);

  // staged [pixels, kPanelLanes], `columns` of them valid: output pixels from `pixel` on, channels from `channel` on.
  // turned: scratch of [kPanelLanes][kLanes * ceil(pixels / kLanes)] floats.
  void write(const float* staged, int64_t pixel, int64_t pixels, int64_t channel, int64_t columns, float* turned) const;

 private:
  // y: `count` rows of n values, `stride` apart; to element `at` of the output and on, `out_stride` apart.
  void store_rows(int64_t at, int64_t out_stride, const float* y, int64_t stride, int64_t count, int64_t n) const;

  const LowbitArgs& args_;
  std::optional<Encoder> encoder_;  // of the next layer's codes
  int64_t image_;                   // output pixels an image
  bool channels_last_;
};

}  // namespace qk::cpu::QK_CPU_ISA

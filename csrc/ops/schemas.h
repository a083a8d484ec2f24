#pragma once
// Every schema of the library, in one place: for the namespace of the library itself and for that of the emulator.

#include <torch/csrc/stable/library.h>

namespace qk::ops {

inline void define_schemas(torch::stable::detail::StableLibrary& m) {
  // grid [channels, 3]: offset, step, threshold; kind 0 uniform, 1 binary, 2 ternary, 3 identity; levels: the highest code;
  // ste 0 identity, 1 clip, 2 full; axis None: per tensor. convex: the attention sums to one, which only the gradient uses.
  // covered: no x lies outside the range of a uniform member, which decides nothing but speed.

  m.def("channel_stats(Tensor x, int? axis) -> Tensor");
  m.def("minmax_grids(Tensor x, int[] levels, int? axis) -> Tensor");
  m.def("conditional_abs_mean(Tensor x, Tensor threshold, int? axis) -> Tensor");
  m.def("range_errors(Tensor x, Tensor candidates, int levels, int? axis) -> Tensor");

  m.def("fake_quantize(Tensor x, Tensor grid, int kind, int levels, int ste, int? axis) -> Tensor");
  m.def(
      "fake_quantize_backward(Tensor grad, Tensor x, Tensor grid, int kind, int levels, int ste, int? axis, "
      "bool range_sums=True) -> (Tensor, Tensor)");
  // Uniform, with the clip's gradient: one bit an element, int32 [ceil(numel / 32)], in the order of the elements in memory.
  m.def("fake_quantize_masked(Tensor x, Tensor grid, int levels, int? axis) -> (Tensor, Tensor)");
  m.def("apply_mask(Tensor grad, Tensor mask) -> Tensor");

  m.def(
      "attention_quantize(Tensor x, Tensor attention, Tensor grids, int[] kinds, int[] levels, int[] stes, int? axis, "
      "bool convex=False, bool covered=False) -> Tensor");
  // Of min-max quantizers of x itself: q, and the grids [K, channels, 3] that it was made with.
  m.def("minmax_attention_quantize(Tensor x, Tensor attention, int[] levels, int? axis) -> (Tensor, Tensor)");
  m.def(
      "attention_quantize_backward(Tensor grad, Tensor x, Tensor attention, Tensor grids, int[] kinds, int[] levels, "
      "int[] stes, int? axis) -> (Tensor, Tensor, Tensor)");
  m.def(
      "attention_gradient(Tensor grad, Tensor x, Tensor attention, Tensor grids, int[] kinds, int[] levels, int? axis, "
      "bool covered=False) -> Tensor");

  // basis [channels, n]; encoding 0 {-1, +1}, 1 {0, 1}; ste 0 identity, 1 clip. Results: q, B B^T [channels, n, n] and
  // B x [channels, n], for no channels without statistics.
  m.def(
      "learned_basis_quantize(Tensor x, Tensor basis, int encoding, int ste, int? axis, bool statistics=True) -> (Tensor, "
      "Tensor, Tensor)");
  m.def("learned_basis_quantize_backward(Tensor grad, Tensor x, Tensor basis, int encoding, int? axis) -> Tensor");
  // grid [channels, 1 + n]: offset, and the step of each bit of a code.
  m.def("learned_basis_encode(Tensor x, Tensor grid, int? axis) -> Tensor");

  m.def("encode(Tensor x, Tensor grid, int kind, int levels, int? axis) -> Tensor");
  m.def("pack_bitplanes(Tensor codes, int kind, int levels) -> Tensor");
  m.def("unpack_bitplanes(Tensor planes, int kind, int columns) -> Tensor");
  m.def("quantize_pack(Tensor x, Tensor grid, int kind, int levels, int? axis) -> (Tensor, Tensor)");

  // x: floats, encoded by x_grid, or uint8 codes. planes [w_bits, out_channels, words]. Output: floats of out_dtype
  // (default: x's, float32 for codes), or the uint8 codes of out_grid. padding: top, bottom, left, right.
  m.def(
      "lowbit_linear(Tensor x, Tensor x_grid, int x_kind, int x_levels, Tensor planes, Tensor w_grid, int w_kind, "
      "int w_levels, Tensor? bias, Tensor? scale, Tensor? shift, float lower, float upper, Tensor? out_grid, int out_kind, "
      "int out_levels, ScalarType? out_dtype, Tensor? prepacked=None) -> Tensor");
  m.def(
      "lowbit_conv2d(Tensor x, Tensor x_grid, int x_kind, int x_levels, Tensor planes, Tensor w_grid, int w_kind, "
      "int w_levels, int[] kernel_size, int[] stride, int[] padding, int[] dilation, int groups, Tensor? bias, "
      "Tensor? scale, Tensor? shift, float lower, float upper, Tensor? out_grid, int out_kind, int out_levels, "
      "ScalarType? out_dtype, Tensor? prepacked=None) -> Tensor");
  // The weight as the two take it beside its planes; channels: of a group. Empty where the backend has no use for it.
  m.def("prepack_weight(Tensor planes, int w_kind, int w_levels, int channels, int[] kernel_size, int groups) -> Tensor");
}

}  // namespace qk::ops

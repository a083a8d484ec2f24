#pragma once
// From exact integer sums to real numbers: the product of two quantized vectors.
//
//   sum_k (oa + sa*ca_k) * (ow + sw*cw_k)  =  sa*(sw*D + ow*SA) + oa*(sw*SW + ow*V)
//
// with D = sum ca*cw, SA = sum ca, SW = sum cw and V = the number of terms. In a convolution all four run over the valid
// taps alone: a padded tap adds the value 0, which need not be a code, so it contributes to none of them.
//
// Where a basis is learned, each bit of a code has a step of its own, and the product is one of bit-planes. The other
// operand's bits have steps as well (core/bitplanes.h), so one formula serves every pair of kinds:
//
//   y = sum_ij (sw_i*sa_j)*D_ij + ow*A + oa*(W + ow*V)       A = sum_j sa_j*SA_j,  W = sum_i sw_i*SW_i
//
// with D_ij the ones that digit i of the weight and digit j of the activation share, SA_j and SW_i their ones. Sums begin at
// 0 and go by i, within it by j. It ends as the first one does, with steps of 1 for the sums that have theirs in them.
//
// float32, this order, no FMA: the packed layer and the layer in eval mode run the same lines, so they agree to the bit. The
// sums are exact integers, each rounded to float32 once, by the caller.

#include <cmath>

#include "core/args.h"

namespace qk {

// sa*(sw*D + ow*SA): changes with the data.
QK_HOST_DEVICE float data_term(float dot, float activations, float activation_step, float weight_step, float weight_offset) {
  return activation_step * (weight_step * dot + weight_offset * activations);
}

// oa*(sw*SW + ow*V): known once the weights and the window are.
QK_HOST_DEVICE float window_term(float weights, float taps, float activation_offset, float weight_step,
                                 float weight_offset) {
  return activation_offset * (weight_step * weights + weight_offset * taps);
}

QK_HOST_DEVICE bool has_learned_basis(const LowbitArgs& args) {
  return args.x_kind == Kind::kLearned || args.w_kind == Kind::kLearned;
}

// (sw_i*sa_j), and one more term of a sum over digits.
QK_HOST_DEVICE float pair_step(float weight_step, float activation_step) { return weight_step * activation_step; }
QK_HOST_DEVICE float add_digit(float sum, float step, float ones) { return sum + step * ones; }

// A folded batch-norm. Fused on purpose: torch's batch-norm on the CPU rounds once here, and so the folded layer gives the
// bits that the layers gave apart.
QK_HOST_DEVICE float scale_and_shift(float y, float scale, float shift) { return fmaf(y, scale, shift); }

// Bias, folded batch-norm, ReLU or clip. NaN passes.
QK_HOST_DEVICE float clamp_output(float y, float lower, float upper) {
  y = y < lower ? lower : y;
  return y > upper ? upper : y;
}

QK_HOST_DEVICE float finish_output(float y, const EpilogueArgs& epilogue, int64_t channel) {
  if (epilogue.bias) y = y + epilogue.bias[channel];
  if (epilogue.scale) y = scale_and_shift(y, epilogue.scale[channel], epilogue.shift[channel]);
  return clamp_output(y, epilogue.lower, epilogue.upper);
}

}  // namespace qk

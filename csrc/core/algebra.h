#pragma once
// From exact integer sums to real numbers: the product of two quantized vectors.
//
//   sum_k (oa + sa*ca_k) * (ow + sw*cw_k)  =  sa*(sw*D + ow*SA) + oa*(sw*SW + ow*V)
//
// with D = sum ca*cw, SA = sum ca, SW = sum cw and V = the number of terms. In a convolution all four run over the valid
// taps alone: a padded tap adds the value 0, which need not be a code, so it contributes to none of them.
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

#pragma once
// From exact integer sums to real numbers: the product of two quantized vectors.
//
//   sum_k (oa + sa*ca_k) * (ow + sw*cw_k)  =  sa*(sw*D + ow*SA) + oa*(sw*SW + ow*V)
//
// with D = sum ca*cw, SA = sum ca, SW = sum cw and V = the number of terms. In a convolution all four run over the valid
// taps alone: a padded tap adds the value 0, which need not be a code, so it contributes to none of them.

#include "core/args.h"

namespace qk {

struct IntegerSums {
  int64_t dot;          // D
  int64_t activations;  // SA
  int64_t weights;      // SW
  int64_t taps;         // V
};

// float32, this order, no FMA: the packed layer and the layer in eval mode run the same line, so they agree to the bit.
QK_HOST_DEVICE float dequantize_sums(const IntegerSums& sums, const Grid& activation, const Grid& weight) {
  const float by_activation = weight.step * static_cast<float>(sums.dot) + weight.offset * static_cast<float>(sums.activations);
  const float by_offset = weight.step * static_cast<float>(sums.weights) + weight.offset * static_cast<float>(sums.taps);
  return activation.step * by_activation + activation.offset * by_offset;
}

// Bias, folded batch-norm, ReLU or clip.
QK_HOST_DEVICE float finish_output(float y, const EpilogueArgs& epilogue, int64_t channel) {
  if (epilogue.bias) y = y + epilogue.bias[channel];
  if (epilogue.scale) y = y * epilogue.scale[channel] + epilogue.shift[channel];
  y = y < epilogue.lower ? epilogue.lower : y;
  return y > epilogue.upper ? epilogue.upper : y;
}

}  // namespace qk

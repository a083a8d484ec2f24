#pragma once
// From words of bit-planes to bytes of codes, in registers: a bit matrix transposed by steps of 1, 2 and 8 bits.

#include <cuda_runtime.h>

#include <cstdint>

#include "cuda/ptx/logic.cuh"

namespace qk::cuda {

using ptx::select_bits;

// quads[b] byte j: the digits of element 8b + j in the low nibble, of element 8b + 4 + j in the high one. What lies above
// the kDigits of a nibble is left over from other elements.
template <int kDigits>
__device__ __forceinline__ void transpose_nibbles(const uint32_t* digit, uint32_t (&quads)[4]) {
  uint32_t e[4];  // e[j] nibble n: element 4n + j
  if constexpr (kDigits == 1) {
#pragma unroll
    for (int j = 0; j < 4; ++j) e[j] = digit[0] >> j;
  } else {
    constexpr uint32_t kEven = 0x55555555u, kPairs = 0x33333333u;
    const uint32_t even = select_bits(kEven, digit[0], digit[1] << 1), odd = select_bits(kEven, digit[0] >> 1, digit[1]);
    if constexpr (kDigits == 2) {
      e[0] = even, e[1] = odd, e[2] = even >> 2, e[3] = odd >> 2;
    } else {
      const uint32_t high_even = select_bits(kEven, digit[2], digit[3] << 1);
      const uint32_t high_odd = select_bits(kEven, digit[2] >> 1, digit[3]);
      e[0] = select_bits(kPairs, even, high_even << 2), e[1] = select_bits(kPairs, odd, high_odd << 2);
      e[2] = select_bits(kPairs, even >> 2, high_even), e[3] = select_bits(kPairs, odd >> 2, high_odd);
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const uint32_t a = __byte_perm(e[0], e[1], half ? 0x7362 : 0x5140);
    const uint32_t b = __byte_perm(e[2], e[3], half ? 0x7362 : 0x5140);
    quads[2 * half] = __byte_perm(a, b, 0x5410);
    quads[2 * half + 1] = __byte_perm(a, b, 0x7632);
  }
}

// digit[d]: the word of 32 elements' bits of weight 2^d. codes[r] byte j: the code of element 4r + j. Instructions a word:
// 23, 26, 36 or 64 for 1, 2, 4 or 8 digits.
template <int kDigits>
__device__ __forceinline__ void codes_of_digits(const uint32_t (&digit)[kDigits], uint32_t (&codes)[8]) {
  static_assert(kDigits == 1 || kDigits == 2 || kDigits == 4 || kDigits == 8);
  constexpr int kLow = kDigits < 4 ? kDigits : 4;
  constexpr uint32_t kMask = ((1u << kLow) - 1) * 0x01010101u;
  uint32_t low[4];
  transpose_nibbles<kLow>(digit, low);
  if constexpr (kDigits < 8) {
#pragma unroll
    for (int b = 0; b < 4; ++b) codes[2 * b] = low[b] & kMask, codes[2 * b + 1] = low[b] >> 4 & kMask;
  } else {
    uint32_t high[4];
    transpose_nibbles<4>(digit + 4, high);
#pragma unroll
    for (int b = 0; b < 4; ++b) {
      codes[2 * b] = select_bits(kMask, low[b], high[b] << 4);
      codes[2 * b + 1] = select_bits(kMask, low[b] >> 4, high[b]);
    }
  }
}

// Calls f.template operator()<kDigits>() with the network that has room for `bits`.
template <class F>
__device__ __forceinline__ void with_digits(int bits, const F& f) {
  if (bits > 4) return f.template operator()<8>();
  if (bits > 2) return f.template operator()<4>();
  if (bits == 2) return f.template operator()<2>();
  return f.template operator()<1>();
}

// load(d, plane): the word of the plane, most significant first, that shows digit d. Thermometer digits become binary ones.
template <int kDigits, class Load>
__device__ __forceinline__ void codes_of_planes(int bits, bool ternary, const Load& load, uint32_t (&codes)[8]) {
  uint32_t digit[kDigits];
#pragma unroll
  for (int d = 0; d < kDigits; ++d) digit[d] = d < bits ? load(d, bits - 1 - d) : 0;
  if constexpr (kDigits == 2) {
    if (ternary) {  // planes: code >= 1, code >= 2
      const uint32_t above = digit[0];
      digit[0] ^= digit[1], digit[1] = above;
    }
  }
  codes_of_digits<kDigits>(digit, codes);
}

}  // namespace qk::cuda

#pragma once
// The CUDA backend as csrc/ops sees it. Pointers are device pointers; nothing here synchronises, so all of it can be
// captured in a CUDA graph.

#include <cstdint>
#include <functional>

#include "core/args.h"
#include "core/learned_basis.h"

namespace qk::cuda {

struct Context {
  void* stream;         // cudaStream_t
  int multiprocessors;  // of the device the stream belongs to
  int architecture;     // its compute capability: 80, 86, 89, 90, ...
  // Device memory for partial sums, free to be used again by what the stream runs after this call.
  std::function<float*(int64_t floats)> workspace;
};

// Of the current device.
int multiprocessors();
int architecture();

// Text of the last launch error, or null. Clears it.
const char* last_error();

void channel_stats(const StatsArgs& args, const Context& context);
void conditional_abs_mean(const ConditionalMeanArgs& args, const Context& context);
void range_errors(const RangeErrorsArgs& args, const Context& context);

void fake_quantize_forward(const FakeQuantizeArgs& args, const Context& context);
void fake_quantize_backward(const FakeQuantizeArgs& args, const Context& context);
void fake_quantize_masked(const FakeQuantizeArgs& args, const Context& context);
void apply_mask(const ApplyMaskArgs& args, const Context& context);

void attention_quantize_forward(const AttentionArgs& args, const Context& context);
void attention_quantize_backward(const AttentionArgs& args, const Context& context);

void learned_basis_forward(const LearnedBasisArgs& args, const Context& context);
void learned_basis_backward(const LearnedBasisArgs& args, const Context& context);
void learned_basis_encode(const LearnedEncodeArgs& args, const Context& context);

void encode(const EncodeArgs& args, const Context& context);
void pack_bitplanes(const PackArgs& args, const Context& context);
void unpack_bitplanes(const UnpackArgs& args, const Context& context);
void quantize_pack(const QuantizePackArgs& args, const Context& context);

void lowbit_linear(const LowbitArgs& args, const Context& context);
void lowbit_conv2d(const LowbitArgs& args, const Context& context);

}  // namespace qk::cuda

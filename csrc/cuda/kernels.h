#pragma once
// The CUDA backend as csrc/ops sees it. Pointers are device pointers; nothing here synchronises or allocates.

#include <cstdint>

#include "core/args.h"

namespace qk::cuda {

struct Context {
  void* stream;         // cudaStream_t
  int multiprocessors;  // of the device the stream belongs to
};

// Number of multiprocessors of the current device.
int multiprocessors();

// Text of the last launch error, or null. Clears it.
const char* last_error();

void fake_quantize_forward(const FakeQuantizeArgs& args, const Context& context);

// Floats of workspace that the backward pass needs for its partial sums.
int64_t fake_quantize_workspace(const FakeQuantizeArgs& args, const Context& context);
void fake_quantize_backward(const FakeQuantizeArgs& args, const Context& context, float* workspace);

}  // namespace qk::cuda

// The library's namespace. csrc/ops/register_cpu.cpp and register_cuda.cpp bind backends to its ops.

#include "ops/schemas.h"

STABLE_TORCH_LIBRARY(quantkernels, m) { qk::ops::define_schemas(m); }

#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qk::cpu {

namespace portable {
extern const Kernels kKernels;
}
#if defined(__x86_64__)
namespace avx2 {
extern const Kernels kKernels;
}
namespace avx512 {
extern const Kernels kKernels;
}
#endif

namespace {

void run_serially(int64_t count, int64_t, int64_t, void* context, Body body) { body(context, 0, count); }
ParallelFor current_parallel_for = run_serially;

}  // namespace

void set_parallel_for(ParallelFor run) { current_parallel_for = run; }
void run_parallel(int64_t count, int64_t grain, int64_t pieces, void* context, Body body) {
  current_parallel_for(count, grain, pieces, context, body);
}

const Kernels& kernels() {
#if defined(__x86_64__)
  if (chosen_isa() == Isa::kAvx512) return avx512::kKernels;
  if (chosen_isa() == Isa::kAvx2) return avx2::kKernels;
#endif
  return portable::kKernels;
}

}  // namespace qk::cpu

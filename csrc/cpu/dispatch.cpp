#include "cpu/isa.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"

namespace qk::cpu {

namespace portable {
extern const ElementWise kElementWise;
extern const LowBit kLowBit;
}  // namespace portable
#if defined(__x86_64__)
namespace avx2 {
extern const ElementWise kElementWise;
extern const LowBit kLowBit;
}  // namespace avx2
namespace avx512 {
extern const ElementWise kElementWise;
extern const LowBit kLowBit;
}  // namespace avx512
namespace zen4 {
extern const ElementWise kElementWise;
}
#endif

namespace {

void run_serially(int64_t count, int64_t, int64_t, void* context, Body body) { body(context, 0, count); }
ParallelFor current_parallel_for = run_serially;

Kernels kernels_of([[maybe_unused]] Isa isa) {
#if defined(__x86_64__)
  if (isa == Isa::kAvx512) return {avx512::kElementWise, avx512::kLowBit};
  if (isa == Isa::kZen4) return {zen4::kElementWise, avx512::kLowBit};
  if (isa == Isa::kAvx2) return {avx2::kElementWise, avx2::kLowBit};
#endif
  return {portable::kElementWise, portable::kLowBit};
}

}  // namespace

void set_parallel_for(ParallelFor run) { current_parallel_for = run; }
void run_parallel(int64_t count, int64_t grain, int64_t pieces, void* context, Body body) {
  current_parallel_for(count, grain, pieces, context, body);
}

const Kernels& kernels() {
  static const Kernels chosen = kernels_of(chosen_isa());
  return chosen;
}

}  // namespace qk::cpu

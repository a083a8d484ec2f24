#pragma once
// Work is split through one function pointer, so the kernels need no thread library: csrc/ops sets torch's pool, tests and
// tools run serially.

#include <cstdint>

namespace qk::cpu {

using Body = void (*)(void* context, int64_t begin, int64_t end);
// pieces: into how many a thread's share may be cut, so that whoever is through can take one.
using ParallelFor = void (*)(int64_t count, int64_t grain, int64_t pieces, void* context, Body body);

void set_parallel_for(ParallelFor run);
void run_parallel(int64_t count, int64_t grain, int64_t pieces, void* context, Body body);

// f(begin, end) over [0, count) in pieces of at least `grain`. One piece a thread suits an f that prepares much at its
// begin.
template <class F>
void parallel_for(int64_t count, int64_t grain, const F& f, int64_t pieces = 16) {
  if (count <= 0) return;
  if (count <= grain) return f(0, count);
  run_parallel(count, grain, pieces, const_cast<F*>(&f),
               [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); });
}

}  // namespace qk::cpu

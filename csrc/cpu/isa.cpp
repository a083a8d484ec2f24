#include "cpu/isa.h"

#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <cstdlib>
#include <cstring>

namespace qk::cpu {
namespace {

constexpr struct {
  Isa isa;
  const char* name;
} kNames[] = {{Isa::kPortable, "portable"}, {Isa::kAvx2, "avx2"}, {Isa::kZen4, "zen4"}, {Isa::kAvx512, "avx512"}};

#if defined(__x86_64__)
// With AVX-512, AMD's family 25 is Zen 4. The identifier of a processor's own width is often hidden from virtual machines.
bool halves_vectors() {
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (!__builtin_cpu_is("amd") || !__get_cpuid(1, &eax, &ebx, &ecx, &edx)) return false;
  return (eax >> 8 & 0xf) + (eax >> 20 & 0xff) == 25;
}
#endif

Isa best_isa() {
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c") &&
                    __builtin_cpu_supports("popcnt");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
                      __builtin_cpu_supports("avx512vbmi") && __builtin_cpu_supports("gfni") &&
                      __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vpopcntdq");
  if (avx512) return halves_vectors() ? Isa::kZen4 : Isa::kAvx512;
  return avx2 ? Isa::kAvx2 : Isa::kPortable;
#else
  return Isa::kPortable;
#endif
}

Isa choose() {
  const Isa best = best_isa(), highest = best == Isa::kZen4 ? Isa::kAvx512 : best;
  if (const char* wish = std::getenv("QK_CPU_ISA"))
    for (const auto& [isa, name] : kNames)
      if (std::strcmp(wish, name) == 0 && isa <= highest) return isa;
  return best;
}

}  // namespace

Isa chosen_isa() {
  static const Isa isa = choose();
  return isa;
}

bool rounds_to_bfloat16() {
#if defined(__x86_64__)
  static const bool has = chosen_isa() >= Isa::kZen4 && __builtin_cpu_supports("avx512bf16");
  return has;
#else
  return false;
#endif
}

const char* name_of(Isa isa) {
  for (const auto& [other, name] : kNames)
    if (other == isa) return name;
  return "";
}

}  // namespace qk::cpu

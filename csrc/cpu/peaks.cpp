#include "cpu/peaks.h"

#include <chrono>
#include <cstring>

#include "cpu/isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace qk::cpu {
namespace {

// Independent chains: more than latency times issue width of any unit measured here, and few enough to stay in registers.
constexpr int kChains = 12;
constexpr int kCodesALookup = 4;

double now() { return std::chrono::duration<double>(std::chrono::steady_clock::now().time_since_epoch()).count(); }

// Tells the compiler that value is read and changed here, at the cost of no instruction: neither hoisted nor removed.
#if defined(__x86_64__)
#define QK_OPAQUE(value) asm volatile("" : "+x"(value))
#define QK_OPAQUE_512(value) asm volatile("" : "+v"(value))
#endif

// Values of a lane do not matter to the speed of integer units; those of floats stay finite and normal: a = 1, b = 0.
namespace portable {

double fp32(int64_t rounds) {
  constexpr int kLanes = 32;
  float acc[kLanes], a = 1.0f, b = 0.0f;
  for (int i = 0; i < kLanes; ++i) acc[i] = 1.0f + static_cast<float>(i);
  asm volatile("" : "+m"(a), "+m"(b));
  const float factor = a, term = b;
  for (int64_t r = 0; r < rounds; ++r)
    for (int i = 0; i < kLanes; ++i) acc[i] = acc[i] * factor + term;
  asm volatile("" : : "r"(acc) : "memory");
  return 2.0 * kLanes;
}

double int8(int64_t rounds) {
  constexpr int kBytes = 64;
  int8_t a[kBytes];
  uint8_t b[kBytes];
  int32_t acc[kBytes] = {};
  std::memset(a, 3, sizeof(a));
  std::memset(b, 5, sizeof(b));
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(a), "r"(b) : "memory");
    for (int i = 0; i < kBytes; ++i) acc[i] += a[i] * b[i];
  }
  asm volatile("" : : "r"(acc) : "memory");
  return 2.0 * kBytes;
}

double popcount(int64_t rounds) {
  constexpr int kWords = 8;
  uint64_t a[kWords], acc[kWords] = {};
  std::memset(a, 0x5a, sizeof(a));
  const uint64_t b = 0x3c3c3c3c3c3c3c3c;
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(a) : "memory");
    for (int i = 0; i < kWords; ++i) acc[i] += static_cast<uint64_t>(__builtin_popcountll(a[i] & b));
  }
  asm volatile("" : : "r"(acc) : "memory");
  return 2.0 * 64 * kWords;
}

double lookup(int64_t rounds) {
  constexpr int kBytes = 64;
  uint8_t places[kBytes], found[kBytes], table[16];
  std::memset(places, 3, sizeof(places));
  std::memset(table, 5, sizeof(table));
  for (int64_t r = 0; r < rounds; ++r) {
    asm volatile("" : : "r"(places), "r"(table) : "memory");
    for (int i = 0; i < kBytes; ++i) found[i] = table[places[i]];
    asm volatile("" : : "r"(found) : "memory");
  }
  return 2.0 * kCodesALookup * kBytes;
}

}  // namespace portable

// Vec: a vector of 64-bit words. Sums in eight chains; the sum is made opaque so that the reads happen.
template <class Vec>
[[gnu::always_inline]] inline void read_words(const void* source, size_t bytes, int64_t repeats) {
  const size_t count = bytes / sizeof(Vec);
  for (int64_t r = 0; r < repeats; ++r) {
    const Vec* const from = static_cast<const Vec*>(source);
    Vec sum[8] = {};
    size_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int u = 0; u < 8; ++u) sum[u] += from[i + u];
    for (; i < count; ++i) sum[0] += from[i];
    for (int u = 1; u < 8; ++u) sum[0] += sum[u];
    asm volatile("" : : "m"(sum[0]) : "memory");
  }
}

template <class Vec>
[[gnu::always_inline]] inline void copy_words(void* destination, const void* source, size_t bytes, int64_t repeats) {
  const size_t count = bytes / sizeof(Vec);
  for (int64_t r = 0; r < repeats; ++r) {
    const Vec* const from = static_cast<const Vec*>(source);
    Vec* const to = static_cast<Vec*>(destination);
    size_t i = 0;
    for (; i + 4 <= count; i += 4) {
      const Vec v0 = from[i], v1 = from[i + 1], v2 = from[i + 2], v3 = from[i + 3];
      to[i] = v0, to[i + 1] = v1, to[i + 2] = v2, to[i + 3] = v3;
    }
    for (; i < count; ++i) to[i] = from[i];
    asm volatile("" : : "r"(destination) : "memory");
  }
}

using Words128 [[gnu::vector_size(16), gnu::may_alias]] = uint64_t;

#if defined(__x86_64__)
using Words256 [[gnu::vector_size(32), gnu::may_alias]] = uint64_t;
using Words512 [[gnu::vector_size(64), gnu::may_alias]] = uint64_t;

namespace avx2 {

[[gnu::target("avx2,fma")]] double fp32(int64_t rounds) {
  __m256 acc[kChains], a = _mm256_set1_ps(1.0f), b = _mm256_setzero_ps();
  for (auto& v : acc) v = a;
  QK_OPAQUE(a);
  QK_OPAQUE(b);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) v = _mm256_fmadd_ps(v, a, b);
  for (auto& v : acc) QK_OPAQUE(v);
  return 2.0 * 8 * kChains;
}

// maddubs, widen by madd, add: what a kernel without VNNI does for 32 products.
[[gnu::target("avx2")]] double int8(int64_t rounds) {
  constexpr int kSums = 10;
  __m256i acc[kSums], a = _mm256_set1_epi8(3), b = _mm256_set1_epi8(5);
  const __m256i ones = _mm256_set1_epi16(1);
  for (auto& v : acc) v = _mm256_setzero_si256();
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) {
      QK_OPAQUE(a);
      v = _mm256_add_epi32(v, _mm256_madd_epi16(_mm256_maddubs_epi16(a, b), ones));
    }
  for (auto& v : acc) QK_OPAQUE(v);
  return 2.0 * 32 * kSums;
}

// Mula's table of nibbles: counts of bytes, summed as bytes eight at a time before they are widened.
[[gnu::target("avx2")]] double popcount(int64_t rounds) {
  constexpr int kSums = 4, kInner = 8;
  const __m256i table =
      _mm256_setr_epi8(0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4, 0, 1, 1, 2, 1, 2, 2, 3, 1, 2, 2, 3, 2, 3, 3, 4);
  const __m256i low = _mm256_set1_epi8(15), zero = _mm256_setzero_si256();
  __m256i acc[kSums], a = _mm256_set1_epi8(0x5a), b = _mm256_set1_epi8(0x3c);
  for (auto& v : acc) v = zero;
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) {
      __m256i bytes = zero;
      for (int i = 0; i < kInner; ++i) {
        QK_OPAQUE(a);
        const __m256i both = _mm256_and_si256(a, b);
        const __m256i high = _mm256_and_si256(_mm256_srli_epi16(both, 4), low);
        bytes = _mm256_add_epi8(bytes, _mm256_shuffle_epi8(table, _mm256_and_si256(both, low)));
        bytes = _mm256_add_epi8(bytes, _mm256_shuffle_epi8(table, high));
      }
      v = _mm256_add_epi64(v, _mm256_sad_epu8(bytes, zero));
    }
  for (auto& v : acc) QK_OPAQUE(v);
  return 2.0 * 256 * kSums * kInner;
}

[[gnu::target("avx2")]] double lookup(int64_t rounds) {
  __m256i found[kChains], table = _mm256_set1_epi8(5);
  for (auto& v : found) v = _mm256_set1_epi8(3);
  QK_OPAQUE(table);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : found) v = _mm256_shuffle_epi8(table, v);
  for (auto& v : found) QK_OPAQUE(v);
  return 2.0 * kCodesALookup * 32 * kChains;
}

[[gnu::target("avx2")]] void read(const void* source, size_t bytes, int64_t repeats) {
  read_words<Words256>(source, bytes, repeats);
}
[[gnu::target("avx2")]] void copy(void* destination, const void* source, size_t bytes, int64_t repeats) {
  copy_words<Words256>(destination, source, bytes, repeats);
}

}  // namespace avx2

namespace avx512 {

[[gnu::target("avx512f")]] double fp32(int64_t rounds) {
  __m512 acc[kChains], a = _mm512_set1_ps(1.0f), b = _mm512_setzero_ps();
  for (auto& v : acc) v = a;
  QK_OPAQUE_512(a);
  QK_OPAQUE_512(b);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) v = _mm512_fmadd_ps(v, a, b);
  for (auto& v : acc) QK_OPAQUE_512(v);
  return 2.0 * 16 * kChains;
}

[[gnu::target("avx512f,avx512vnni")]] double int8(int64_t rounds) {
  __m512i acc[kChains], a = _mm512_set1_epi32(0x03030303), b = _mm512_set1_epi32(0x05050505);
  for (auto& v : acc) v = _mm512_setzero_si512();
  QK_OPAQUE_512(a);
  QK_OPAQUE_512(b);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) v = _mm512_dpbusd_epi32(v, a, b);
  for (auto& v : acc) QK_OPAQUE_512(v);
  return 2.0 * 64 * kChains;
}

[[gnu::target("avx512f,avx512vpopcntdq")]] double popcount(int64_t rounds) {
  __m512i acc[kChains], a = _mm512_set1_epi32(0x5a5a5a5a), b = _mm512_set1_epi32(0x3c3c3c3c);
  for (auto& v : acc) v = _mm512_setzero_si512();
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : acc) {
      QK_OPAQUE_512(a);
      v = _mm512_add_epi64(v, _mm512_popcnt_epi64(_mm512_and_si512(a, b)));
    }
  for (auto& v : acc) QK_OPAQUE_512(v);
  return 2.0 * 512 * kChains;
}

[[gnu::target("avx512f,avx512vbmi")]] double lookup(int64_t rounds) {
  __m512i found[kChains], table = _mm512_set1_epi32(0x05050505);
  for (auto& v : found) v = _mm512_set1_epi32(0x03030303);
  QK_OPAQUE_512(table);
  for (int64_t r = 0; r < rounds; ++r)
    for (auto& v : found) v = _mm512_permutexvar_epi8(v, table);
  for (auto& v : found) QK_OPAQUE_512(v);
  return 2.0 * kCodesALookup * 64 * kChains;
}

[[gnu::target("avx512f")]] void read(const void* source, size_t bytes, int64_t repeats) {
  read_words<Words512>(source, bytes, repeats);
}
[[gnu::target("avx512f")]] void copy(void* destination, const void* source, size_t bytes, int64_t repeats) {
  copy_words<Words512>(destination, source, bytes, repeats);
}
// Whole cache lines written past the caches: no line is read only to be overwritten.
[[gnu::target("avx512f")]] void copy_bypass(void* destination, const void* source, size_t bytes, int64_t repeats) {
  const size_t count = bytes / 64;
  for (int64_t r = 0; r < repeats; ++r) {
    const char* const from = static_cast<const char*>(source);
    char* const to = static_cast<char*>(destination);
    for (size_t i = 0; i < count; ++i)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to + 64 * i), _mm512_load_si512(from + 64 * i));
    _mm_sfence();
  }
}

}  // namespace avx512
#endif

struct Loops {
  double (*peak[4])(int64_t);  // by Unit
  void (*read)(const void*, size_t, int64_t);
  void (*copy)(void*, const void*, size_t, int64_t);
  void (*copy_bypass)(void*, const void*, size_t, int64_t);
};

const Loops& loops() {
#if defined(__x86_64__)
  static const Loops with_avx512{
      {avx512::fp32, avx512::int8, avx512::popcount, avx512::lookup}, avx512::read, avx512::copy, avx512::copy_bypass};
  static const Loops with_avx2{{avx2::fp32, avx2::int8, avx2::popcount, avx2::lookup}, avx2::read, avx2::copy, avx2::copy};
  if (chosen_isa() >= Isa::kZen4) return with_avx512;
  if (chosen_isa() == Isa::kAvx2) return with_avx2;
#endif
  static const Loops plain{{portable::fp32, portable::int8, portable::popcount, portable::lookup},
                           read_words<Words128>,
                           copy_words<Words128>,
                           copy_words<Words128>};
  return plain;
}

}  // namespace

PeakRun run_peak(Unit unit, int64_t rounds) {
  const auto loop = loops().peak[static_cast<int>(unit)];
  const double begin = now();
  const double operations = loop(rounds);
  return {begin, now(), operations * static_cast<double>(rounds)};
}

PeakRun run_read(const void* source, size_t bytes, int64_t repeats) {
  const double begin = now();
  loops().read(source, bytes, repeats);
  return {begin, now(), static_cast<double>(bytes) * static_cast<double>(repeats)};
}

PeakRun run_copy(void* destination, const void* source, size_t bytes, int64_t repeats, bool bypass) {
  const auto loop = bypass ? loops().copy_bypass : loops().copy;
  const double begin = now();
  loop(destination, source, bytes, repeats);
  return {begin, now(), 2.0 * static_cast<double>(bytes) * static_cast<double>(repeats)};
}

}  // namespace qk::cpu

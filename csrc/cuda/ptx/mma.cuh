#pragma once
// mma.sync: a warp multiplies integer matrices on the tensor cores, exactly. All 32 lanes must arrive together.
//
// Lane 4 * g + t holds, of A [16 rows, K], registers a[0..3]: row g part t, row g + 8 part t, row g part t + 4, row g + 8
// part t + 4, where a row is eight parts of 32 bits; of B [8 columns, K] parts t and t + 4 of column g; of D [16, 8] row g,
// columns 2 t and 2 t + 1, then the same of row g + 8. The order of the parts is the same in A and B, so any order will do.

#include <cuda_runtime.h>

#include <cstdint>

namespace qk::cuda::ptx {

#if defined(QK_EMULATOR)

struct MmaLane {
  const uint32_t* a;
  const uint32_t* b;
  int32_t* d;
};

// Lane's four sums, from the registers of all lanes. kDot: of two 32-bit parts.
template <int32_t (*kDot)(uint32_t, uint32_t)>
bool resolve_mma(const emu::Exchange& all, int lane, uint64_t*) {
  const auto at = [&](int l) { return reinterpret_cast<const MmaLane*>(all.value[l]); };
  int32_t* const d = at(lane)->d;
  for (int row = 0; row < 2; ++row)
    for (int column = 0; column < 2; ++column) {
      uint32_t sum = static_cast<uint32_t>(d[2 * row + column]);  // wraps as the device's does
      for (int part = 0; part < 8; ++part)
        sum += static_cast<uint32_t>(kDot(at(lane / 4 * 4 + part % 4)->a[2 * (part / 4) + row],
                                          at(lane % 4 * 8 + 4 * column + part % 4)->b[part / 4]));
      d[2 * row + column] = static_cast<int32_t>(sum);
    }
  return true;
}

inline int32_t dot_bytes(uint32_t a, uint32_t b) { return static_cast<int32_t>(__dp4a(a, b, 0u)); }
inline int32_t dot_bits(uint32_t a, uint32_t b) { return __popc(a & b); }

template <int32_t (*kDot)(uint32_t, uint32_t)>
void emulate_mma(int32_t* d, const uint32_t* a, const uint32_t* b, const emu::Where& where) {
  const MmaLane mine{a, b, d};
  emu::exchange(0xffffffffu, reinterpret_cast<uint64_t>(&mine), 0, emu::kWarp, resolve_mma<kDot>, where);
}

inline void mma_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                   emu::Where where = emu::Where::current()) {
  emulate_mma<dot_bytes>(d, a, b, where);
}
inline void mma_b1(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2],
                   emu::Where where = emu::Where::current()) {
  emulate_mma<dot_bits>(d, a, b, where);
}

#else

// d += a * b of unsigned bytes, K = 32.
__device__ __forceinline__ void mma_u8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// d += popcount(a & b), K = 256 bits. An instruction up to sm_90; newer targets emulate it, slower than mma_u8.
__device__ __forceinline__ void mma_b1(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k256.row.col.s32.b1.b1.s32.and.popc {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

#endif

}  // namespace qk::cuda::ptx

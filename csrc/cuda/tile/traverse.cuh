#pragma once
// One pass over a tensor for every element-wise family: reads each input once, writes the output once, reduces on the way.
// An Op says what happens to an element:
//
//   using T, Out, Reduction                   element types, Out void where nothing is written; Reduction: tile/reduce.cuh
//   static constexpr int kInputs, kUnroll     tensors read; packs of each that a thread has in flight
//   static constexpr int kMinBlocks           of a multiprocessor: how many threads must share its registers
//   static constexpr bool kWideColumns        whether a thread affords the parameters of a pack of columns
//   const T* in[kInputs]; Out* out; Reduction reduction;
//   Params params(int64_t channel) const
//   float operator()(const float (&in)[kInputs], const Params&, float* sums) const      its result is stored
//
// or, in place of the last one, for several elements with the same parameters, so that what they decide is decided once:
//
//   void all(const float (&in)[kInputs][kSize], const Params&, float* sums, float (&out)[kSize]) const, for every kSize.
//       An input of zeros adds nothing to the sums. Out may be null: nothing is written then.

#include <type_traits>

#include "cuda/tile/launch.cuh"
#include "cuda/tile/reduce.cuh"

namespace qk::cuda {

template <class Op>
inline constexpr Shape kShapeOf = {kPackSize<typename Op::T>, Op::kWideColumns ? kPackSize<typename Op::T> : 1, Op::kUnroll};

template <class Op>
concept TakesAll = requires(const Op& op, const float (&in)[Op::kInputs][1], const typename Op::Params& params, float* sums,
                            float (&out)[1]) { op.all(in, params, sums, out); };

// The elements [lo, hi) of a pack. Parameters and sums are those of the whole pack, or one for each element.
template <bool kWhole, class Op, int kSize, int kChannels>
__device__ __forceinline__ void compute(const Op& op, const Pack<typename Op::T, kSize> (&in)[Op::kInputs], int lo, int hi,
                                        const typename Op::Params (&params)[kChannels],
                                        Accumulators<typename Op::Reduction> (&sums)[kChannels], float (&out)[kSize]) {
  if constexpr (TakesAll<Op>) {
    static_assert(kChannels == 1);
    constexpr int kAtOnce = kSize < 4 ? kSize : 4;  // more would cost registers, and save few branches
#pragma unroll
    for (int first = 0; first < kSize; first += kAtOnce) {
      float values[Op::kInputs][kAtOnce], results[kAtOnce];
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i)
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) values[i][e] = to_float(in[i].v[first + e]);
      op.all(values, params[0], sums[0].v, results);
#pragma unroll
      for (int e = 0; e < kAtOnce; ++e) out[first + e] = results[e];
    }
  } else {
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      if (!kWhole && (e < lo || e >= hi)) continue;
      float value[Op::kInputs];
#pragma unroll
      for (int i = 0; i < Op::kInputs; ++i) value[i] = to_float(in[i].v[e]);
      constexpr bool kShared = kChannels == 1;
      out[e] = op(value, params[kShared ? 0 : e], sums[kShared ? 0 : e].v);
    }
  }
}

template <bool kWhole, class Op, int kSize>
__device__ __forceinline__ void store(const Op& op, int64_t at, const float (&values)[kSize], int lo, int hi) {
  using Out = typename Op::Out;
  if constexpr (!std::is_void_v<Out>) {
    if (TakesAll<Op> && op.out == nullptr) return;
    Pack<Out, kSize> out{};
#pragma unroll
    for (int e = 0; e < kSize; ++e)
      if (kWhole || (e >= lo && e < hi)) out.v[e] = from_float<Out>(values[e]);
    store_pack<Out, kSize, kWhole>(op.out + at, out, lo, hi);
  }
}

// kPacks whole packs of kSize elements, at base, base + stride, ... All loads come before the first use.
template <int kSize, class Op, int kChannels>
__device__ __forceinline__ void process_packs(const Op& op, int64_t base, int64_t stride,
                                              const typename Op::Params (&params)[kChannels],
                                              Accumulators<typename Op::Reduction> (&sums)[kChannels]) {
  using T = typename Op::T;
  Pack<T, kSize> in[Op::kUnroll][Op::kInputs];
#pragma unroll
  for (int u = 0; u < Op::kUnroll; ++u)
#pragma unroll
    for (int i = 0; i < Op::kInputs; ++i) in[u][i] = load_pack<T, kSize, true>(op.in[i] + base + u * stride, 0, kSize);
#pragma unroll
  for (int u = 0; u < Op::kUnroll; ++u) {
    float out[kSize];
    compute<true>(op, in[u], 0, kSize, params, sums, out);
    store<true>(op, base + u * stride, out, 0, kSize);
  }
}

// One pack, or the elements [lo, hi) of it: the ends of runs, and whatever is not aligned.
template <int kSize, class Op, int kChannels>
__device__ __forceinline__ void process_pack(const Op& op, int64_t base, bool whole, int lo, int hi,
                                             const typename Op::Params (&params)[kChannels],
                                             Accumulators<typename Op::Reduction> (&sums)[kChannels]) {
  using T = typename Op::T;
  Pack<T, kSize> in[Op::kInputs];
#pragma unroll
  for (int i = 0; i < Op::kInputs; ++i) {
    const T* const p = op.in[i] + base;
    in[i] = whole ? load_pack<T, kSize, true>(p, lo, hi) : load_pack<T, kSize, false>(p, lo, hi);
  }
  float out[kSize];
  compute<false>(op, in, lo, hi, params, sums, out);
  whole ? store<true>(op, base, out, lo, hi) : store<false>(op, base, out, lo, hi);
}

// A thread's Op::kUnroll packs: together if all are whole, else one by one.
template <int kSize, class Op, int kChannels>
__device__ __forceinline__ void process(const Op& op, bool all_whole, int64_t base, int64_t stride, int64_t lo, int64_t hi,
                                        bool aligned, const typename Op::Params (&params)[kChannels],
                                        Accumulators<typename Op::Reduction> (&sums)[kChannels]) {
  if (all_whole) return process_packs<kSize>(op, base, stride, params, sums);
#pragma unroll 1
  for (int u = 0; u < Op::kUnroll && hi > 0; ++u, base += stride, lo -= stride, hi -= stride)
    process_pack<kSize>(op, base, aligned && lo <= 0 && hi >= kSize, static_cast<int>(max(lo, int64_t{0})),
                        static_cast<int>(min(hi, int64_t{kSize})), params, sums);
}

template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kMinBlocks)
    runs_kernel(const Op op, const Walk walk,
                float* __restrict__ partial) {  // [channels, partials, kSums]
  constexpr int kSize = kPackSize<typename Op::T>;
  const int64_t group = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) / walk.lanes;
  const int64_t channel = group / walk.slices, slice = group % walk.slices;
  const int lane = static_cast<int>(threadIdx.x) % walk.lanes;
  const bool ours = channel < walk.layout.channels;
  Accumulators<typename Op::Reduction> sums[1];
  if (ours) {
    const typename Op::Params params[1] = {op.params(channel)};
    const int stride = walk.lanes * kSize;
    for (auto chunk = static_cast<uint32_t>(slice); chunk < walk.chunks; chunk += static_cast<uint32_t>(walk.slices)) {
      const int64_t begin = (chunk / walk.pieces * walk.layout.channels + channel) * walk.layout.inner;
      const int64_t end = begin + walk.layout.inner;
      const int64_t first = begin / kSize * kSize + static_cast<int64_t>(chunk % walk.pieces) * stride * Op::kUnroll;
      const int64_t base = first + lane * kSize;
      const bool whole = walk.aligned && first >= begin && first + stride * Op::kUnroll <= end;
      process<kSize>(op, whole, base, stride, begin - base, end - base, walk.aligned, params, sums);
    }
  }
  if constexpr (Op::Reduction::kSums > 0) {
    sums[0].merge_lanes(walk.lanes);
    if (walk.warps > 1) sums[0].merge_warps();  // then all groups of the block share a channel
    if (ours && threadIdx.x % (walk.lanes * walk.warps) == 0)
      put(op.reduction, sums[0], channel, slice / walk.warps, walk.partials, partial);
  }
}

// Block (stripe of columns, slice of rows): a warp a row, a lane a pack of columns.
template <class Op>
__global__ void __launch_bounds__(kThreads, Op::kMinBlocks)
    columns_kernel(const Op op, const Walk walk,
                   float* __restrict__ partial) {  // [channels, partials, kSums]
  using Reduction = typename Op::Reduction;
  constexpr int kSize = kShapeOf<Op>.columns;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int64_t column = (static_cast<int64_t>(blockIdx.x) * 32 + lane) * kSize,
                row_size = walk.layout.channels * walk.layout.inner;
  const bool ours = column < walk.period;
  Accumulators<Reduction> sums[kSize];
  if (ours) {
    typename Op::Params params[kSize];
#pragma unroll
    for (int e = 0; e < kSize; ++e) params[e] = op.params((column + e) / walk.layout.inner % walk.layout.channels);
    const int64_t stride = kWarps * walk.period, numel = walk.layout.numel();
    for (int64_t row = static_cast<int64_t>(blockIdx.y) * kWarps * Op::kUnroll + warp; row < walk.rows;
         row += static_cast<int64_t>(gridDim.y) * kWarps * Op::kUnroll) {
      const int64_t base = row * walk.period + column;
      const bool whole = walk.aligned && base + (Op::kUnroll - 1) * stride + kSize <= numel;
      process<kSize>(op, whole, base, stride, 0, numel - base, walk.aligned, params, sums);
    }
  }
  if constexpr (Reduction::kSums > 0) {
    __shared__ float rows[kWarps][32][Reduction::kSums];
#pragma unroll
    for (int e = 0; e < kSize; ++e) {
      __syncthreads();  // rows[] of the column before has been read
#pragma unroll
      for (int s = 0; s < Reduction::kSums; ++s) rows[warp][lane][s] = sums[e].v[s];
      __syncthreads();
      if (warp != 0 || !ours) continue;
      for (int w = 1; w < kWarps; ++w) sums[e].merge(rows[w][lane]);
      // The channel's columns in one repeated row, then the slices.
      const int64_t c = column + e, mine = c / row_size * walk.layout.inner + c % walk.layout.inner;
      put(op.reduction, sums[e], c / walk.layout.inner % walk.layout.channels,
          blockIdx.y * (walk.period / walk.layout.channels) + mine, walk.partials, partial);
    }
  }
}

template <class Op>
bool aligned(const Op& op) {
  const auto multiple = [](const void* p, size_t bytes) { return reinterpret_cast<uintptr_t>(p) % bytes == 0; };
  bool all = true;
  for (const auto* in : op.in) all = all && multiple(in, 16);
  if constexpr (!std::is_void_v<typename Op::Out>)
    all = all && multiple(op.out, sizeof(typename Op::Out) * kPackSize<typename Op::T>);
  return all;
}

template <class Reduction>
void combine(const Context& context, const Reduction& reduction, const float* partial, int64_t channels, int64_t count) {
  const int warps = count > kThreads ? kWarps : 1;  // so few partial sums are not worth a barrier
  launch(context, blocks(divide_up(channels * warps, kWarps)), kThreads, combine_kernel<Reduction>, reduction, partial,
         channels, count, warps);
}

// One launch, and a second one where a channel is reduced by more than one block.
template <class Op>
void traverse(const Context& context, const Layout& layout, const Op& op) {
  constexpr Shape kShape = kShapeOf<Op>;
  using Reduction = typename Op::Reduction;
  const Walk walk = walk_of(layout, kShape, aligned(op), context.multiprocessors);
  const bool two_stages = Reduction::kSums > 0 && walk.partials > 1;
  float* const partial = two_stages ? context.workspace(layout.channels * walk.partials * Reduction::kSums) : nullptr;
  if (walk.by_columns) {
    launch(context, blocks(columns_blocks(walk, kShape), walk.slices), kThreads, columns_kernel<Op>, op, walk, partial);
  } else {
    launch(context, blocks(runs_blocks(walk)), kThreads, runs_kernel<Op>, op, walk, partial);
  }
  if constexpr (Reduction::kSums > 0)
    if (two_stages) combine(context, op.reduction, partial, layout.channels, walk.partials);
}

}  // namespace qk::cuda

// The CPU backend: csrc/cpu behind the shared checks.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cpu/blocks.h"
#include "cpu/kernels.h"
#include "cpu/parallel.h"
#include "cpu/shares.h"
#include "ops/attention.h"
#include "ops/bitplanes.h"
#include "ops/conv.h"
#include "ops/fake_quantize.h"
#include "ops/learned_basis.h"
#include "ops/matmul.h"
#include "ops/stats.h"

namespace qk::ops {
namespace {

// Kernels split their work through torch's thread pool, so torch.set_num_threads holds for them too.
[[maybe_unused]] const bool kParallelSet = [] {
  cpu::set_parallel_for([](int64_t count, int64_t grain, int64_t pieces, void* context, cpu::Body body) {
    const int64_t threads = torch::stable::get_num_threads();
    cpu::Shares shares(count, grain, threads, pieces);
    if (shares.size() == 1) return body(context, 0, count);
    torch::stable::parallel_for(0, shares.size(), 1, [&](int64_t begin, int64_t end) {
      for (int64_t share = begin; share < end; ++share) shares.work(share, context, body);
    });
  });
  return true;
}();

[[maybe_unused]] const bool kBlocksSet = [] {
  static const BlockSource source{cpu::kSmallestBlock, cpu::take_block, cpu::give_block};
  if (cpu::kept_limit() > 0) block_source = &source;
  return true;
}();

struct Cpu {
  static void channel_stats(const StatsArgs& args, const Tensor&) { cpu::kernels().channel_stats(args); }
  static void conditional_abs_mean(const ConditionalMeanArgs& args, const Tensor&) {
    cpu::kernels().conditional_abs_mean(args);
  }
  static void range_errors(const RangeErrorsArgs& args, const Tensor&) { cpu::kernels().range_errors(args); }
  static void fake_quantize_forward(const FakeQuantizeArgs& args, const Tensor&) {
    cpu::kernels().fake_quantize_forward(args);
  }
  static void fake_quantize_backward(const FakeQuantizeArgs& args, const Tensor&) {
    cpu::kernels().fake_quantize_backward(args);
  }
  static void fake_quantize_masked(const FakeQuantizeArgs& args, const Tensor&) {
    cpu::kernels().fake_quantize_masked(args);
  }
  static void apply_mask(const ApplyMaskArgs& args, const Tensor&) { cpu::kernels().apply_mask(args); }
  static void attention_quantize_forward(const AttentionArgs& args, const Tensor&) {
    cpu::kernels().attention_quantize_forward(args);
  }
  static void attention_quantize_backward(const AttentionArgs& args, const Tensor&) {
    cpu::kernels().attention_quantize_backward(args);
  }
  static void learned_basis_forward(const LearnedBasisArgs& args, const Tensor&) {
    cpu::kernels().learned_basis_forward(args);
  }
  static void learned_basis_backward(const LearnedBasisArgs& args, const Tensor&) {
    cpu::kernels().learned_basis_backward(args);
  }
  static void learned_basis_encode(const LearnedEncodeArgs& args, const Tensor&) {
    cpu::kernels().learned_basis_encode(args);
  }
  static void encode(const EncodeArgs& args, const Tensor&) { cpu::kernels().encode(args); }
  static void pack_bitplanes(const PackArgs& args, const Tensor&) { cpu::kernels().pack_bitplanes(args); }
  static void unpack_bitplanes(const UnpackArgs& args, const Tensor&) { cpu::kernels().unpack_bitplanes(args); }
  static void quantize_pack(const QuantizePackArgs& args, const Tensor&) { cpu::kernels().quantize_pack(args); }
  static void lowbit_linear(const LowbitArgs& args, const Tensor&) { cpu::kernels().lowbit_linear(args); }
  static void lowbit_conv2d(const LowbitArgs& args, const Tensor&) { cpu::kernels().lowbit_conv2d(args); }
  static int64_t prepacked_bytes(const LowbitArgs& args) { return cpu::kernels().prepacked_bytes(args); }
  static void prepack(const LowbitArgs& args, uint8_t* to) { cpu::kernels().prepack(args, to); }
};

}  // namespace
}  // namespace qk::ops

STABLE_TORCH_LIBRARY_IMPL(quantkernels, CPU, m) {
  using namespace qk::ops;
  m.impl("channel_stats", TORCH_BOX(&channel_stats<Cpu>));
  m.impl("minmax_grids", TORCH_BOX(&minmax_grids<Cpu>));
  m.impl("conditional_abs_mean", TORCH_BOX(&conditional_abs_mean<Cpu>));
  m.impl("range_errors", TORCH_BOX(&range_errors<Cpu>));
  m.impl("fake_quantize", TORCH_BOX(&fake_quantize<Cpu>));
  m.impl("fake_quantize_backward", TORCH_BOX(&fake_quantize_backward<Cpu>));
  m.impl("fake_quantize_masked", TORCH_BOX(&fake_quantize_masked<Cpu>));
  m.impl("apply_mask", TORCH_BOX(&apply_mask<Cpu>));
  m.impl("attention_quantize", TORCH_BOX(&attention_quantize<Cpu>));
  m.impl("minmax_attention_quantize", TORCH_BOX(&minmax_attention_quantize<Cpu>));
  m.impl("attention_quantize_backward", TORCH_BOX(&attention_quantize_backward<Cpu>));
  m.impl("attention_gradient", TORCH_BOX(&attention_gradient<Cpu>));
  m.impl("learned_basis_quantize", TORCH_BOX(&learned_basis_quantize<Cpu>));
  m.impl("learned_basis_quantize_backward", TORCH_BOX(&learned_basis_quantize_backward<Cpu>));
  m.impl("learned_basis_encode", TORCH_BOX(&learned_basis_encode<Cpu>));
  m.impl("encode", TORCH_BOX(&encode<Cpu>));
  m.impl("pack_bitplanes", TORCH_BOX(&pack_bitplanes<Cpu>));
  m.impl("unpack_bitplanes", TORCH_BOX(&unpack_bitplanes<Cpu>));
  m.impl("quantize_pack", TORCH_BOX(&quantize_pack<Cpu>));
  m.impl("lowbit_linear", TORCH_BOX(&lowbit_linear<Cpu>));
  m.impl("lowbit_conv2d", TORCH_BOX(&lowbit_conv2d<Cpu>));
  m.impl("prepack_weight", TORCH_BOX(&prepack_weight<Cpu>));
}

// For quantkernels.empty_cache: there is no tensor in it, so no op.
extern "C" __attribute__((visibility("default"))) size_t qk_empty_cache() { return qk::cpu::release_blocks(); }

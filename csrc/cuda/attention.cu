// attention_quantize: one pass for all members, whatever their number.

#include "cuda/attention.cuh"

namespace qk::cuda {
namespace {

template <int kMax>
Members<kMax> members_of(const AttentionArgs& args) {
  Members<kMax> members{};
  members.count = static_cast<int>(args.count);
  members.channels = args.layout.channels;
  members.attention = args.attention;
  members.grids = args.grids;
  for (int k = 0; k < members.count; ++k) {
    members.kinds[k] = args.kinds[k];
    members.stes[k] = args.stes[k];
    members.levels[k] = static_cast<float>(args.levels[k]);
  }
  return members;
}

// Calls f.template operator()<kMax>() with the smaller kernel that has room for the members.
template <class F>
void with_members(const AttentionArgs& args, const F& f) {
  args.count > 4 ? f.template operator()<kMaxQuantizers>() : f.template operator()<4>();
}

}  // namespace

void attention_quantize_forward(const AttentionArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, [&]<int kMax>() {
      traverse(
          context, args.layout,
          AttentionForward<T, kMax>{{static_cast<const T*>(args.x)}, static_cast<T*>(args.out), members_of<kMax>(args), {}});
    });
  });
}

void attention_quantize_backward(const AttentionArgs& args, const Context& context) {
  const int64_t channels = args.layout.channels;
  // A single channel's contribution to the gradient of attention is that gradient.
  float* const contribution = channels > 1 ? context.workspace(channels * kMaxQuantizers) : args.grad_attention;
  with_type(args.dtype, [&]<class T>(T*) {
    with_members(args, [&]<int kMax>() {
      const Members<kMax> members = members_of<kMax>(args);
      AttentionSums<kMax> sums{{}, members.count, channels, {}, args.grids, args.sums, contribution};
      std::copy_n(members.kinds, kMax, sums.kinds);
      traverse(
          context, args.layout,
          AttentionBackward<T, kMax>{
              {static_cast<const T*>(args.grad), static_cast<const T*>(args.x)}, static_cast<T*>(args.out), members, sums});
    });
  });
  if (channels > 1)
    combine(context, AttentionTotals{{}, static_cast<int>(args.count), args.grad_attention}, contribution, 1, channels);
}

}  // namespace qk::cuda

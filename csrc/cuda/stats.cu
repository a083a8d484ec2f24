// The statistics: one pass each, but a pass for every eight candidates of range_errors.

#include "cuda/stats.cuh"

namespace qk::cuda {

void channel_stats(const StatsArgs& args, const Context& context) {
  with_type(args.dtype,
            [&]<class T>(T*) { traverse(context, args.layout, ChannelStats<T>{{static_cast<const T*>(args.x)}, {args}}); });
}

void conditional_abs_mean(const ConditionalMeanArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    traverse(context, args.layout, ConditionalMean<T>{{static_cast<const T*>(args.x)}, args.threshold, {{}, args.mean}});
  });
}

void range_errors(const RangeErrorsArgs& args, const Context& context) {
  with_type(args.dtype, [&]<class T>(T*) {
    for (int64_t first = 0; first < args.candidates; first += kRangesAtOnce) {
      const auto count = static_cast<int>(std::min<int64_t>(kRangesAtOnce, args.candidates - first));
      traverse(context, args.layout,
               RangeErrors<T>{{static_cast<const T*>(args.x)},
                              args.ranges + first,
                              static_cast<float>(args.levels),
                              {{}, args.errors + first, args.candidates, count}});
    }
  });
}

}  // namespace qk::cuda

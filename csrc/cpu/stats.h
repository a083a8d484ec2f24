#pragma once
#include "core/args.h"

namespace qk::cpu::QK_CPU_ISA {

void channel_stats(const StatsArgs& args);
void conditional_abs_mean(const ConditionalMeanArgs& args);
void range_errors(const RangeErrorsArgs& args);

}  // namespace qk::cpu::QK_CPU_ISA

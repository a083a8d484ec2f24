// Bank conflicts of shared memory: csrc/emu/emulator.h says what is counted.

#include <algorithm>
#include <array>
#include <map>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "emu/emulator.h"

namespace qk::emu {
namespace {

constexpr uintptr_t kBankBytes = 4, kBanks = 32;

struct Access {
  int lane;
  uintptr_t address;
  size_t bytes;
};

struct Count {
  int64_t instructions = 0;
  int64_t passes = 0;     // over the banks
  int64_t conflicts = 0;  // passes beyond those that the width of the access asks for
};

using Site = std::pair<std::string, unsigned>;        // file, line
using Instruction = std::tuple<Site, unsigned, int>;  // its warp and how often the lane came by before

bool counting = false;
std::map<Site, Count> counts;
std::map<Instruction, std::vector<Access>> pending;
std::map<std::pair<Site, unsigned>, int> visits;  // by site and thread
std::array<unsigned, 3> block{};

// Lanes whose accesses the hardware takes together: 128 bytes' worth.
Count count_of(const std::vector<Access>& accesses) {
  Count count{1, 0, 0};
  size_t widest = kBankBytes;
  for (const Access& a : accesses) widest = std::max(widest, a.bytes);
  const int lanes = static_cast<int>(kBanks * kBankBytes / widest);
  for (int first = 0; first < kWarp; first += lanes) {
    std::array<std::set<uintptr_t>, kBanks> words;
    bool any = false;
    for (const Access& a : accesses) {
      if (a.lane < first || a.lane >= first + lanes) continue;
      any = true;
      for (uintptr_t word = a.address / kBankBytes; word <= (a.address + a.bytes - 1) / kBankBytes; ++word)
        words[word % kBanks].insert(word);
    }
    size_t passes = 0;
    for (const auto& bank : words) passes = std::max(passes, bank.size());
    count.passes += static_cast<int64_t>(passes);
    count.conflicts += static_cast<int64_t>(passes) - any;
  }
  return count;
}

void settle() {
  for (const auto& [instruction, accesses] : pending) {
    const Count one = count_of(accesses);
    Count& all = counts[std::get<0>(instruction)];
    all.instructions += one.instructions, all.passes += one.passes, all.conflicts += one.conflicts;
  }
  pending.clear();
  visits.clear();
}

}  // namespace

void shared_access(const void* shared, size_t bytes, const Where& where) {
  if (!counting) return;
  const std::array<unsigned, 3> here{blockIdx.x, blockIdx.y, blockIdx.z};
  if (here != block) settle();
  block = here;
  const std::string file = where.file_name();
  const Site site{file.substr(file.rfind('/') + 1), where.line()};
  const unsigned thread = threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
  const int visit = visits[{site, thread}]++;
  pending[{site, thread / kWarp, visit}].push_back(
      {static_cast<int>(thread % kWarp), reinterpret_cast<uintptr_t>(shared), bytes});
}

}  // namespace qk::emu

// Starts or ends counting. Ending returns a line "file:line instructions passes conflicts" for each place in the code.
extern "C" __attribute__((visibility("default"))) const char* qk_emu_count_banks(int on) {
  using namespace qk::emu;
  static std::string report;
  report.clear();
  settle();
  for (const auto& [site, count] : counts)
    report += site.first + ":" + std::to_string(site.second) + " " + std::to_string(count.instructions) + " " +
              std::to_string(count.passes) + " " + std::to_string(count.conflicts) + "\n";
  counts.clear();
  counting = on != 0;
  return report.c_str();
}

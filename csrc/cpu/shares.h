#pragma once
// Work for a few threads. Each has a share of its own, the same part of a tensor from op to op, so that it finds in its
// cache what it wrote there; whoever is through helps the others, so that a thread that comes late holds nobody up.

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <vector>

#include "cpu/parallel.h"

namespace qk::cpu {

class Shares {
 public:
  // [0, count) for at most `threads` threads; a share in at most `pieces`, of at least `grain` but for the last.
  Shares(int64_t count, int64_t grain, int64_t threads, int64_t pieces)
      : shares_(std::clamp<int64_t>((count + grain - 1) / grain, 1, std::max<int64_t>(threads, 1))) {
    const int64_t each = (count + size() - 1) / size();
    chunk_ = std::max(grain, (each + pieces - 1) / pieces);
    for (int64_t s = 0; s < size(); ++s) {
      shares_[s].next = std::min(s * each, count);
      shares_[s].end = std::min((s + 1) * each, count);
    }
  }

  int64_t size() const { return static_cast<int64_t>(shares_.size()); }

  // Does share `own`, then what is left of the others.
  void work(int64_t own, void* context, Body body) {
    for (int64_t s = 0; s < size(); ++s) {
      Share& share = shares_[(own + s) % size()];
      for (int64_t begin; (begin = share.next.fetch_add(chunk_, std::memory_order_relaxed)) < share.end;)
        body(context, begin, std::min(begin + chunk_, share.end));
    }
  }

 private:
  struct alignas(64) Share {  // a cache line, so that threads do not disturb each other
    std::atomic<int64_t> next;
    int64_t end;
  };
  std::vector<Share> shares_;
  int64_t chunk_;
};

}  // namespace qk::cpu

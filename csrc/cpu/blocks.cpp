#include "cpu/blocks.h"

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>
#include <deque>
#include <mutex>

namespace qk::cpu {
namespace {

constexpr size_t kPage = 4096, kHugePage = 2 << 20;
constexpr size_t kDefaultLimitMb = 256;

size_t up_to(size_t bytes, size_t unit) { return (bytes + unit - 1) / unit * unit; }

// Blocks that can hold a huge page begin with one: a fault for 512 pages, and an entry of the page tables.
void* map_block(size_t bytes) {
  const size_t alignment = bytes >= kHugePage ? kHugePage : kPage, more = alignment - kPage;
  void* const mapped = mmap(nullptr, bytes + more, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  auto* const begin = static_cast<char*>(mapped);
  auto* const block = reinterpret_cast<char*>(up_to(reinterpret_cast<uintptr_t>(begin), alignment));
  const size_t before = block - begin;
  if (before > 0) munmap(begin, before);
  if (more > before) munmap(block + bytes, more - before);
#ifdef MADV_HUGEPAGE
  if (bytes >= kHugePage) madvise(block, bytes, MADV_HUGEPAGE);  // a wish: where it is not granted nothing changes
#endif
  return block;
}

struct Block {
  void* data;
  size_t bytes;
};

class Blocks {
 public:
  void* take(size_t bytes) {
    const std::lock_guard lock(mutex_);
    for (auto at = kept_.rbegin(); at != kept_.rend(); ++at) {
      if (at->bytes != bytes) continue;
      void* const data = at->data;
      kept_.erase(std::next(at).base());
      held_ -= bytes;
      return data;
    }
    return nullptr;
  }

  void give(Block block) {
    if (block.bytes > limit) {
      munmap(block.data, block.bytes);
      return;
    }
    const std::lock_guard lock(mutex_);
    kept_.push_back(block);
    held_ += block.bytes;
    shrink_to(limit);
  }

  size_t release() {
    const std::lock_guard lock(mutex_);
    const size_t before = held_;
    shrink_to(0);
    return before;
  }

  void lock() { mutex_.lock(); }
  void unlock() { mutex_.unlock(); }

  const size_t limit = [] {
    const char* const wish = std::getenv("QK_CPU_CACHE_MB");
    return (wish ? std::strtoull(wish, nullptr, 10) : kDefaultLimitMb) << 20;
  }();

 private:
  // The oldest go first.
  void shrink_to(size_t bytes) {
    while (held_ > bytes) {
      munmap(kept_.front().data, kept_.front().bytes);
      held_ -= kept_.front().bytes;
      kept_.pop_front();
    }
  }

  std::mutex mutex_;
  std::deque<Block> kept_;
  size_t held_ = 0;
};

// Never destroyed: tensors may outlive every static object. A child process must not find the lock taken by a thread that it
// does not have.
Blocks& blocks() {
  static Blocks* const all = [] {
    static Blocks* const made = new Blocks;
    pthread_atfork([] { made->lock(); }, [] { made->unlock(); }, [] { made->unlock(); });
    return made;
  }();
  return *all;
}

}  // namespace

void* take_block(size_t bytes) {
  bytes = up_to(bytes, kPage);
  void* const kept = blocks().take(bytes);
  return kept ? kept : map_block(bytes);
}

void give_block(void* block, size_t bytes) { blocks().give({block, up_to(bytes, kPage)}); }

size_t kept_limit() { return blocks().limit; }
size_t release_blocks() { return blocks().release(); }

}  // namespace qk::cpu

// The scheduler of the emulator: fibers, barriers, warp collectives, shared memory.

#include "emu/emulator.h"

#include <cxxabi.h>
#include <dlfcn.h>
#include <link.h>
#include <setjmp.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace qk::emu {
namespace {

constexpr size_t kStackBytes = size_t{256} << 10;
constexpr size_t kPageBytes = 4096;
constexpr size_t kSharedBytes = size_t{228} << 10;  // the most that any target gives a block
constexpr size_t kGuardBytes = 4096;                // watched space on both sides of dynamic shared memory
constexpr int kPoison = 0xff;                       // NaN as float, half and bfloat16, -1 as an integer

enum class State { kReady, kAtBarrier, kInWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  int group;
};

struct Fiber {
  State state = State::kDone;
  Where where;  // what it waits for
  unsigned mask = 0;
  uint64_t value = 0, result = 0;
  int argument = 0, width = 0;
  Resolve resolve = nullptr;
  std::vector<Copy> copies;
  int groups = 0;  // cp.async groups committed

  bool started = false;
  jmp_buf resume_point;
  ucontext_t entry;
  char* stack = nullptr;
  void* fake_stack = nullptr;  // AddressSanitizer's
};

std::mutex launching;  // one launch at a time: the built-in variables are global
std::vector<std::unique_ptr<Fiber>> fibers;
std::vector<int> ready;
jmp_buf scheduler;
int current = -1;  // the running fiber, -1: the scheduler
const void* kernel_address = nullptr;
void (*kernel_body)(void*) = nullptr;
void* kernel_context = nullptr;
std::string error;
std::vector<char> dynamic(2 * kGuardBytes + kSharedBytes);

// Static shared memory is thread-local storage (cuda_runtime.h), so one segment holds all of it: this variable leads there.
thread_local char anchor;

std::string text(const char* name, unsigned x, unsigned y, unsigned z) {
  return std::string(name) + " (" + std::to_string(x) + ", " + std::to_string(y) + ", " + std::to_string(z) + ")";
}

std::string kernel_name() {
  Dl_info info{};
  if (!dladdr(kernel_address, &info) || !info.dli_sname) return "kernel";
  int status = 0;
  const std::unique_ptr<char, void (*)(void*)> name(abi::__cxa_demangle(info.dli_sname, nullptr, nullptr, &status),
                                                    std::free);
  return status == 0 ? name.get() : info.dli_sname;
}

std::string place(const std::string& file, unsigned line) {
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(line);
}
std::string place(const Where& where) { return place(where.file_name(), where.line()); }

uint3 index_of(int thread) {
  const auto t = static_cast<unsigned>(thread);
  return {t % blockDim.x, t / blockDim.x % blockDim.y, t / (blockDim.x * blockDim.y)};
}

std::string name_of(int thread) {
  const uint3 i = index_of(thread);
  return text("thread", i.x, i.y, i.z);
}

// The first error is kept: what follows it may be its consequence.
void record(int thread, const std::string& what, const std::string& where) {
  if (error.empty())
    error = kernel_name() + ", " + text("block", blockIdx.x, blockIdx.y, blockIdx.z) + ", " + name_of(thread) + ": " + what +
            ", at " + where;
}

// ---- switching ----

#if defined(__SANITIZE_ADDRESS__)
void* scheduler_fake_stack = nullptr;
const void* scheduler_stack = nullptr;
size_t scheduler_stack_bytes = 0;
void leave_for(Fiber& fiber) {
  __sanitizer_start_switch_fiber(&scheduler_fake_stack, fiber.stack + kPageBytes, kStackBytes);
}
void back_in_scheduler() { __sanitizer_finish_switch_fiber(scheduler_fake_stack, nullptr, nullptr); }
void leave_fiber(Fiber& fiber) { __sanitizer_start_switch_fiber(&fiber.fake_stack, scheduler_stack, scheduler_stack_bytes); }
void back_in_fiber(Fiber& fiber) {
  __sanitizer_finish_switch_fiber(fiber.fake_stack, &scheduler_stack, &scheduler_stack_bytes);
}
#else
void leave_for(Fiber&) {}
void back_in_scheduler() {}
void leave_fiber(Fiber&) {}
void back_in_fiber(Fiber&) {}
#endif

// From a fiber to the scheduler, until it is resumed.
void yield() {
  Fiber& self = *fibers[current];
  leave_fiber(self);
  if (_setjmp(self.resume_point) == 0) _longjmp(scheduler, 1);
  back_in_fiber(self);
}

// A fiber lives as long as the emulator: it runs the kernel once in each block.
void fiber_main() {
  back_in_fiber(*fibers[current]);
  for (;;) {
    kernel_body(kernel_context);
    fibers[current]->state = State::kDone;
    yield();
  }
}

void start(Fiber& fiber) {
  if (!fiber.stack) {
    void* memory = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_STACK, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kPageBytes, PROT_NONE);  // an overflow of the stack is a crash, not a wrong result
    fiber.stack = static_cast<char*>(memory);
  }
  getcontext(&fiber.entry);
  fiber.entry.uc_stack.ss_sp = fiber.stack + kPageBytes;
  fiber.entry.uc_stack.ss_size = kStackBytes;
  fiber.entry.uc_link = nullptr;
  makecontext(&fiber.entry, fiber_main, 0);
  fiber.fake_stack = nullptr;
  fiber.started = true;
}

// From the scheduler to a fiber, until it yields or the launch fails.
void resume(int thread) {
  Fiber& fiber = *fibers[thread];
  const bool first = !fiber.started;
  if (first) start(fiber);
  current = thread;
  threadIdx = index_of(thread);
  leave_for(fiber);
  if (_setjmp(scheduler) == 0) {
    if (first) setcontext(&fiber.entry);
    _longjmp(fiber.resume_point, 1);
  }
  back_in_scheduler();
  current = -1;
}

// ---- shared memory ----

struct Segment {
  char* begin = nullptr;
  size_t bytes = 0;
};

Segment static_shared() {
  anchor = 0;  // makes the loader allocate the segment for this system thread
  Segment segment;
  dl_iterate_phdr(
      [](dl_phdr_info* module, size_t, void* found) {
        for (int i = 0; i < module->dlpi_phnum; ++i) {
          const auto& header = module->dlpi_phdr[i];
          auto* const begin = static_cast<char*>(module->dlpi_tls_data);
          if (header.p_type == PT_TLS && begin && &anchor >= begin && &anchor < begin + header.p_memsz)
            *static_cast<Segment*>(found) = {begin, header.p_memsz};
        }
        return 0;
      },
      &segment);
  return segment;
}

void watch(const char* begin, const char* end, bool forbidden) {
#if defined(__SANITIZE_ADDRESS__)
  forbidden ? __asan_poison_memory_region(begin, end - begin) : __asan_unpoison_memory_region(begin, end - begin);
#else
  (void)begin, (void)end, (void)forbidden;
#endif
}

bool untouched(const char* begin, const char* end) {
  for (const char* p = begin; p < end; ++p)
    if (static_cast<unsigned char>(*p) != kPoison) return false;
  return true;
}

char* dynamic_begin() { return dynamic.data() + kGuardBytes; }

// ---- waiting ----

// All threads wait, some of them at a barrier: it must be all of them, and the same one.
void check_barrier(int threads) {
  int first = -1;
  for (int t = 0; t < threads; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.state == State::kAtBarrier && first < 0) first = t;
  }
  const Fiber& leader = *fibers[first];
  for (int t = 0; t < threads; ++t) {
    const Fiber& fiber = *fibers[t];
    if (fiber.state == State::kAtBarrier && place(fiber.where) == place(leader.where)) continue;
    record(first,
           "divergent barrier: " + name_of(t) +
               (fiber.state == State::kDone ? " has exited" : " waits at " + place(fiber.where)),
           place(leader.where));
    return;
  }
}

// Nobody can run on, and nobody waits at a barrier.
void report_incomplete_collective(int threads) {
  for (int t = 0; t < threads; ++t)
    if (fibers[t]->state == State::kInWarp)
      return record(t, "incomplete warp collective: the lanes of its mask wait elsewhere", place(fibers[t]->where));
}

void run_block(int threads, std::minstd_rand& random) {
  ready.clear();
  for (int t = 0; t < threads; ++t) {
    Fiber& fiber = *fibers[t];
    fiber.state = State::kReady;
    fiber.groups = 0;
    fiber.copies.clear();
    ready.push_back(t);
  }
  for (int done = 0; done < threads;) {
    if (ready.empty()) {
      const bool barrier = std::any_of(fibers.begin(), fibers.begin() + threads,
                                       [](const auto& fiber) { return fiber->state == State::kAtBarrier; });
      barrier ? check_barrier(threads) : report_incomplete_collective(threads);
      if (!error.empty()) return;
      for (int t = 0; t < threads; ++t) {
        fibers[t]->state = State::kReady;
        ready.push_back(t);
      }
    }
    std::swap(ready[random() % ready.size()], ready.back());
    const int thread = ready.back();
    ready.pop_back();
    resume(thread);
    if (!error.empty()) return;
    done += fibers[thread]->state == State::kDone;
  }
}

}  // namespace

uint64_t seed() {
  static const uint64_t value = [] {
    const char* wish = std::getenv("QK_EMU_SEED");
    return wish ? std::strtoull(wish, nullptr, 10) : 0;
  }();
  return value;
}

int architecture() {
  static const int value = [] {
    const char* wish = std::getenv("QK_EMU_ARCH");
    return wish ? std::atoi(wish) : 90;
  }();
  return value;
}

bool run(dim3 grid, dim3 block, size_t shared_bytes, const void* kernel, void (*body)(void*), void* context) {
  const std::lock_guard lock(launching);
  const int threads = static_cast<int>(block.x * block.y * block.z);
  error.clear();
  kernel_address = kernel;
  if (threads < 1 || threads > 1024 || grid.x < 1 || grid.y < 1 || grid.z < 1 || grid.y > 65535 || grid.z > 65535 ||
      shared_bytes > kSharedBytes) {
    error = kernel_name() + ": invalid launch: " + text("grid", grid.x, grid.y, grid.z) + ", " +
            text("block", block.x, block.y, block.z) + ", " + std::to_string(shared_bytes) + " bytes of shared memory";
    return false;
  }
  gridDim = grid, blockDim = block;
  kernel_body = body, kernel_context = context;
  while (static_cast<int>(fibers.size()) < threads) fibers.push_back(std::make_unique<Fiber>());

  const Segment statics = static_shared();
  char *const asked_end = dynamic_begin() + shared_bytes, *const dynamic_end = asked_end + kGuardBytes;
  const uint64_t blocks = uint64_t{grid.x} * grid.y * grid.z;
  for (uint64_t i = 0; i < blocks && error.empty(); ++i) {
    const uint64_t b = (i + seed()) % blocks;
    blockIdx = {static_cast<unsigned>(b % grid.x), static_cast<unsigned>(b / grid.x % grid.y),
                static_cast<unsigned>(b / grid.x / grid.y)};
    std::memset(statics.begin, kPoison, statics.bytes);
    std::memset(dynamic.data(), kPoison, dynamic_end - dynamic.data());
    watch(dynamic.data(), dynamic_begin(), true);
    watch(asked_end, dynamic_end, true);
    std::minstd_rand random(static_cast<unsigned>((seed() + 1) * 2654435761u + b));
    run_block(threads, random);
    watch(dynamic.data(), dynamic_end, false);
    if (error.empty() && !(untouched(dynamic.data(), dynamic_begin()) && untouched(asked_end, dynamic_end)))
      error = kernel_name() + ", " + text("block", blockIdx.x, blockIdx.y, blockIdx.z) +
              ": a write outside its dynamic shared memory of " + std::to_string(shared_bytes) + " bytes";
  }
  // After an error the fibers stand anywhere: the next launch begins with new ones.
  if (!error.empty())
    for (auto& fiber : fibers) fiber->started = false;
  return error.empty();
}

bool has_error() { return !error.empty(); }
std::string take_error() { return std::exchange(error, {}); }

void fail(const std::string& what, const char* file, unsigned line) {
  if (current < 0) {
    std::fprintf(stderr, "quantkernels emulator: %s, at %s, outside any kernel\n", what.c_str(), place(file, line).c_str());
    std::abort();
  }
  record(current, what, place(file, line));
  leave_fiber(*fibers[current]);
  _longjmp(scheduler, 1);
}

void sync_threads(const Where& where) {
  Fiber& self = *fibers[current];
  self.state = State::kAtBarrier;
  self.where = where;
  yield();
}

uint64_t exchange(unsigned mask, uint64_t value, int argument, int width, Resolve resolve, const Where& where) {
  const int lane = current % kWarp, first = current - lane;
  const int lanes = std::min(kWarp, static_cast<int>(blockDim.x * blockDim.y * blockDim.z) - first);
  Fiber& self = *fibers[current];
  const auto complain = [&](const std::string& what) { fail(what, where.file_name(), where.line()); };
  if (!(mask >> lane & 1)) complain("warp collective by a lane that its mask leaves out");
  self.state = State::kInWarp;
  self.where = where;
  self.mask = mask, self.value = value, self.argument = argument, self.width = width, self.resolve = resolve;

  Exchange all{};
  all.mask = mask;
  bool complete = true;
  for (int l = 0; l < kWarp; ++l) {
    if (!(mask >> l & 1)) continue;
    if (l >= lanes || fibers[first + l]->state == State::kDone)
      complain("warp collective with a mask that names lane " + std::to_string(l) + ", which " +
               (l >= lanes ? "does not exist" : "has exited"));
    const Fiber& other = *fibers[first + l];
    const bool arrived = other.state == State::kInWarp && other.mask == mask;
    if (arrived && (other.resolve != resolve || other.where.line() != where.line()))
      complain("warp collective while lane " + std::to_string(l) + " waits with the same mask at " + place(other.where));
    complete = complete && arrived;
    all.value[l] = other.value, all.argument[l] = other.argument, all.width[l] = other.width;
  }
  if (!complete) {
    yield();
    return self.result;
  }
  // The last lane to arrive finds everyone's result and lets them go.
  for (int l = 0; l < lanes; ++l) {
    if (!(mask >> l & 1)) continue;
    Fiber& other = *fibers[first + l];
    if (!resolve(all, l, &other.result))
      complain("shuffle: lane " + std::to_string(l) + " reads a lane that the mask leaves out");
    other.state = State::kReady;
    if (l != lane) ready.push_back(first + l);
  }
  return self.result;
}

unsigned active_mask() {
  const int first = current - current % kWarp;
  unsigned mask = 0;
  for (int l = 0; l < kWarp && first + l < static_cast<int>(blockDim.x * blockDim.y * blockDim.z); ++l)
    if (fibers[first + l]->state != State::kDone) mask |= 1u << l;
  return mask;
}

void* dynamic_shared() { return dynamic_begin(); }

void copy_async(void* shared, const void* global, size_t bytes) {
  Fiber& self = *fibers[current];
  self.copies.push_back({shared, global, bytes, self.groups});
}

void commit_copies() { ++fibers[current]->groups; }

void wait_copies(int groups_in_flight) {
  Fiber& self = *fibers[current];
  std::erase_if(self.copies, [&](const Copy& copy) {
    if (copy.group >= self.groups - groups_in_flight) return false;
    std::memcpy(copy.to, copy.from, copy.bytes);
    return true;
  });
}

}  // namespace qk::emu

// Kernels are compiled with -fsanitize=bounds-strict, and this is its handler: every array with a size, in shared memory or
// in registers, is checked at each index. The layout of the argument is the compiler's.
struct OutOfBoundsData {
  const char* file;
  uint32_t line, column;
  const void* array_type;
  const void* index_type;
};

extern "C" __attribute__((visibility("hidden"))) void __ubsan_handle_out_of_bounds(OutOfBoundsData* data, uintptr_t index) {
  qk::emu::fail("index " + std::to_string(static_cast<intptr_t>(index)) + " out of bounds of an array", data->file,
                data->line);
}

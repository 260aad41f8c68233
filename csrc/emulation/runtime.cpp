// Scheduler of the emulation: fibers, block barriers, warp rendezvous. See runtime.h.
#include "runtime.h"

#include <algorithm>
#include <atomic>
#include <mutex>
#include <random>
#include <stdexcept>
#include <thread>

#if !defined(__x86_64__) || defined(EMULATION_UCONTEXT)
#define EMULATION_PORTABLE_SWITCH 1
#include <ucontext.h>
#endif

namespace emulation {
namespace {

constexpr size_t kStackBytes = 128 << 10;
constexpr uint64_t kCanary = 0x5AFE57AC4B0770ull;
thread_local Block* running_block = nullptr;

struct FiberError {};  // unwinds the failing fiber to its entry function

#ifdef EMULATION_PORTABLE_SWITCH
// ucontext saves the signal mask with a system call at each switch (about 170 ns against 11 ns), so it is the fallback.
void switch_stack(void** save, void* load) {
  ucontext_t here;
  *save = &here;
  swapcontext(&here, static_cast<ucontext_t*>(load));
}
#else
extern "C" void emulation_switch_stack(void** save, void* load);
// System V x86-64: only the callee-saved registers survive a call, so only they need saving.
asm(R"(.text
.globl emulation_switch_stack
.hidden emulation_switch_stack
.type emulation_switch_stack,@function
emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size emulation_switch_stack,.-emulation_switch_stack
)");
void switch_stack(void** save, void* load) {
  emulation_switch_stack(save, load);
}
#endif

void yield_to_scheduler() {
  Block* block = running_block;
  switch_stack(&block->current->stack_pointer, block->scheduler_stack_pointer);
}

void leave(Block& block, Fiber& fiber);

void fiber_entry() {
  Block* block = running_block;
  Fiber& fiber = *block->current;
  try {
    (*block->body)();
    bool unwaited = !fiber.open_group.empty();
    for (const auto& group : fiber.groups) unwaited |= !group.empty();
    if (unwaited) fail("a thread ended with a cp.async that it never waited for");
    leave(*block, fiber);
  } catch (const FiberError&) {
    // fail() has written block->error; the scheduler drops the whole block
  }
  fiber.state = State::done;
  for (;;) yield_to_scheduler();
}

void prepare_stack(Block& block, Fiber& fiber) {
  char* base = block.stacks.get() + kStackBytes * fiber.thread;
  memcpy(base, &kCanary, sizeof kCanary);
#ifdef EMULATION_PORTABLE_SWITCH
  auto* context = reinterpret_cast<ucontext_t*>((reinterpret_cast<uintptr_t>(base) + 64 + 63) & ~uintptr_t(63));
  getcontext(context);
  const size_t reserved = (sizeof(ucontext_t) + 255) & ~size_t(127);
  context->uc_stack.ss_sp = base + reserved;
  context->uc_stack.ss_size = kStackBytes - reserved;
  context->uc_link = nullptr;
  makecontext(context, fiber_entry, 0);
  fiber.stack_pointer = context;
#else
  auto** top = reinterpret_cast<void**>(reinterpret_cast<uintptr_t>(base + kStackBytes) & ~uintptr_t(63));
  *--top = nullptr;  // keeps the stack 16-byte aligned at the entry, and ends backtraces
  *--top = reinterpret_cast<void*>(fiber_entry);
  for (int i = 0; i < 6; i++) *--top = nullptr;
  fiber.stack_pointer = top;
#endif
}

void wake(Fiber& fiber) {
  fiber.state = State::ready;
  fiber.warp->ready++;
}

void release_barrier(Block& block) {
  block.at_barrier = 0;
  block.epoch++;
  for (Warp& warp : block.warps) warp.sync_epoch++;
  for (Fiber& fiber : block.fibers)
    if (fiber.state == State::waits_for_block) wake(fiber);
}

// Bank conflicts of the plain accesses since the last collective. 16-byte accesses are served a quarter warp at a time.
void flush_accesses(Warp& warp) {
  for (const Warp::Access& access : warp.accesses) {
    const int lanes_a_pass = access.bytes >= 16 ? 8 : access.bytes == 8 ? 16 : 32;
    warp.counters.shared++;
    for (int first = 0; first < kLanes; first += lanes_a_pass) {
      uint32_t words[32][kLanes];
      int used[32] = {}, most = 0;
      for (int lane = first; lane < first + lanes_a_pass; lane++) {
        if (!(access.mask >> lane & 1)) continue;
        for (unsigned byte = 0; byte < access.bytes; byte += 4) {
          const uint32_t word = (access.offset[lane] + byte) / 4, bank = word % 32;
          if (std::find(words[bank], words[bank] + used[bank], word) == words[bank] + used[bank])
            words[bank][used[bank]++] = word;
          most = std::max(most, used[bank]);
        }
      }
      warp.counters.shared_wavefronts += most;
      warp.counters.shared_ideal += most > 0;
    }
  }
  warp.accesses.clear();
}

void finish_rendezvous(Block& block, Warp& warp, Compute compute) {
  flush_accesses(warp);
  compute(warp);
  warp.arrived = 0;
  warp.operation = nullptr;
  Fiber* lanes = &block.fibers[warp.index * kLanes];
  for (int lane = 0; lane < kLanes; lane++)
    if (lanes[lane].state == State::waits_for_warp) wake(lanes[lane]);
}

void leave(Block& block, Fiber& fiber) {
  Warp& warp = *fiber.warp;
  warp.members--;
  block.live--;
  if (warp.arrived > 0) fail(std::string("a thread ended while other lanes of its warp wait at ") + warp.operation);
  if (block.live > 0 && block.at_barrier == block.live) release_barrier(block);
  if (warp.members == 0) flush_accesses(warp);
}

void reset_block(Block& block, uint3 index) {
  block.index = index;
  block.live = static_cast<unsigned>(block.fibers.size());
  block.at_barrier = 0;
  block.epoch = 1;
  block.error.clear();
  memset(block.shared, 0xFF, block.shared_bytes);  // NaN both as bf16 and as fp32
  std::fill(block.shadow.begin(), block.shadow.end(), Shadow{});
  for (unsigned i = 0; i < block.warps.size(); i++) {
    Warp& warp = block.warps[i];
    warp.index = i;
    warp.arrived = 0;
    warp.operation = nullptr;
    warp.members = warp.ready = kLanes;
    warp.sync_epoch = 1;
    warp.accesses.clear();
  }
  for (unsigned i = 0; i < block.fibers.size(); i++) {
    Fiber& fiber = block.fibers[i];
    fiber.block = &block;
    fiber.thread = i;
    fiber.lane = i % kLanes;
    fiber.warp = &block.warps[i / kLanes];
    fiber.index = {i % block.block_size.x, i / block.block_size.x % block.block_size.y,
                   i / (block.block_size.x * block.block_size.y)};
    fiber.state = State::ready;
    fiber.open_group.clear();
    fiber.groups.clear();
    prepare_stack(block, fiber);
  }
}

// Resumes each ready lane of a warp once. False when the block has failed.
bool run_warp(Block& block, Warp& warp, unsigned order) {
  for (unsigned i = 0; i < kLanes; i++) {
    Fiber& fiber = block.fibers[warp.index * kLanes + (i ^ order) % kLanes];
    if (fiber.state != State::ready) continue;
    warp.ready--;
    block.current = &fiber;
    switch_stack(&block.scheduler_stack_pointer, fiber.stack_pointer);
    if (!block.error.empty()) return false;
  }
  return true;
}

void run_block(Block& block, uint3 index) {
  running_block = &block;
  reset_block(block, index);
  std::mt19937_64 random(options().seed * 0x9E3779B97F4A7C15ull + index.x + 131ull * index.y + 17161ull * index.z);
  const bool shuffle = options().seed != 0;
  const unsigned warps = static_cast<unsigned>(block.warps.size());
  unsigned next = 0;
  while (block.live > 0) {
    unsigned chosen = shuffle ? static_cast<unsigned>(random() % warps) : next;
    unsigned tried = 0;
    while (tried < warps && block.warps[chosen].ready == 0) {
      chosen = (chosen + 1) % warps;
      tried++;
    }
    if (tried == warps) {
      block.current = nullptr;
      block.error = "deadlock: " + std::to_string(block.at_barrier) + " of " + std::to_string(block.live) +
                    " live threads wait at __syncthreads, the others at a warp instruction that not all lanes reach";
      break;
    }
    next = (chosen + 1) % warps;
    // A long quantum lets one warp run far ahead of the others; missing barriers show only then.
    constexpr unsigned kQuanta[] = {1, 3, 20, 1u << 30};
    const unsigned quantum = shuffle ? kQuanta[random() % 4] : 1;
    bool alive = true;
    for (unsigned step = 0; alive && step < quantum && block.warps[chosen].ready > 0; step++)
      alive = run_warp(block, block.warps[chosen], shuffle ? static_cast<unsigned>(random()) : 0);
    if (!alive) break;
  }
  for (const Fiber& fiber : block.fibers) {
    if (block.error.empty() && memcmp(block.stacks.get() + kStackBytes * fiber.thread, &kCanary, sizeof kCanary) != 0)
      block.error = "a thread overran the stack that the emulation gives it";
  }
  if (!block.error.empty())
    block.error +=
        " [block " + std::to_string(index.x) + "," + std::to_string(index.y) + "," + std::to_string(index.z) + "]";
  running_block = nullptr;
}

}  // namespace

Options& options() {
  static Options value;
  return value;
}

Counters& counters() {
  static Counters value;
  return value;
}

void Counters::add(const Counters& other) {
  mma += other.mma;
  ldmatrix += other.ldmatrix;
  ldmatrix_wavefronts += other.ldmatrix_wavefronts;
  shared += other.shared;
  shared_wavefronts += other.shared_wavefronts;
  shared_ideal += other.shared_ideal;
}

Block* current_block() {
  return running_block;
}

void fail(const std::string& message) {
  Block* block = running_block;
  block->error = message + " (thread " + std::to_string(block->current->thread) + ")";
  throw FiberError{};
}

void block_barrier(int line) {
  Block* block = running_block;
  Fiber& fiber = *block->current;
  if (block->at_barrier > 0 && block->barrier_line != line)
    fail("threads of one block wait at different __syncthreads, lines " + std::to_string(block->barrier_line) +
         " and " + std::to_string(line));
  block->barrier_line = line;
  if (++block->at_barrier == block->live) {
    release_barrier(*block);
    return;
  }
  fiber.state = State::waits_for_block;
  yield_to_scheduler();
}

void rendezvous(const char* operation, const void* in, size_t in_bytes, void* out, size_t out_bytes, Compute compute) {
  Block* block = running_block;
  Fiber& fiber = *block->current;
  Warp& warp = *fiber.warp;
  if (warp.members != kLanes) fail(std::string(operation) + " after some lanes of the warp have ended");
  if (warp.arrived == 0) {
    warp.operation = operation;
  } else if (warp.operation != operation) {
    fail(std::string("lanes of one warp are at different instructions: ") + warp.operation + " and " + operation);
  }
  memcpy(warp.in[fiber.lane], in, in_bytes);
  if (++warp.arrived == kLanes) {
    finish_rendezvous(*block, warp, compute);
  } else {
    fiber.state = State::waits_for_warp;
    yield_to_scheduler();
  }
  memcpy(out, warp.out[fiber.lane], out_bytes);
}

void launch(const std::function<void()>& body, dim3 grid, dim3 block_size, size_t shared_bytes) {
  const size_t threads = size_t(block_size.x) * block_size.y * block_size.z;
  const long total = long(grid.x) * grid.y * grid.z;
  if (total == 0 || threads == 0 || threads % kLanes != 0 || threads > 1024)
    throw std::runtime_error(
        "emulation: the grid must be non-empty, a block must hold 32 to 1024 threads in whole warps");
  if (grid.y > 65535 || grid.z > 65535) throw std::runtime_error("emulation: grid y and z end at 65535");
  if (shared_bytes > 163 << 10)
    throw std::runtime_error("emulation: more than 163 KiB of shared memory, the limit of sm_80");
  std::atomic<long> next{0};
  std::mutex mutex;
  std::string error;
  auto work = [&] {
    Block block;
    block.fibers.resize(threads);
    block.warps.resize(threads / kLanes);
    block.shadow.resize((shared_bytes + 3) / 4);
    block.stacks.reset(new char[kStackBytes * threads]);
    block.shared_storage.reset(new char[shared_bytes + 128]);
    block.shared = reinterpret_cast<unsigned char*>((reinterpret_cast<uintptr_t>(block.shared_storage.get()) + 127) &
                                                    ~uintptr_t(127));
    block.shared_bytes = shared_bytes;
    block.body = &body;
    block.block_size = block_size;
    block.grid_size = grid;
    for (long i; (i = next++) < total;) {
      run_block(block, {unsigned(i % grid.x), unsigned(i / grid.x % grid.y), unsigned(i / (long(grid.x) * grid.y))});
      if (!block.error.empty()) {
        std::lock_guard<std::mutex> lock(mutex);
        if (error.empty()) error = block.error;
        next = total;
      }
    }
    std::lock_guard<std::mutex> lock(mutex);
    for (const Warp& warp : block.warps) counters().add(warp.counters);
  };
  std::vector<std::thread> workers;
  for (long i = 1; i < std::min<long>(options().threads, total); i++) workers.emplace_back(work);
  work();
  for (auto& worker : workers) worker.join();
  if (!error.empty()) throw std::runtime_error("emulation: " + error);
}

}  // namespace emulation

// Knobs for the tests, reached through ctypes.
extern "C" {
__attribute__((visibility("default"))) void emulation_configure(uint64_t seed, int copies, int threads,
                                                                int check_races) {
  emulation::options() = {seed, static_cast<emulation::CopyMode>(copies), threads, check_races != 0};
}
__attribute__((visibility("default"))) void emulation_reset_counters() {
  emulation::counters() = {};
}
__attribute__((visibility("default"))) void emulation_read_counters(long* out) {
  const emulation::Counters& c = emulation::counters();
  const long values[] = {c.mma, c.ldmatrix, c.ldmatrix_wavefronts, c.shared, c.shared_wavefronts, c.shared_ideal};
  std::copy(std::begin(values), std::end(values), out);
}
}

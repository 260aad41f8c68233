// Executes CUDA kernel source on the CPU: one fiber per CUDA thread, one OS thread per block at a time.
//
// A warp instruction (mma, ldmatrix, shuffle) is a rendezvous: each lane deposits its operands and sleeps; the last one
// to arrive computes the results of all 32 lanes and wakes them. Between rendezvous lanes run in any order, so code
// that relies on lock-step execution fails here as it may fail on hardware with independent thread scheduling.
//
// What this shows and what it cannot show is written down in docs/kernels.md.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct uint3 {
  unsigned x, y, z;
};

namespace emulation {

constexpr int kLanes = 32;

// When the bytes of a cp.async become visible. Real hardware may do any of these; a correct kernel works under all.
enum class CopyMode { lazy = 0, eager = 1, mixed = 2 };

struct Options {
  uint64_t seed = 0;  // 0: round-robin order; otherwise random lane order, and warps that drift apart
  CopyMode copies = CopyMode::lazy;
  int threads = 2;          // OS threads that share the blocks of a launch
  bool check_races = true;  // happens-before check of every shared-memory access made through cu::
};
Options& options();

// Totals since the last reset. A wavefront is one pass over the 32 shared-memory banks.
struct Counters {
  long mma = 0;
  long ldmatrix = 0, ldmatrix_wavefronts = 0;
  long shared = 0, shared_wavefronts = 0, shared_ideal = 0;  // cu::load_shared and cu::store_shared, per warp
  void add(const Counters& other);
};
Counters& counters();

struct PendingCopy {
  unsigned char* destination;
  const unsigned char* source;
  unsigned bytes;
  bool valid;   // false: zero-fill
  bool landed;  // eager copies are visible from the moment of issue, yet still unsafe to read before the wait
};

struct Block;

struct Warp {
  alignas(64) unsigned char in[kLanes][64];
  alignas(64) unsigned char out[kLanes][32];
  const char* operation = nullptr;  // collective in progress; compared by address
  unsigned index = 0, arrived = 0, members = 0, ready = 0;
  uint32_t sync_epoch = 1;  // advanced by __syncwarp and __syncthreads
  // Plain shared-memory accesses since the last collective, for the bank-conflict count. Lanes that execute the same
  // source line for the same time are taken to execute it together.
  struct Access {
    uint32_t mask = 0;
    unsigned bytes = 0;
    int line = 0;
    uint32_t offset[kLanes];
  };
  std::vector<Access> accesses;
  Counters counters;
};

enum class State { ready, waits_for_warp, waits_for_block, done };

struct Fiber {
  void* stack_pointer = nullptr;
  Block* block = nullptr;
  Warp* warp = nullptr;
  unsigned thread = 0, lane = 0;
  uint3 index{};
  State state = State::ready;
  std::vector<PendingCopy> open_group;
  std::deque<std::vector<PendingCopy>> groups;
};

// Last write and last reads of four bytes of shared memory.
struct Shadow {
  uint32_t landed_block_epoch = 0, landed_warp_epoch = 0, read_block_epoch = 0, readers = 0;
  uint16_t writer = 0;  // thread + 1; 0: never written
  bool pending = false;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<Warp> warps;
  std::vector<Shadow> shadow;
  std::unique_ptr<char[]> stacks, shared_storage;
  unsigned char* shared = nullptr;
  size_t shared_bytes = 0;
  const std::function<void()>* body = nullptr;
  uint3 index{};
  dim3 block_size, grid_size;
  unsigned live = 0, at_barrier = 0;
  int barrier_line = 0;
  uint32_t epoch = 1;  // advanced by __syncthreads
  void* scheduler_stack_pointer = nullptr;
  Fiber* current = nullptr;
  std::string error;
};

Block* current_block();
inline Fiber& current_fiber() {
  return *current_block()->current;
}

// Ends the launch with std::runtime_error. Names the block and the thread.
[[noreturn]] void fail(const std::string& message);

void launch(const std::function<void()>& body, dim3 grid, dim3 block, size_t shared_bytes);
void block_barrier(int line);  // of the __syncthreads

// Deposits `in` for the running lane; when all lanes are there, `compute` fills warp.out; returns this lane's result.
using Compute = void (*)(Warp&);
void rendezvous(const char* operation, const void* in, size_t in_bytes, void* out, size_t out_bytes, Compute compute);

template <class In>
In deposited(const Warp& warp, int lane) {
  In value;
  memcpy(&value, warp.in[lane], sizeof value);
  return value;
}
template <class Out>
void deliver(Warp& warp, int lane, const Out& value) {
  static_assert(sizeof(Out) <= sizeof(warp.out[0]));
  memcpy(warp.out[lane], &value, sizeof value);
}
template <class Out, class In>
Out collective(const char* operation, const In& in, Compute compute) {
  static_assert(sizeof(In) <= 64 && sizeof(Out) <= 32);
  Out out;
  rendezvous(operation, &in, sizeof in, &out, sizeof out, compute);
  return out;
}

// Shared-memory bookkeeping. `pointer` must lie in the dynamic shared memory of the running block.
size_t shared_offset(const void* pointer, size_t bytes, const char* operation);
void note_read(Fiber& fiber, size_t offset, size_t bytes, bool whole_warp);
void note_write(Fiber& fiber, size_t offset, size_t bytes, bool asynchronous);
void note_landed(Fiber& fiber, size_t offset, size_t bytes);
void note_access(Fiber& fiber, size_t offset, size_t bytes, int line);  // for the bank-conflict count

void copy_async(void* destination, const void* source, unsigned bytes, bool valid);
void copy_commit();
void copy_wait(int groups_in_flight);

}  // namespace emulation

// Shared memory of the emulation: bounds, a happens-before race check, asynchronous copies, bank-conflict bookkeeping.
//
// The race check keeps, for each four bytes, who wrote last and in which barrier epoch, and which warps have read in
// the present epoch. An access that no barrier orders against an earlier one is reported whatever order the threads
// happened to run in: a missing __syncthreads is found by one run, not by a lucky schedule.
#include "runtime.h"

namespace emulation {

size_t shared_offset(const void* pointer, size_t bytes, const char* operation) {
  const Block& block = *current_block();
  const auto address = reinterpret_cast<uintptr_t>(pointer), start = reinterpret_cast<uintptr_t>(block.shared);
  if (address < start || address + bytes > start + block.shared_bytes)
    fail(std::string(operation) + " outside the shared memory of the block");
  if (address % bytes != 0) fail(std::string(operation) + " at an address that is not a multiple of its size");
  return address - start;
}

void note_read(Fiber& fiber, size_t offset, size_t bytes, bool whole_warp) {
  if (!options().check_races) return;
  Block& block = *fiber.block;
  const Warp& warp = *fiber.warp;
  for (size_t i = offset / 4; i < (offset + bytes) / 4; i++) {
    Shadow& word = block.shadow[i];
    if (word.writer == 0) fail("shared memory is read that nobody has written");
    if (word.pending) fail("shared memory is read while a cp.async into it is still in flight");
    const unsigned writer = word.writer - 1u;
    if (writer / kLanes != warp.index) {
      if (word.landed_block_epoch == block.epoch)
        fail("race: shared memory is read with no __syncthreads after another warp wrote it");
    } else if ((whole_warp || writer != fiber.thread) && word.landed_warp_epoch == warp.sync_epoch) {
      fail("race: shared memory is read with no __syncwarp after another lane wrote it");
    }
    if (word.read_block_epoch != block.epoch) {
      word.read_block_epoch = block.epoch;
      word.readers = 0;
    }
    word.readers |= 1u << warp.index;
  }
}

void note_write(Fiber& fiber, size_t offset, size_t bytes, bool asynchronous) {
  if (!options().check_races) return;
  Block& block = *fiber.block;
  const Warp& warp = *fiber.warp;
  for (size_t i = offset / 4; i < (offset + bytes) / 4; i++) {
    Shadow& word = block.shadow[i];
    if (word.pending) fail("shared memory is overwritten while a cp.async into it is still in flight");
    if (word.read_block_epoch == block.epoch && (word.readers & ~(1u << warp.index)) != 0)
      fail("race: shared memory is overwritten with no __syncthreads after another warp read it");
    if (word.writer != 0 && (word.writer - 1u) / kLanes != warp.index && word.landed_block_epoch == block.epoch)
      fail("race: two warps write the same shared memory with no __syncthreads between");
    word.writer = static_cast<uint16_t>(fiber.thread + 1);
    word.pending = asynchronous;
    word.landed_block_epoch = block.epoch;
    word.landed_warp_epoch = warp.sync_epoch;
  }
}

void note_landed(Fiber& fiber, size_t offset, size_t bytes) {
  if (!options().check_races) return;
  for (size_t i = offset / 4; i < (offset + bytes) / 4; i++) {
    Shadow& word = fiber.block->shadow[i];
    word.pending = false;
    word.landed_block_epoch = fiber.block->epoch;
    word.landed_warp_epoch = fiber.warp->sync_epoch;
  }
}

void note_access(Fiber& fiber, size_t offset, size_t bytes, int line) {
  std::vector<Warp::Access>& accesses = fiber.warp->accesses;
  const uint32_t lane_bit = 1u << fiber.lane;
  size_t i = 0;
  while (i < accesses.size() && (accesses[i].line != line || (accesses[i].mask & lane_bit) != 0)) i++;
  if (i == accesses.size()) accesses.push_back({0, static_cast<unsigned>(bytes), line, {}});
  accesses[i].mask |= lane_bit;
  accesses[i].offset[fiber.lane] = static_cast<uint32_t>(offset);
}

namespace {

void land(const PendingCopy& copy) {
  if (copy.valid) {
    memcpy(copy.destination, copy.source, copy.bytes);
  } else {
    memset(copy.destination, 0, copy.bytes);
  }
}

bool lands_at_issue(size_t offset) {
  switch (options().copies) {
    case CopyMode::lazy:
      return false;
    case CopyMode::eager:
      return true;
    default:
      return ((offset >> 4) * 2654435761u + options().seed) >> 13 & 1;
  }
}

}  // namespace

void copy_async(void* destination, const void* source, unsigned bytes, bool valid) {
  Fiber& fiber = current_fiber();
  const size_t offset = shared_offset(destination, bytes, "cp.async");
  if (valid && reinterpret_cast<uintptr_t>(source) % bytes != 0) fail("cp.async from a misaligned global address");
  note_write(fiber, offset, bytes, true);
  PendingCopy copy{static_cast<unsigned char*>(destination), static_cast<const unsigned char*>(source), bytes, valid,
                   lands_at_issue(offset)};
  if (copy.landed) land(copy);
  fiber.open_group.push_back(copy);
}

void copy_commit() {
  Fiber& fiber = current_fiber();
  fiber.groups.push_back(std::move(fiber.open_group));
  fiber.open_group.clear();
}

void copy_wait(int groups_in_flight) {
  Fiber& fiber = current_fiber();
  while (static_cast<int>(fiber.groups.size()) > groups_in_flight) {
    for (const PendingCopy& copy : fiber.groups.front()) {
      if (!copy.landed) land(copy);
      note_landed(fiber, static_cast<size_t>(copy.destination - fiber.block->shared), copy.bytes);
    }
    fiber.groups.pop_front();
  }
}

}  // namespace emulation

// Rotates the keys (and for the backward pass the queries) of the grouped projection once, into [heads, T, D].
//
// Inside the attention loop every block of queries would rotate every key again, about 18 % more work on the CUDA cores
// with blocks of 64 queries; as a pass of its own it reads and writes each key once.
#include "params.h"
#include "tiles.cuh"

namespace {

using cu::bf16;
constexpr int kThreads = 256;

// Largest i with cu_seqlens[i] <= token; sequences without tokens are passed over.
__device__ __forceinline__ int sequence_of(const int32_t* cu_seqlens, int sequences, int token) {
  int low = 0, high = sequences;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (cu_seqlens[middle] <= token) {
      low = middle;
    } else {
      high = middle;
    }
  }
  return low;
}

// One thread rotates eight pairs.
__global__ void __launch_bounds__(kThreads) rotate_kernel(const __grid_constant__ RotateParams p) {
  const int chunks = p.head_dim / 16, heads = p.kv_heads * p.slots;
  const int64_t item = int64_t(blockIdx.x) * kThreads + threadIdx.x;
  if (item >= int64_t(p.tokens) * heads * chunks) return;
  const int chunk = item % chunks, head = item / chunks % heads, token = item / chunks / heads;
  const int sequence = sequence_of(p.cu_seqlens, p.sequences, token);
  const int row = token - p.cu_seqlens[sequence] + (p.table.offsets ? p.table.offsets[sequence] : 0);
  const bf16* source = static_cast<const bf16*>(p.source.data) + token * p.source.token_stride +
                       head / p.slots * p.source.group_stride + (p.first_slot + head % p.slots) * p.source.slot_stride +
                       chunk * 8;
  uint4 low = *reinterpret_cast<const uint4*>(source);
  uint4 high = *reinterpret_cast<const uint4*>(source + p.head_dim / 2);
  float cosine[8], sine[8];
  tile::load_angles(p.table, row, p.head_dim / 2, chunk * 8, cosine, sine);
  tile::rotate_chunks(low, high, cosine, sine);
  bf16* target = static_cast<bf16*>(p.target) + (int64_t(head) * p.tokens + token) * p.head_dim + chunk * 8;
  *reinterpret_cast<uint4*>(target) = low;
  *reinterpret_cast<uint4*>(target + p.head_dim / 2) = high;
}

}  // namespace

extern "C" void rotate_launch(const RotateParams& p, cudaStream_t stream) {
  const int64_t items = int64_t(p.tokens) * p.kv_heads * p.slots * (p.head_dim / 16);
  if (items == 0) return;
  cu::launch<rotate_kernel>(dim3((items + kThreads - 1) / kThreads), kThreads, 0, stream, p);
}

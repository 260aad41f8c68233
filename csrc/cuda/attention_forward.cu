// Causal attention over packed sequences with grouped queries, bf16 in and out, fp32 inside.
//
// FlashAttention-2 scheme (Dao 2023): a block owns Warps * Tiles * 16 queries of one head and walks over the keys with
// an online softmax. A warp owns Tiles * 16 queries, so that a fragment of V that is read from shared memory feeds
// Tiles products: with one tile the reads would take longer than the tensor cores on sm_80. The scores of one tile at a
// time are in registers; those of both at D = 128 spill.
#include "params.h"
#include "tiles.cuh"

namespace {

using cu::bf16;
constexpr float kLog2e = 1.4426950408889634f, kLn2 = 0.6931471805599453f;

template <int D_, int Warps_, int Tiles_, int BlockN_>
struct Shape {
  static constexpr int D = D_, Warps = Warps_, Tiles = Tiles_, BlockN = BlockN_;
  static constexpr int Threads = Warps * 32, BlockM = Warps * Tiles * 16;
  static constexpr int SharedBytes = (BlockM + 2 * BlockN) * D * 2;
};

template <class S>
struct WarpState {
  float out[S::Tiles][S::D / 8][4];
  float highest[S::Tiles][2];  // of the raw scores, per row
  float sum[S::Tiles][2];      // this lane's share of the row
};

// scores = Q K^T for 16 queries and the tile's keys.
template <class S>
__device__ __forceinline__ void multiply_keys(float (&scores)[S::BlockN / 8][4], const bf16* queries,
                                              const bf16* keys) {
  const int query_offset = tile::lane_offset<S::D, true>(0), key_offset = tile::lane_offset<S::D, false>(0);
#pragma unroll
  for (int j = 0; j < S::BlockN / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) scores[j][e] = 0.f;
#pragma unroll
  for (int k = 0; k < S::D / 16; k++) {
    uint32_t a[4];
    tile::load_a<S::D>(a, queries, query_offset, k);
#pragma unroll
    for (int n = 0; n < S::BlockN / 16; n++) {
      uint32_t b[4];
      tile::load_b_of_transpose<S::D>(b, keys, key_offset, n * 16, k);
      cu::mma_bf16(scores[2 * n], a, b[0], b[1]);
      cu::mma_bf16(scores[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// Sets the scores of keys later than their query to -infinity.
template <class S>
__device__ __forceinline__ void mask_future(float (&scores)[S::BlockN / 8][4], int first_row, int first_key) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < S::BlockN / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (first_key + j * 8 + 2 * t + (e & 1) > first_row + g + (e >> 1) * 8) scores[j][e] = -INFINITY;
}

// Turns scores into weights relative to the running maximum, and rescales what was summed under the old one. Every row
// has met its first key by the end of the first tile, so the maximum is finite. The weights leave as A fragments of the
// next product: the accumulators of two neighbouring 16 x 8 tiles are, rounded, one fragment of 16 x 16.
template <class S>
__device__ __forceinline__ void softmax_step(uint32_t (&weights)[S::BlockN / 16][4],
                                             const float (&scores)[S::BlockN / 8][4], WarpState<S>& state, int i,
                                             float scale_log2) {
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float highest = state.highest[i][h];
#pragma unroll
    for (int j = 0; j < S::BlockN / 8; j++) highest = fmaxf(highest, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 1));
    highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, 2));
    const float correction = cu::exp2_approximate((state.highest[i][h] - highest) * scale_log2);
    state.highest[i][h] = highest;
    const float offset = highest * scale_log2;
    float sum = 0.f;
#pragma unroll
    for (int j = 0; j < S::BlockN / 8; j++) {
      const float even = cu::exp2_approximate(scores[j][2 * h] * scale_log2 - offset);
      const float odd = cu::exp2_approximate(scores[j][2 * h + 1] * scale_log2 - offset);
      sum += even + odd;
      weights[j / 2][j % 2 * 2 + h] = cu::pack_bf16(even, odd);
    }
    state.sum[i][h] = state.sum[i][h] * correction + sum;
#pragma unroll
    for (int j = 0; j < S::D / 8; j++) {
      state.out[i][j][2 * h] *= correction;
      state.out[i][j][2 * h + 1] *= correction;
    }
  }
}

template <class S>
__device__ __forceinline__ void multiply_values(WarpState<S>& state,
                                                const uint32_t (&weights)[S::Tiles][S::BlockN / 16][4],
                                                const bf16* values) {
  const int value_offset = tile::lane_offset<S::D, true>(0);
#pragma unroll
  for (int k = 0; k < S::BlockN / 16; k++)
#pragma unroll
    for (int n = 0; n < S::D / 16; n++) {
      uint32_t b[4];
      tile::load_b<S::D>(b, values, value_offset, k * 16, n);
#pragma unroll
      for (int i = 0; i < S::Tiles; i++) {
        cu::mma_bf16(state.out[i][2 * n], weights[i][k], b[0], b[1]);
        cu::mma_bf16(state.out[i][2 * n + 1], weights[i][k], b[2], b[3]);
      }
    }
}

template <class S>
__device__ __forceinline__ void write_result(const AttentionForwardParams& p, WarpState<S>& state, bf16* shared,
                                             int warp_row, int first_row, int start, int length, int head) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t stride = int64_t(p.kv_heads) * p.queries_per_group * S::D;
  bf16* out = static_cast<bf16*>(p.out) + start * stride + head * S::D;
#pragma unroll
  for (int i = 0; i < S::Tiles; i++) {
    float inverse[2];
#pragma unroll
    for (int h = 0; h < 2; h++) {
      float sum = state.sum[i][h];
      sum += __shfl_xor_sync(~0u, sum, 1);
      sum += __shfl_xor_sync(~0u, sum, 2);
      inverse[h] = 1.f / sum;
      const int row = first_row + i * 16 + g + h * 8;
      if (t == 0 && row < length)
        p.lse[int64_t(head) * p.tokens + start + row] =
            state.highest[i][h] * p.scale + cu::log2_approximate(sum) * kLn2;
    }
    tile::store_accumulators<S::D>(shared, warp_row + i * 16, state.out[i], inverse, out, stride, first_row + i * 16,
                                   length);
  }
}

// Asynchronous copies travel under the products: V(n) under Q K(n)^T and the softmax, K(n + 1) under P V(n).
template <class S>
__global__ void __launch_bounds__(S::Threads)
    attention_forward_kernel(const __grid_constant__ AttentionForwardParams p) {
  constexpr int D = S::D, BlockN = S::BlockN;
  const int sequence = blockIdx.z, head = blockIdx.y, group = head / p.queries_per_group;
  const int start = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - start;
  const int block_row = (gridDim.x - 1 - blockIdx.x) * S::BlockM;  // the longest rows of keys first
  if (block_row >= length) return;

  bf16* queries = cu::dynamic_shared<bf16>();
  bf16* keys = queries + S::BlockM * D;
  bf16* values = keys + BlockN * D;
  const bf16* grouped = static_cast<const bf16*>(p.qkv.data) + start * p.qkv.token_stride + group * p.qkv.group_stride;
  const bf16* query_rows = grouped + head % p.queries_per_group * p.qkv.slot_stride;
  const bf16* value_rows = grouped + (p.queries_per_group + 1) * p.qkv.slot_stride;
  const bf16* key_rows = static_cast<const bf16*>(p.keys) + (int64_t(group) * p.tokens + start) * D;

  tile::AsyncRows<D, BlockN, S::Threads> next_keys(key_rows, D, 0), next_values(value_rows, p.qkv.token_stride, 0);
  next_keys.load(keys, D, length);
  cu::cp_async_commit();
  tile::load_rotated<D, S::BlockM, S::Threads>(queries, query_rows, p.qkv.token_stride, p.table,
                                               p.table.offsets ? p.table.offsets[sequence] : 0, block_row, length);

  WarpState<S> state;
#pragma unroll
  for (int i = 0; i < S::Tiles; i++) {
#pragma unroll
    for (int h = 0; h < 2; h++) state.highest[i][h] = -INFINITY, state.sum[i][h] = 0.f;
#pragma unroll
    for (int j = 0; j < D / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) state.out[i][j][e] = 0.f;
  }
  const int warp_row = threadIdx.x / 32 * S::Tiles * 16, first_row = block_row + warp_row;
  const int last_row = first_row + S::Tiles * 16 - 1, keys_end = min(length, block_row + S::BlockM);
  const float scale_log2 = p.scale * kLog2e;

  for (int n = 0; n < keys_end; n += BlockN) {
    cu::cp_async_wait<0>();
    __syncthreads();  // K(n) and the queries are there; nobody reads V(n - 1) any more
    next_values.load(values, p.qkv.token_stride, length);
    cu::cp_async_commit();
    const bool any = n <= last_row;  // false: all these keys lie in the future of all queries of the warp
    uint32_t weights[S::Tiles][BlockN / 16][4];
    if (any) {
#pragma unroll
      for (int i = 0; i < S::Tiles; i++) {
        float scores[BlockN / 8][4];
        multiply_keys<S>(scores, queries + (warp_row + i * 16) * D, keys);
        if (n + BlockN - 1 > first_row + i * 16) mask_future<S>(scores, first_row + i * 16, n);
        softmax_step<S>(weights[i], scores, state, i, scale_log2);
      }
    }
    cu::cp_async_wait<0>();
    __syncthreads();  // V(n) is there; nobody reads K(n) any more
    if (n + BlockN < keys_end) {
      next_keys.load(keys, D, length);
      cu::cp_async_commit();
    }
    if (any) multiply_values<S>(state, weights, values);
  }
  write_result<S>(p, state, queries, warp_row, first_row, start, length, head);
}

template <class S>
void launch(const AttentionForwardParams& p, cudaStream_t stream) {
  const dim3 grid((p.max_seqlen + S::BlockM - 1) / S::BlockM, p.kv_heads * p.queries_per_group, p.sequences);
  cu::launch<attention_forward_kernel<S>>(grid, S::Threads, S::SharedBytes, stream, p);
}

}  // namespace

extern "C" void attention_forward_launch(const AttentionForwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.max_seqlen == 0) return;
  if (p.head_dim == 64) {
    launch<Shape<64, 4, 2, 64>>(p, stream);
  } else {
    launch<Shape<128, 4, 2, 64>>(p, stream);
  }
}

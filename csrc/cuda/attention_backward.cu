// Gradient of causal packed attention with respect to InternLM2's grouped projection, bf16 in and out, fp32 inside.
//
// Three kernels: delta = rowsum(out * grad_out); one block a tile of keys for dK and dV (it walks over all later
// queries of all heads of its group, so the sum over the group needs no atomics); one block a tile of queries for dQ.
// No float is ever added by two blocks: the result is the same bits each time. The price against one fused kernel with
// atomics is that scores and dP are computed twice, 7 products instead of 5.
//
// Both main kernels hold their own rows as the A operand, so that the probabilities and dS come out of one product in
// exactly the registers in which the next one takes them.
#include "params.h"
#include "tiles.cuh"

namespace {

using cu::bf16;
constexpr float kLog2e = 1.4426950408889634f;

template <int D_, int Warps_, int Stage_>
struct Shape {
  static constexpr int D = D_, Warps = Warps_, Stage = Stage_;    // Stage: rows of the other side that arrive at a time
  static constexpr int Threads = Warps * 32, Block = Warps * 16;  // each warp owns 16 rows of the block
  static constexpr int RowBytes = D * 2;
  static constexpr int KeyBlockBytes = (2 * Block + 4 * Stage) * RowBytes + 4 * Stage * 4;
  static constexpr int QueryBlockBytes = (2 * Block + 4 * Stage) * RowBytes;
};

template <int N>
__device__ __forceinline__ void clear(float (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) x[j][e] = 0.f;
}

// result[16 x Stage] = rows * other^T
template <class S>
__device__ __forceinline__ void multiply_transposed(float (&result)[S::Stage / 8][4], const bf16* rows,
                                                    const bf16* other) {
  const int row_offset = tile::lane_offset<S::D, true>(0), other_offset = tile::lane_offset<S::D, false>(0);
  clear(result);
#pragma unroll
  for (int k = 0; k < S::D / 16; k++) {
    uint32_t a[4];
    tile::load_a<S::D>(a, rows, row_offset, k);
#pragma unroll
    for (int n = 0; n < S::Stage / 16; n++) {
      uint32_t b[4];
      tile::load_b_of_transpose<S::D>(b, other, other_offset, n * 16, k);
      cu::mma_bf16(result[2 * n], a, b[0], b[1]);
      cu::mma_bf16(result[2 * n + 1], a, b[2], b[3]);
    }
  }
}

// result[16 x D] += weights[16 x Stage] * other
template <class S>
__device__ __forceinline__ void accumulate(float (&result)[S::D / 8][4], const uint32_t (&weights)[S::Stage / 16][4],
                                           const bf16* other) {
  const int offset = tile::lane_offset<S::D, true>(0);
#pragma unroll
  for (int k = 0; k < S::Stage / 16; k++)
#pragma unroll
    for (int n = 0; n < S::D / 16; n++) {
      uint32_t b[4];
      tile::load_b<S::D>(b, other, offset, k * 16, n);
      cu::mma_bf16(result[2 * n], weights[k], b[0], b[1]);
      cu::mma_bf16(result[2 * n + 1], weights[k], b[2], b[3]);
    }
}

// Accumulator tiles j of 16 x 8 as A fragments j / 2 of 16 x 16.
template <int N>
__device__ __forceinline__ void pack(uint32_t (&a)[N / 2][4], const float (&x)[N][4]) {
#pragma unroll
  for (int j = 0; j < N; j++)
#pragma unroll
    for (int h = 0; h < 2; h++) a[j / 2][j % 2 * 2 + h] = cu::pack_bf16(x[j][2 * h], x[j][2 * h + 1]);
}

constexpr int kDeltaThreads = 256;

// One warp a token and head.
__global__ void __launch_bounds__(kDeltaThreads)
    attention_delta_kernel(const __grid_constant__ AttentionBackwardParams p) {
  const int heads = p.kv_heads * p.queries_per_group, lane = threadIdx.x % 32;
  const int64_t item = int64_t(blockIdx.x) * (kDeltaThreads / 32) + threadIdx.x / 32;
  if (item >= int64_t(p.tokens) * heads) return;
  const uint32_t* out = static_cast<const uint32_t*>(p.out) + item * (p.head_dim / 2);
  const uint32_t* grad_out = static_cast<const uint32_t*>(p.grad_out) + item * (p.head_dim / 2);
  float sum = 0.f;
  for (int i = lane; i < p.head_dim / 2; i += 32)
    sum += cu::low_float(out[i]) * cu::low_float(grad_out[i]) + cu::high_float(out[i]) * cu::high_float(grad_out[i]);
#pragma unroll
  for (int distance = 16; distance > 0; distance /= 2) sum += __shfl_xor_sync(~0u, sum, distance);
  if (lane == 0) p.delta[item % heads * p.tokens + item / heads] = sum;
}

// What a stage of queries brings: Q, dO, and per query the logarithm of the softmax denominator and delta.
template <class S>
struct QueryStages {
  bf16* base;
  float* rows;

  __device__ __forceinline__ bf16* queries(int stage) const { return base + stage * 2 * S::Stage * S::D; }
  __device__ __forceinline__ bf16* grad_out(int stage) const { return queries(stage) + S::Stage * S::D; }
  __device__ __forceinline__ float* lse(int stage) const { return rows + stage * 2 * S::Stage; }
  __device__ __forceinline__ float* delta(int stage) const { return lse(stage) + S::Stage; }
};

template <class S>
__device__ __forceinline__ void load_queries(const AttentionBackwardParams& p, const QueryStages<S>& stages, int stage,
                                             int head, int start, int length, int first) {
  const int heads = p.kv_heads * p.queries_per_group;
  const int64_t row = int64_t(head) * p.tokens + start, out_stride = int64_t(heads) * S::D;
  tile::AsyncRows<S::D, S::Stage, S::Threads> queries(static_cast<const bf16*>(p.queries) + row * S::D, S::D, first);
  queries.load(stages.queries(stage), S::D, length);
  tile::AsyncRows<S::D, S::Stage, S::Threads> grad_out(
      static_cast<const bf16*>(p.grad_out) + start * out_stride + head * S::D, out_stride, first);
  grad_out.load(stages.grad_out(stage), out_stride, length);
  static_assert(S::Threads >= 2 * S::Stage, "one thread a scalar");
  const int i = threadIdx.x % S::Stage;
  if (threadIdx.x < 2 * S::Stage) {
    const float* source = threadIdx.x < S::Stage ? p.lse : p.delta;
    cu::cp_async_4(stages.lse(stage) + threadIdx.x, source + row + first + i, first + i < length);
  }
}

// P^T and dS^T of 16 keys and Stage queries, as A fragments. Queries past the end have lse, delta, Q and dO of zero: P
// is then 1 and meets only zeros.
template <class S>
__device__ __forceinline__ void key_side_weights(uint32_t (&weights)[S::Stage / 16][4],
                                                 uint32_t (&grad_scores)[S::Stage / 16][4],
                                                 const QueryStages<S>& stages, int stage, const bf16* keys,
                                                 const bf16* values, int key, int query, float scale_log2) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  float scores[S::Stage / 8][4], grad_weights[S::Stage / 8][4];
  multiply_transposed<S>(scores, keys, stages.queries(stage));
  const bool crosses_diagonal = query < key + 15;
#pragma unroll
  for (int j = 0; j < S::Stage / 8; j++) {
    const float2 lse = cu::load_shared(reinterpret_cast<const float2*>(stages.lse(stage) + j * 8 + 2 * t));
#pragma unroll
    for (int e = 0; e < 4; e++) {
      const float value = cu::exp2_approximate(scores[j][e] * scale_log2 - (e & 1 ? lse.y : lse.x) * kLog2e);
      const bool future = crosses_diagonal && key + g + (e >> 1) * 8 > query + j * 8 + 2 * t + (e & 1);
      scores[j][e] = future ? 0.f : value;
    }
  }
  multiply_transposed<S>(grad_weights, values, stages.grad_out(stage));
#pragma unroll
  for (int j = 0; j < S::Stage / 8; j++) {
    const float2 delta = cu::load_shared(reinterpret_cast<const float2*>(stages.delta(stage) + j * 8 + 2 * t));
#pragma unroll
    for (int e = 0; e < 4; e++) grad_weights[j][e] = scores[j][e] * (grad_weights[j][e] - (e & 1 ? delta.y : delta.x));
  }
  pack(weights, scores);
  pack(grad_scores, grad_weights);
}

template <class S>
__global__ void __launch_bounds__(S::Threads)
    attention_grad_keys_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int D = S::D;
  const int sequence = blockIdx.z, group = blockIdx.y, block_key = blockIdx.x * S::Block;  // the longest walks first
  const int start = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - start;
  if (block_key >= length) return;

  bf16* keys = cu::dynamic_shared<bf16>();
  bf16* values = keys + S::Block * D;
  const QueryStages<S> stages{values + S::Block * D, reinterpret_cast<float*>(values + (S::Block + 4 * S::Stage) * D)};
  const bf16* value_rows = static_cast<const bf16*>(p.qkv.data) + start * p.qkv.token_stride +
                           group * p.qkv.group_stride + (p.queries_per_group + 1) * p.qkv.slot_stride;
  const bf16* key_rows = static_cast<const bf16*>(p.keys) + (int64_t(group) * p.tokens + start) * D;
  tile::AsyncRows<D, S::Block, S::Threads>(key_rows, D, block_key).load(keys, D, length);
  tile::AsyncRows<D, S::Block, S::Threads>(value_rows, p.qkv.token_stride, block_key)
      .load(values, p.qkv.token_stride, length);

  // One walk over the heads of the group and their queries; a tile before the block's first key sees none of its keys.
  const int first_query = block_key / S::Stage * S::Stage, heads_end = (group + 1) * p.queries_per_group;
  int head = group * p.queries_per_group, query = first_query, stage = 0;
  load_queries<S>(p, stages, stage, head, start, length, query);
  cu::cp_async_commit();

  float grad_keys[D / 8][4], grad_values[D / 8][4];
  clear(grad_keys);
  clear(grad_values);
  const int warp_row = threadIdx.x / 32 * 16, warp_key = block_key + warp_row;
  while (head < heads_end) {
    cu::cp_async_wait<0>();
    __syncthreads();  // this step's queries are there; nobody reads the other stage any more
    int next_head = head, next_query = query + S::Stage;
    if (next_query >= length) next_head++, next_query = first_query;
    if (next_head < heads_end) {
      load_queries<S>(p, stages, stage ^ 1, next_head, start, length, next_query);
      cu::cp_async_commit();
    }
    if (query + S::Stage > warp_key) {  // else all these queries precede all keys of the warp
      uint32_t weights[S::Stage / 16][4], grad_scores[S::Stage / 16][4];
      key_side_weights<S>(weights, grad_scores, stages, stage, keys + warp_row * D, values + warp_row * D, warp_key,
                          query, p.scale * kLog2e);
      accumulate<S>(grad_values, weights, stages.grad_out(stage));
      accumulate<S>(grad_keys, grad_scores, stages.queries(stage));
    }
    head = next_head, query = next_query, stage ^= 1;
  }

  const int g = threadIdx.x % 32 / 4, table_row = (p.table.offsets ? p.table.offsets[sequence] : 0) + warp_key + g;
  tile::rotate_back<D>(grad_keys, p.table, table_row);
  const int64_t stride = int64_t(p.kv_heads) * (p.queries_per_group + 2) * D;
  bf16* grad = static_cast<bf16*>(p.grad_qkv) + start * stride +
               (int64_t(group) * (p.queries_per_group + 2) + p.queries_per_group) * D;
  tile::store_accumulators<D>(keys, warp_row, grad_keys, {p.scale, p.scale}, grad, stride, warp_key, length);
  tile::store_accumulators<D>(values, warp_row, grad_values, {1.f, 1.f}, grad + D, stride, warp_key, length);
}

template <class S>
__global__ void __launch_bounds__(S::Threads)
    attention_grad_queries_kernel(const __grid_constant__ AttentionBackwardParams p) {
  constexpr int D = S::D;
  const int sequence = blockIdx.z, head = blockIdx.y, group = head / p.queries_per_group;
  const int block_query = (gridDim.x - 1 - blockIdx.x) * S::Block;
  const int start = p.cu_seqlens[sequence], length = p.cu_seqlens[sequence + 1] - start;
  if (block_query >= length) return;

  bf16* queries = cu::dynamic_shared<bf16>();
  bf16* grad_out = queries + S::Block * D;
  bf16* stages = grad_out + S::Block * D;  // two of {K, V}
  const int64_t row = int64_t(head) * p.tokens + start, out_stride = int64_t(p.kv_heads) * p.queries_per_group * D;
  tile::AsyncRows<D, S::Block, S::Threads>(static_cast<const bf16*>(p.queries) + row * D, D, block_query)
      .load(queries, D, length);
  tile::AsyncRows<D, S::Block, S::Threads>(static_cast<const bf16*>(p.grad_out) + start * out_stride + head * D,
                                           out_stride, block_query)
      .load(grad_out, out_stride, length);
  const bf16* value_rows = static_cast<const bf16*>(p.qkv.data) + start * p.qkv.token_stride +
                           group * p.qkv.group_stride + (p.queries_per_group + 1) * p.qkv.slot_stride;
  tile::AsyncRows<D, S::Stage, S::Threads> next_keys(
      static_cast<const bf16*>(p.keys) + (int64_t(group) * p.tokens + start) * D, D, 0);
  tile::AsyncRows<D, S::Stage, S::Threads> next_values(value_rows, p.qkv.token_stride, 0);
  next_keys.load(stages, D, length);
  next_values.load(stages + S::Stage * D, p.qkv.token_stride, length);
  cu::cp_async_commit();

  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int warp_row = threadIdx.x / 32 * 16, warp_query = block_query + warp_row;
  float lse_log2[2], delta[2];
#pragma unroll
  for (int h = 0; h < 2; h++) {
    const int query = warp_query + g + h * 8;
    lse_log2[h] = query < length ? p.lse[row + query] * kLog2e : 0.f;
    delta[h] = query < length ? p.delta[row + query] : 0.f;
  }
  float grad_queries[D / 8][4];
  clear(grad_queries);
  const int keys_end = min(length, block_query + S::Block);
  const float scale_log2 = p.scale * kLog2e;
  for (int key = 0, stage = 0; key < keys_end; key += S::Stage, stage ^= 1) {
    cu::cp_async_wait<0>();
    __syncthreads();  // these keys are there; nobody reads the other stage any more
    if (key + S::Stage < keys_end) {
      bf16* target = stages + (stage ^ 1) * 2 * S::Stage * D;
      next_keys.load(target, D, length);
      next_values.load(target + S::Stage * D, p.qkv.token_stride, length);
      cu::cp_async_commit();
    }
    if (key > warp_query + 15) continue;  // all these keys lie in the future of all queries of the warp
    const bf16* keys = stages + stage * 2 * S::Stage * D;
    float scores[S::Stage / 8][4], grad_weights[S::Stage / 8][4];
    multiply_transposed<S>(scores, queries + warp_row * D, keys);
    multiply_transposed<S>(grad_weights, grad_out + warp_row * D, keys + S::Stage * D);
    const bool crosses_diagonal = key + S::Stage - 1 > warp_query;
#pragma unroll
    for (int j = 0; j < S::Stage / 8; j++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int h = e >> 1;
        const float weight = cu::exp2_approximate(scores[j][e] * scale_log2 - lse_log2[h]);
        const bool future = crosses_diagonal && key + j * 8 + 2 * t + (e & 1) > warp_query + g + h * 8;
        scores[j][e] = future ? 0.f : weight * (grad_weights[j][e] - delta[h]);
      }
    uint32_t grad_scores[S::Stage / 16][4];
    pack(grad_scores, scores);
    accumulate<S>(grad_queries, grad_scores, keys);
  }

  tile::rotate_back<D>(grad_queries, p.table, (p.table.offsets ? p.table.offsets[sequence] : 0) + warp_query + g);
  const int64_t stride = int64_t(p.kv_heads) * (p.queries_per_group + 2) * D;
  bf16* grad = static_cast<bf16*>(p.grad_qkv) + start * stride +
               (int64_t(group) * (p.queries_per_group + 2) + head % p.queries_per_group) * D;
  tile::store_accumulators<D>(queries, warp_row, grad_queries, {p.scale, p.scale}, grad, stride, warp_query, length);
}

template <class S>
void launch(const AttentionBackwardParams& p, cudaStream_t stream) {
  const int blocks = (p.max_seqlen + S::Block - 1) / S::Block, heads = p.kv_heads * p.queries_per_group;
  const int64_t rows = int64_t(p.tokens) * heads;
  constexpr int kRows = kDeltaThreads / 32;
  cu::launch<attention_delta_kernel>(dim3((rows + kRows - 1) / kRows), kDeltaThreads, 0, stream, p);
  cu::launch<attention_grad_keys_kernel<S>>(dim3(blocks, p.kv_heads, p.sequences), S::Threads, S::KeyBlockBytes, stream,
                                            p);
  cu::launch<attention_grad_queries_kernel<S>>(dim3(blocks, heads, p.sequences), S::Threads, S::QueryBlockBytes, stream,
                                               p);
}

}  // namespace

extern "C" void attention_backward_launch(const AttentionBackwardParams& p, cudaStream_t stream) {
  if (p.tokens == 0 || p.max_seqlen == 0) return;
  if (p.head_dim == 64) {
    launch<Shape<64, 8, 64>>(p, stream);
  } else {
    launch<Shape<128, 8, 64>>(p, stream);
  }
}

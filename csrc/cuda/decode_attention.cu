// Attention of one new token a row over its KV cache, bf16, fp32 inside.
//
// Reading the cache is all the time there is, so every byte is read once: one block takes the up to 16 queries of a
// group that share its keys (they fill the 16 rows of an mma), and the cache is cut into splits until the GPU is full.
// Inside a block each warp walks its own keys with its own ring of asynchronous copies and its own softmax; no block
// barrier stands in the loop. Warps, then splits, are merged by their logarithms of sums.
#include "params.h"
#include "tiles.cuh"

namespace {

using cu::bf16;
constexpr float kLog2e = 1.4426950408889634f;

template <int D_>
struct Shape {
  static constexpr int D = D_, Warps = 4, Stages = 3, Keys = 16;  // Keys: of a warp and stage
  static constexpr int Threads = Warps * 32, StageElements = 2 * Keys * D;
  static constexpr int RingBytes = Warps * Stages * StageElements * 2, QueryBytes = 16 * D * 2;
  static constexpr int MergeStride =
      D + 8;  // floats; the accumulator's four rows of a half warp fall into different banks
  static constexpr int SharedBytes = RingBytes + QueryBytes;
  static_assert(Warps * 16 * (MergeStride + 2) * 4 <= RingBytes, "the merge reuses the ring");
};

// Keys and values `first` .. `first + 15`, zeros from `end` on; this warp's lanes only. One group is left open.
template <class S>
__device__ __forceinline__ void load_stage(bf16* stage, const bf16* keys, int64_t key_stride, const bf16* values,
                                           int64_t value_stride, int first, int end) {
  constexpr int kChunks = S::D / 8;
  const int lane = threadIdx.x % 32, chunk = lane % kChunks;
#pragma unroll
  for (int i = 0; i < S::Keys * kChunks / 32; i++) {
    const int row = i * (32 / kChunks) + lane / kChunks;
    const bool valid = first + row < end;
    const int64_t position = valid ? first + row : 0;
    const int target = tile::swizzled<S::D>(row, chunk);
    cu::cp_async_16(stage + target, keys + position * key_stride + chunk * 8, valid);
    cu::cp_async_16(stage + S::Keys * S::D + target, values + position * value_stride + chunk * 8, valid);
  }
}

template <class S>
struct WarpState {
  float out[S::D / 8][4];
  float highest[2], sum[2];  // per row; the sum is this lane's share
};

// 16 queries against one stage of keys and values; those from `valid` on do not count.
template <class S>
__device__ __forceinline__ void attend(WarpState<S>& state, const uint32_t (&query)[S::D / 16][4], const bf16* keys,
                                       int valid, float scale_log2) {
  constexpr int D = S::D;
  const int t = threadIdx.x % 4, key_offset = tile::lane_offset<D, false>(0),
            value_offset = tile::lane_offset<D, true>(0);
  float scores[2][4] = {};
#pragma unroll
  for (int k = 0; k < D / 16; k++) {
    uint32_t b[4];
    tile::load_b_of_transpose<D>(b, keys, key_offset, 0, k);
    cu::mma_bf16(scores[0], query[k], b[0], b[1]);
    cu::mma_bf16(scores[1], query[k], b[2], b[3]);
  }
#pragma unroll
  for (int j = 0; j < 2; j++)
#pragma unroll
    for (int e = 0; e < 4; e++)
      if (j * 8 + 2 * t + (e & 1) >= valid) scores[j][e] = -INFINITY;
  uint32_t weights[4];
#pragma unroll
  for (int h = 0; h < 2; h++) {  // the first key of a stage is valid, so the maximum is finite
    float now = fmaxf(fmaxf(scores[0][2 * h], scores[0][2 * h + 1]), fmaxf(scores[1][2 * h], scores[1][2 * h + 1]));
    now = fmaxf(now, __shfl_xor_sync(~0u, now, 1));
    now = fmaxf(now, __shfl_xor_sync(~0u, now, 2));
    now = fmaxf(now * scale_log2, state.highest[h]);
    const float correction = cu::exp2_approximate(state.highest[h] - now);
    state.highest[h] = now;
    state.sum[h] *= correction;
#pragma unroll
    for (int j = 0; j < 2; j++) {
      const float even = cu::exp2_approximate(scores[j][2 * h] * scale_log2 - now);
      const float odd = cu::exp2_approximate(scores[j][2 * h + 1] * scale_log2 - now);
      state.sum[h] += even + odd;
      weights[2 * j + h] = cu::pack_bf16(even, odd);
    }
#pragma unroll
    for (int j = 0; j < D / 8; j++) state.out[j][2 * h] *= correction, state.out[j][2 * h + 1] *= correction;
  }
#pragma unroll
  for (int n = 0; n < D / 16; n++) {
    uint32_t b[4];
    tile::load_b<D>(b, keys + S::Keys * D, value_offset, 0, n);
    cu::mma_bf16(state.out[2 * n], weights, b[0], b[1]);
    cu::mma_bf16(state.out[2 * n + 1], weights, b[2], b[3]);
  }
}

// Leaves each warp's sums in shared memory: rows [Warps * 16][MergeStride], then highest and sum of each row.
template <class S>
__device__ __forceinline__ void publish(float* rows, float* extremes, WarpState<S>& state) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int h = 0; h < 2; h++) {
    float sum = state.sum[h];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const int line = warp * 16 + g + h * 8;
    if (t == 0) cu::store_shared(reinterpret_cast<float2*>(extremes + 2 * line), make_float2(state.highest[h], sum));
#pragma unroll
    for (int j = 0; j < S::D / 8; j++)
      cu::store_shared(reinterpret_cast<float2*>(rows + line * S::MergeStride + j * 8 + 2 * t),
                       make_float2(state.out[j][2 * h], state.out[j][2 * h + 1]));
  }
}

// Four columns of one query over all warps, normalised. Returns the base-2 logarithm of the sum; -infinity without
// keys.
template <class S>
__device__ __forceinline__ float merge(float4& result, const float* rows, const float* extremes, int slot, int column) {
  float most = -INFINITY, total = 0.f;
  float2 extreme[S::Warps];
#pragma unroll
  for (int w = 0; w < S::Warps; w++) {
    extreme[w] = cu::load_shared(reinterpret_cast<const float2*>(extremes + 2 * (w * 16 + slot)));
    most = fmaxf(most, extreme[w].x);
  }
  result = {0.f, 0.f, 0.f, 0.f};
#pragma unroll
  for (int w = 0; w < S::Warps; w++) {
    const float factor =
        extreme[w].y > 0.f ? cu::exp2_approximate(extreme[w].x - most) : 0.f;  // 0: a warp without keys
    const float4 part =
        cu::load_shared(reinterpret_cast<const float4*>(rows + (w * 16 + slot) * S::MergeStride + column));
    total += factor * extreme[w].y;
    result.x += factor * part.x, result.y += factor * part.y, result.z += factor * part.z, result.w += factor * part.w;
  }
  const float inverse = total > 0.f ? 1.f / total : 0.f;
  result.x *= inverse, result.y *= inverse, result.z *= inverse, result.w *= inverse;
  return total > 0.f ? most + cu::log2_approximate(total) : -INFINITY;
}

__device__ __forceinline__ void store_bf16(void* out, int64_t element, const float4& x) {
  *reinterpret_cast<uint2*>(static_cast<bf16*>(out) + element) = {cu::pack_bf16(x.x, x.y), cu::pack_bf16(x.z, x.w)};
}

template <class S>
__global__ void __launch_bounds__(S::Threads) decode_attention_kernel(const __grid_constant__ DecodeAttentionParams p) {
  constexpr int D = S::D, kStep = S::Warps * S::Keys;
  const int split = blockIdx.x, row = blockIdx.z;
  const int tiles = (p.queries_per_group + 15) / 16, group = blockIdx.y / tiles, first_slot = blockIdx.y % tiles * 16;
  const int heads = p.kv_heads * p.queries_per_group, slots = min(16, p.queries_per_group - first_slot);
  // Each row cuts its own length, so that rows of different length keep all splits equally busy.
  const int length = max(0, min(p.lengths[row], p.capacity));
  const int share = ((length + p.splits - 1) / p.splits + kStep - 1) / kStep * kStep;
  const int begin = min(split * share, length), end = min(begin + share, length);

  bf16* ring = cu::dynamic_shared<bf16>();
  bf16* queries = ring + S::RingBytes / 2;
  const int warp = threadIdx.x / 32;
  const int64_t first_head = int64_t(row) * heads + group * p.queries_per_group + first_slot;
  const bf16* query_rows = static_cast<const bf16*>(p.q) + first_head * D;
  const bf16* keys = static_cast<const bf16*>(p.keys.data) + row * p.keys.row_stride + group * p.keys.group_stride;
  const bf16* values =
      static_cast<const bf16*>(p.values.data) + row * p.values.row_stride + group * p.values.group_stride;
  bf16* stages = ring + warp * S::Stages * S::StageElements;

  tile::AsyncRows<D, 16, S::Threads>(query_rows, D, 0).load(queries, D, slots);
  cu::cp_async_commit();
  const int warp_begin = begin + warp * S::Keys;
#pragma unroll
  for (int i = 0; i < S::Stages - 1; i++) {
    load_stage<S>(stages + i * S::StageElements, keys, p.keys.position_stride, values, p.values.position_stride,
                  warp_begin + i * kStep, end);
    cu::cp_async_commit();
  }
  cu::cp_async_wait<S::Stages - 1>();
  __syncthreads();  // the queries are there
  uint32_t query[D / 16][4];
#pragma unroll
  for (int k = 0; k < D / 16; k++) tile::load_a<D>(query[k], queries, tile::lane_offset<D, true>(0), k);

  WarpState<S> state;
#pragma unroll
  for (int h = 0; h < 2; h++) state.highest[h] = -INFINITY, state.sum[h] = 0.f;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int e = 0; e < 4; e++) state.out[j][e] = 0.f;
  int stage = 0;
  for (int first = warp_begin; first < end; first += kStep) {
    cu::cp_async_wait<S::Stages - 2>();
    __syncwarp();  // the copies of all lanes have landed, and all lanes are done with the stage that is filled next
    const int filled = stage == 0 ? S::Stages - 1 : stage - 1;
    load_stage<S>(stages + filled * S::StageElements, keys, p.keys.position_stride, values, p.values.position_stride,
                  first + (S::Stages - 1) * kStep, end);
    cu::cp_async_commit();
    attend<S>(state, query, stages + stage * S::StageElements, end - first, p.scale * kLog2e);
    stage = stage == S::Stages - 1 ? 0 : stage + 1;
  }
  cu::cp_async_wait<0>();
  __syncthreads();  // the ring is free for the merge of the warps

  float* rows = reinterpret_cast<float*>(ring);
  float* extremes = rows + S::Warps * 16 * S::MergeStride;
  publish<S>(rows, extremes, state);
  __syncthreads();
  for (int item = threadIdx.x; item < slots * (D / 4); item += S::Threads) {
    const int slot = item / (D / 4), column = item % (D / 4) * 4;
    float4 result;
    const float lse = merge<S>(result, rows, extremes, slot, column);
    if (p.splits == 1) {
      store_bf16(p.out, (first_head + slot) * D + column, result);
    } else {
      const int64_t place = int64_t(split) * p.batch * heads + first_head + slot;
      *reinterpret_cast<float4*>(p.partial_out + place * D + column) = result;
      if (column == 0) p.partial_lse[place] = lse;
    }
  }
}

constexpr int kCombineThreads = 128;

// One thread four columns of a head: the splits weighted by their share of the sum.
__global__ void __launch_bounds__(kCombineThreads)
    decode_combine_kernel(const __grid_constant__ DecodeAttentionParams p) {
  const int64_t heads = int64_t(p.batch) * p.kv_heads * p.queries_per_group;
  const int64_t item = int64_t(blockIdx.x) * kCombineThreads + threadIdx.x;
  const int columns = p.head_dim / 4;
  if (item >= heads * columns) return;
  const int64_t head = item / columns, column = item % columns * 4;
  float most = -INFINITY;
  for (int s = 0; s < p.splits; s++) most = fmaxf(most, p.partial_lse[s * heads + head]);
  float total = 0.f;
  float4 result = {0.f, 0.f, 0.f, 0.f};
  for (int s = 0; s < p.splits && most > -INFINITY; s++) {
    const float factor = cu::exp2_approximate(p.partial_lse[s * heads + head] - most);
    const float4 part = *reinterpret_cast<const float4*>(p.partial_out + (s * heads + head) * p.head_dim + column);
    total += factor;
    result.x += factor * part.x, result.y += factor * part.y, result.z += factor * part.z, result.w += factor * part.w;
  }
  const float inverse = total > 0.f ? 1.f / total : 0.f;
  result.x *= inverse, result.y *= inverse, result.z *= inverse, result.w *= inverse;
  store_bf16(p.out, head * p.head_dim + column, result);
}

template <class S>
void launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  const int tiles = (p.queries_per_group + 15) / 16;
  cu::launch<decode_attention_kernel<S>>(dim3(p.splits, p.kv_heads * tiles, p.batch), S::Threads, S::SharedBytes,
                                         stream, p);
  if (p.splits == 1) return;
  const int64_t items = int64_t(p.batch) * p.kv_heads * p.queries_per_group * (p.head_dim / 4);
  cu::launch<decode_combine_kernel>(dim3((items + kCombineThreads - 1) / kCombineThreads), kCombineThreads, 0, stream,
                                    p);
}

}  // namespace

// Enough splits that every multiprocessor has two blocks, but no split below 256 keys: below that the merge costs more
// than the idle multiprocessors. An estimate, not a measurement.
extern "C" int32_t decode_attention_splits(int32_t batch, int32_t kv_heads, int32_t queries_per_group, int32_t capacity,
                                           int32_t multiprocessors) {
  const int blocks = batch * kv_heads * ((queries_per_group + 15) / 16);
  const int wanted = (2 * multiprocessors + blocks - 1) / blocks, most = (capacity + 255) / 256;
  return wanted < most ? (wanted > 1 ? wanted : 1) : (most > 1 ? most : 1);
}

extern "C" void decode_attention_launch(const DecodeAttentionParams& p, cudaStream_t stream) {
  if (p.batch == 0) return;
  if (p.head_dim == 64) {
    launch<Shape<64>>(p, stream);
  } else {
    launch<Shape<128>>(p, stream);
  }
}

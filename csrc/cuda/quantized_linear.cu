// y = x W^T with 4 or 8 bit weights and bf16 activations (W4A16, W8A16), fp32 sums. The weight's layout is in params.h.
//
// Few rows: reading W is all the time there is, so the warps of a block also divide the inputs among themselves, and W
// travels through a ring of asynchronous copies deep enough to keep the memory busy. Codes become bf16 without loss (an
// integer below 256 in size has at most 8 significant bits); a group's scale is applied to its fp32 sum, not to each
// weight, which saves the rounding of code * scale and a multiplication a weight.
//
// The layout gives a lane whole words of one output, not the inputs 2t, 2t + 1, 2t + 8, 2t + 9 that an mma takes. A
// product does not care about the order of its inputs, so lane t takes inputs 16t .. 16t + 15 of every 64, of x as well
// as of W: x is then read as plain 16-byte words in place of ldmatrix, at the same cost.
#include "params.h"
#include "quantized.cuh"
#include "tiles.cuh"

namespace {

using cu::bf16;
using quantized::kGroup, quantized::kTile, quantized::store_pair;
constexpr int kStep = 64;  // inputs of one stage: a row of x is then 128 bytes, all banks
constexpr int kGroupSteps = kGroup / kStep;

// Bits, rows of x in a block, warps along outputs and along inputs, tiles of 16 outputs a warp, stages of the ring.
template <int Bits_, int Rows_, int WarpsN_, int WarpsK_, int Tiles_, int Stages_>
struct Shape {
  static constexpr int Bits = Bits_, Rows = Rows_, WarpsN = WarpsN_, WarpsK = WarpsK_, Tiles = Tiles_, Stages = Stages_;
  static constexpr int Warps = WarpsN * WarpsK, Threads = Warps * 32, BlockTiles = WarpsN * Tiles;
  static constexpr int TileBytes = kStep * kTile * Bits / 8,
                       AffineBytes = 64;  // of a tile and step; 16 scales, 16 zeros
  static constexpr int InputBytes = Rows * kStep * 2, WarpBytes = Tiles * (TileBytes + AffineBytes);
  static constexpr int StageBytes = WarpsK * InputBytes + Warps * WarpBytes;
  static constexpr int SharedBytes = Stages * StageBytes;
  static constexpr int SumStride =
      BlockTiles * kTile + 8;  // floats; the four rows of a half warp fall into different banks
  static_assert((WarpsK - 1) * Rows * SumStride * 4 <= SharedBytes, "the reduction reuses the ring");
};

// Parts of stage `index`. `part` is a warp's place along the inputs.
template <class S>
struct Stage {
  unsigned char* base;
  __device__ __forceinline__ Stage(unsigned char* ring, int index) : base(ring + index * S::StageBytes) {}
  __device__ __forceinline__ bf16* inputs(int part) const {
    return reinterpret_cast<bf16*>(base + part * S::InputBytes);
  }
  __device__ __forceinline__ unsigned char* codes(int warp, int tile) const {
    return base + S::WarpsK * S::InputBytes + warp * S::WarpBytes + tile * (S::TileBytes + S::AffineBytes);
  }
  // 16 scales as bf16, then 16 zeros as bytes
  __device__ __forceinline__ unsigned char* affine(int warp, int tile) const {
    return codes(warp, tile) + S::TileBytes;
  }
};

// Two blocks of 64 bytes make a line of 128. Lanes t = 0 .. 3 read lines Bits / 4 apart at the same place, so the
// 16-byte chunks of a line move by twice the t that reads it.
template <int Bits>
__device__ __forceinline__ int swizzled_chunk(int chunk) {
  const int line = chunk / 8, t = line / (Bits / 4);
  return line * 8 + ((chunk % 8) ^ (2 * t));
}

// What this block and warp work on.
struct Work {
  int first_row, first_tile, tiles, groups, part_groups, warp, part, warp_tile;
};

template <class S>
__device__ __forceinline__ void load_inputs(const QuantizedLinearParams& p, const Work& work, const Stage<S>& stage,
                                            int step) {
  constexpr int kChunks = kStep / 8, kItems = S::WarpsK * S::Rows * kChunks;
  static_assert(kItems % S::Threads == 0);
#pragma unroll
  for (int i = 0; i < kItems / S::Threads; i++) {
    const int item = i * S::Threads + threadIdx.x, chunk = item % kChunks, row = item / kChunks % S::Rows;
    const int part = item / kChunks / S::Rows,
              input = (part * work.part_groups * kGroupSteps + step) * kStep + chunk * 8;
    const bool valid =
        work.first_row + row < p.rows && step < work.part_groups * kGroupSteps && input < p.weight.inputs;
    const bf16* source =
        static_cast<const bf16*>(p.x) + (valid ? int64_t(work.first_row + row) * p.weight.inputs + input : 0);
    cu::cp_async_16(stage.inputs(part) + tile::swizzled<kStep>(row, chunk), source, valid);
  }
}

template <class S>
__device__ __forceinline__ void load_stage(const QuantizedLinearParams& p, const Work& work, unsigned char* ring,
                                           int index, int step) {
  const Stage<S> stage(ring, index);
  load_inputs<S>(p, work, stage, step);
  const int lane = threadIdx.x % 32, group = work.part * work.part_groups + step / kGroupSteps;
#pragma unroll
  for (int i = 0; i < S::Tiles; i++) {
    const bool valid = step / kGroupSteps < work.part_groups && group < work.groups && work.warp_tile + i < work.tiles;
    const int64_t place = valid ? int64_t(work.warp_tile + i) * work.groups + group : 0;
    const unsigned char* codes = static_cast<const unsigned char*>(p.weight.packed) +
                                 place * (kGroupSteps * S::TileBytes) + step % kGroupSteps * S::TileBytes;
#pragma unroll
    for (int j = 0; j < S::TileBytes / 512; j++)
      cu::cp_async_16(stage.codes(work.warp, i) + swizzled_chunk<S::Bits>(j * 32 + lane) * 16,
                      codes + (j * 32 + lane) * 16, valid);
    if (lane < 2)
      cu::cp_async_16(stage.affine(work.warp, i) + lane * 16,
                      static_cast<const bf16*>(p.weight.scales) + place * kTile + lane * 8, valid);
    if (lane == 2 && p.weight.zeros)
      cu::cp_async_16(stage.affine(work.warp, i) + 32, p.weight.zeros + place * kTile, valid);
  }
}

// Sums of 16 x 8 tiles: rows of x by outputs.
template <class S>
struct Sums {
  float value[S::Rows / 16][2 * S::Tiles][4];
  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
      for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
        for (int e = 0; e < 4; e++) value[m][n][e] = 0.f;
  }
};

// bf16 codes minus zero of inputs 4k .. 4k + 3 of this lane's 16, from the words of one output: the B registers of
// product k.
template <int Bits>
__device__ __forceinline__ void dequantize(uint32_t (&b)[2], const uint32_t (&words)[Bits / 2], int k, float zero) {
  if constexpr (Bits == 4) {
    const uint32_t offset = cu::pack_bf16(128.f + zero, 128.f + zero),
                   codes = words[k / 2] >> (4 * (k % 2)) & 0x0F0F0F0Fu;
#pragma unroll
    for (int h = 0; h < 2; h++)  // 0x4300 | code is the bf16 128 + code
      b[h] = cu::subtract_bf16x2(__byte_perm(codes, 0x43434343u, h ? 0x4342 : 0x4140), offset);
  } else {
#pragma unroll
    for (int h = 0; h < 2; h++) {  // 0x4B000000 | code is the fp32 2^23 + code
      const float low = __uint_as_float(__byte_perm(words[k], 0x4B000000u, 0x7440 + 2 * h)) - 8388608.f;
      const float high = __uint_as_float(__byte_perm(words[k], 0x4B000000u, 0x7441 + 2 * h)) - 8388608.f;
      b[h] = cu::pack_bf16(low - zero, high - zero);
    }
  }
}

// Words of output n * 8 + g with this lane's 16 inputs, and its zero point.
template <class S>
__device__ __forceinline__ float load_codes(uint32_t (&words)[S::Bits / 2], const Stage<S>& stage, const Work& work,
                                            int tile, int n, bool symmetric) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, output = n * 8 + g;
#pragma unroll
  for (int i = 0; i < S::Bits / 2; i++) {
    const int block = t * (S::Bits / 2) + i;
    const int chunk = swizzled_chunk<S::Bits>(block * 4 + output / 4);
    words[i] =
        cu::load_shared(reinterpret_cast<const uint32_t*>(stage.codes(work.warp, tile) + chunk * 16) + output % 4);
  }
  if (symmetric) return float(1 << (S::Bits - 1));
  const uint32_t four =
      cu::load_shared(reinterpret_cast<const uint32_t*>(stage.affine(work.warp, tile) + 32) + output / 4);
  return float(four >> (8 * (output % 4)) & 0xFF);
}

// Adds 64 inputs of the warp's outputs, codes only.
template <class S>
__device__ __forceinline__ void multiply_step(Sums<S>& sums, const Stage<S>& stage, const Work& work, bool symmetric) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const bf16* inputs = stage.inputs(work.part);
  uint32_t words[2 * S::Tiles][S::Bits / 2];
  float zeros[2 * S::Tiles];
#pragma unroll
  for (int n = 0; n < 2 * S::Tiles; n++) zeros[n] = load_codes<S>(words[n], stage, work, n / 2, n % 2, symmetric);
#pragma unroll
  for (int half = 0; half < 2; half++) {  // of the lane's 16 inputs
    uint4 x[S::Rows / 16][2];
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        x[m][h] = cu::load_shared(
            reinterpret_cast<const uint4*>(inputs + tile::swizzled<kStep>(m * 16 + g + h * 8, 2 * t + half)));
#pragma unroll
    for (int k = 0; k < 2; k++) {
      uint32_t b[2 * S::Tiles][2];
#pragma unroll
      for (int n = 0; n < 2 * S::Tiles; n++) dequantize<S::Bits>(b[n], words[n], 2 * half + k, zeros[n]);
#pragma unroll
      for (int m = 0; m < S::Rows / 16; m++) {
        const uint4 &low = x[m][0], &high = x[m][1];  // rows g and g + 8
        const uint32_t a[4] = {k ? low.z : low.x, k ? high.z : high.x, k ? low.w : low.y, k ? high.w : high.y};
#pragma unroll
        for (int n = 0; n < 2 * S::Tiles; n++) cu::mma_bf16(sums.value[m][n], a, b[n][0], b[n][1]);
      }
    }
  }
}

// The end of a group: its sums times its scales move to the totals.
template <class S>
__device__ __forceinline__ void close_group(Sums<S>& totals, Sums<S>& sums, const Stage<S>& stage, const Work& work) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2 * S::Tiles; n++) {
    const uint32_t pair =
        cu::load_shared(reinterpret_cast<const uint32_t*>(stage.affine(work.warp, n / 2)) + n % 2 * 4 + t);
    const float even = cu::low_float(pair), odd = cu::high_float(pair);
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) totals.value[m][n][e] += sums.value[m][n][e] * (e & 1 ? odd : even);
  }
  sums.clear();
}

// Adds up the parts of the inputs, in fixed order, in the warps of part 0.
template <class S>
__device__ __forceinline__ void reduce_parts(Sums<S>& totals, float* shared, const Work& work) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = (work.warp_tile - work.first_tile) * kTile;
  if (work.part > 0) {
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
      for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
        for (int h = 0; h < 2; h++)
          cu::store_shared(
              reinterpret_cast<float2*>(shared + ((work.part - 1) * S::Rows + m * 16 + g + h * 8) * S::SumStride +
                                        column + n * 8 + 2 * t),
              make_float2(totals.value[m][n][2 * h], totals.value[m][n][2 * h + 1]));
  }
  __syncthreads();
  if (work.part > 0) return;
#pragma unroll
  for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
    for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
      for (int h = 0; h < 2; h++)
        for (int part = 1; part < S::WarpsK; part++) {
          const float2 other = cu::load_shared(reinterpret_cast<const float2*>(
              shared + ((part - 1) * S::Rows + m * 16 + g + h * 8) * S::SumStride + column + n * 8 + 2 * t));
          totals.value[m][n][2 * h] += other.x;
          totals.value[m][n][2 * h + 1] += other.y;
        }
}

template <class S>
__device__ __forceinline__ void store(const QuantizedLinearParams& p, const Sums<S>& totals, const Work& work) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
    for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = work.first_row + m * 16 + g + h * 8, column = work.warp_tile * kTile + n * 8 + 2 * t;
        if (row < p.rows && column < p.weight.outputs)
          store_pair(p.y, p.wide, int64_t(row) * p.weight.outputs + column, column + 1 < p.weight.outputs,
                     totals.value[m][n][2 * h], totals.value[m][n][2 * h + 1]);
      }
}

template <class S>
__global__ void __launch_bounds__(S::Threads) quantized_linear_kernel(const __grid_constant__ QuantizedLinearParams p) {
  Work work;
  work.warp = threadIdx.x / 32;
  work.part = work.warp / S::WarpsN;
  work.first_row = blockIdx.y * S::Rows;
  work.first_tile = blockIdx.x * S::BlockTiles;
  work.warp_tile = work.first_tile + work.warp % S::WarpsN * S::Tiles;
  work.tiles = (p.weight.outputs + kTile - 1) / kTile;
  work.groups = (p.weight.inputs + kGroup - 1) / kGroup;
  work.part_groups = (work.groups + S::WarpsK - 1) / S::WarpsK;  // whole groups, so that a sum meets one scale

  unsigned char* ring = cu::dynamic_shared<unsigned char>();
#pragma unroll
  for (int i = 0; i < S::Stages - 1; i++) {
    load_stage<S>(p, work, ring, i, i);
    cu::cp_async_commit();
  }
  Sums<S> totals, sums;
  totals.clear();
  sums.clear();
  int index = 0;
  for (int step = 0; step < work.part_groups * kGroupSteps; step++) {
    cu::cp_async_wait<S::Stages - 2>();
    __syncthreads();  // this stage is there; nobody reads the stage that is filled next
    load_stage<S>(p, work, ring, index == 0 ? S::Stages - 1 : index - 1, step + S::Stages - 1);
    cu::cp_async_commit();
    const Stage<S> stage(ring, index);
    multiply_step<S>(sums, stage, work, p.weight.zeros == nullptr);
    if (step % kGroupSteps == kGroupSteps - 1) close_group<S>(totals, sums, stage, work);
    index = index == S::Stages - 1 ? 0 : index + 1;
  }
  cu::cp_async_wait<0>();
  if constexpr (S::WarpsK > 1) {
    __syncthreads();  // the ring is free for the sums of the parts
    reduce_parts<S>(totals, reinterpret_cast<float*>(ring), work);
  }
  if (work.part == 0) store<S>(p, totals, work);
}

template <class S>
void launch(const QuantizedLinearParams& p, cudaStream_t stream) {
  const int tiles = (p.weight.outputs + kTile - 1) / kTile;
  const dim3 grid((tiles + S::BlockTiles - 1) / S::BlockTiles, (p.rows + S::Rows - 1) / S::Rows);
  cu::launch<quantized_linear_kernel<S>>(grid, S::Threads, S::SharedBytes, stream, p);
}

}  // namespace

extern "C" void quantized_linear_launch(const QuantizedLinearParams& p, cudaStream_t stream) {
  if (p.rows == 0 || p.weight.outputs == 0) return;
  const bool few = p.rows <= 16;
  if (p.weight.bits == 4) {
    few ? launch<Shape<4, 16, 2, 4, 1, 6>>(p, stream) : launch<Shape<4, 64, 2, 2, 2, 3>>(p, stream);
  } else {
    few ? launch<Shape<8, 16, 2, 4, 1, 5>>(p, stream) : launch<Shape<8, 64, 2, 2, 2, 3>>(p, stream);
  }
}

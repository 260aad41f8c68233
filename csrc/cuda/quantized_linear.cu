// y = x W^T with 4 or 8 bit weights and bf16 activations (W4A16, W8A16), fp32 sums.
//
// Few rows: reading W is all the time there is, so the warps of a block also divide the inputs among themselves, and W
// travels through a ring of asynchronous copies deep enough to keep the memory busy. Codes become bf16 without loss (an
// integer below 256 in size has at most 8 significant bits); a group's scale is applied to its fp32 sum, not to each
// weight, which saves the rounding of code * scale and a multiplication a weight.
#include "params.h"
#include "tiles.cuh"

namespace {

using cu::bf16;
constexpr int kStep = 64;   // inputs of one stage: a row of x is then 128 bytes, all banks
constexpr int kTile = 16;   // outputs of one fragment column

// Bits, rows of x in a block, warps along outputs and along inputs, tiles of 16 outputs a warp, stages of the ring.
template <int Bits_, int Rows_, int WarpsN_, int WarpsK_, int Tiles_, int Stages_>
struct Shape {
  static constexpr int Bits = Bits_, Rows = Rows_, WarpsN = WarpsN_, WarpsK = WarpsK_, Tiles = Tiles_, Stages = Stages_;
  static constexpr int Warps = WarpsN * WarpsK, Threads = Warps * 32, BlockTiles = WarpsN * Tiles;
  static constexpr int Loads = Bits / 4;  // 16-byte loads a lane, tile and step
  static constexpr int InputBytes = Rows * kStep * 2, WeightBytes = Tiles * Loads * 512, AffineBytes = Tiles * kTile * 2 * 4;
  static constexpr int StageBytes = WarpsK * InputBytes + Warps * (WeightBytes + AffineBytes);
  static constexpr int SharedBytes = Stages * StageBytes;
  static constexpr int SumStride = BlockTiles * kTile + 8;  // floats; the four rows of a half warp fall into different banks
  static_assert((WarpsK - 1) * Rows * SumStride * 4 <= SharedBytes, "the reduction reuses the ring");
};

// Parts of stage `index`. `part` is a warp's place along the inputs.
template <class S>
struct Stage {
  unsigned char* base;
  __device__ __forceinline__ Stage(unsigned char* ring, int index) : base(ring + index * S::StageBytes) {}
  __device__ __forceinline__ bf16* inputs(int part) const { return reinterpret_cast<bf16*>(base + part * S::InputBytes); }
  __device__ __forceinline__ uint4* words(int warp) const {
    return reinterpret_cast<uint4*>(base + S::WarpsK * S::InputBytes + warp * S::WeightBytes);
  }
  // [Tiles * 16] scales, then as many zeros
  __device__ __forceinline__ float* affine(int warp) const {
    return reinterpret_cast<float*>(base + S::WarpsK * S::InputBytes + S::Warps * S::WeightBytes + warp * S::AffineBytes);
  }
};

// Code number `index` (0 .. 31 for 4 bits, 0 .. 15 for 8) of a lane's 16 bytes belongs to this output and input of its tile.
// A word of 4-bit codes holds one k16 step; bits 4 * (2n + h) + 16 * e: output n * 8 + g, input h * 8 + 2t + e. Two words of
// 8-bit codes hold one k16 step, word n: bytes 2h + e. So a shift and a mask give a pair of one B register.
struct Place {
  int output, input;
};
__device__ __forceinline__ Place fragment_code(int bits, int lane, int index) {
  const int g = lane / 4, t = lane % 4;
  if (bits == 4) {
    const int word = index / 8, nibble = index % 8, pair = nibble % 4, e = nibble / 4;
    return {pair / 2 * 8 + g, word * 16 + pair % 2 * 8 + 2 * t + e};
  }
  const int word = index / 4, byte = index % 4;
  return {word % 2 * 8 + g, word / 2 * 16 + byte / 2 * 8 + 2 * t + byte % 2};
}

// The two B registers of output n * 8 + g for a k16 step; `zero` is that output's zero point.
template <int Bits>
__device__ __forceinline__ void dequantize(uint32_t (&b)[2], const uint32_t* words, int step, int n, float zero) {
  if constexpr (Bits == 4) {
    const uint32_t offset = cu::pack_bf16(128.f + zero, 128.f + zero);
#pragma unroll
    for (int h = 0; h < 2; h++)  // 0x4300 | code is the bf16 128 + code
      b[h] = cu::subtract_bf16x2((words[step] >> (4 * (2 * n + h)) & 0x000F000Fu) | 0x43004300u, offset);
  } else {
    const uint32_t word = words[step * 2 + n];
#pragma unroll
    for (int h = 0; h < 2; h++) {  // 0x4B000000 | code is the fp32 2^23 + code
      const float low = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7440 + 2 * h)) - 8388608.f;
      const float high = __uint_as_float(__byte_perm(word, 0x4B000000u, 0x7441 + 2 * h)) - 8388608.f;
      b[h] = cu::pack_bf16(low - zero, high - zero);
    }
  }
}

// What this block and warp work on.
struct Work {
  int first_row, first_tile, tiles, steps, groups, part_steps, warp, part, warp_tile;
};

template <class S>
__device__ __forceinline__ void load_stage(const QuantizedLinearParams& p, const Work& work, unsigned char* ring, int index, int step) {
  const Stage<S> stage(ring, index);
  constexpr int kChunks = kStep / 8, kItems = S::WarpsK * S::Rows * kChunks;
  static_assert(kItems % S::Threads == 0);
#pragma unroll
  for (int i = 0; i < kItems / S::Threads; i++) {
    const int item = i * S::Threads + threadIdx.x, chunk = item % kChunks, row = item / kChunks % S::Rows;
    const int part = item / kChunks / S::Rows, own_step = part * work.part_steps + step;
    const int input = own_step * kStep + chunk * 8;
    const bool valid = work.first_row + row < p.rows && step < work.part_steps && input < p.weight.inputs;
    const bf16* source = static_cast<const bf16*>(p.x) + (valid ? int64_t(work.first_row + row) * p.weight.inputs + input : 0);
    cu::cp_async_16(stage.inputs(part) + tile::swizzled<kStep>(row, chunk), source, valid);
  }
  const int lane = threadIdx.x % 32, own_step = work.part * work.part_steps + step;
  const bool step_valid = step < work.part_steps && own_step < work.steps;
#pragma unroll
  for (int i = 0; i < S::Tiles; i++) {
    const int n = work.warp_tile + i;
    const bool valid = step_valid && n < work.tiles;
#pragma unroll
    for (int j = 0; j < S::Loads; j++) {
      const int64_t word = valid ? ((int64_t(n) * work.steps + own_step) * S::Loads + j) * 32 + lane : 0;
      cu::cp_async_16(stage.words(work.warp) + (i * S::Loads + j) * 32 + lane, static_cast<const uint4*>(p.weight.words) + word, valid);
    }
    // The last group may end before its last step, yet its scale is needed there.
    const int group = own_step * kStep / p.weight.group;
    const bool exists = n < work.tiles && group < work.groups;
    const int64_t column = exists ? (int64_t(group) * work.tiles + n) * kTile + lane % kTile : 0;
    const float* source = lane < kTile ? p.weight.scales : p.weight.zeros;
    cu::cp_async_4(stage.affine(work.warp) + (lane < kTile ? 0 : S::Tiles * kTile) + i * kTile + lane % kTile, source + column, exists);
  }
}

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

// Adds 64 inputs of the warp's outputs, codes only.
template <class S>
__device__ __forceinline__ void multiply_step(Sums<S>& sums, const Stage<S>& stage, const Work& work) {
  const int lane = threadIdx.x % 32, g = lane / 4;
  const bf16* inputs = stage.inputs(work.part);
  const int offset = tile::lane_offset<kStep, true>(0);
  uint32_t words[S::Tiles][4 * S::Loads];
  float zeros[2 * S::Tiles];
#pragma unroll
  for (int i = 0; i < S::Tiles; i++) {
#pragma unroll
    for (int j = 0; j < S::Loads; j++) {
      const uint4 four = cu::load_shared(stage.words(work.warp) + (i * S::Loads + j) * 32 + lane);
      words[i][4 * j] = four.x, words[i][4 * j + 1] = four.y, words[i][4 * j + 2] = four.z, words[i][4 * j + 3] = four.w;
    }
#pragma unroll
    for (int n = 0; n < 2; n++)
      zeros[2 * i + n] = cu::load_shared(stage.affine(work.warp) + (S::Tiles + i) * kTile + n * 8 + g);
  }
#pragma unroll
  for (int k = 0; k < kStep / 16; k++) {
    uint32_t b[2 * S::Tiles][2];
#pragma unroll
    for (int n = 0; n < 2 * S::Tiles; n++) dequantize<S::Bits>(b[n], words[n / 2], k, n % 2, zeros[n]);
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++) {
      uint32_t a[4];
      tile::load_a<kStep>(a, inputs + m * 16 * kStep, offset, k);
#pragma unroll
      for (int n = 0; n < 2 * S::Tiles; n++) cu::mma_bf16(sums.value[m][n], a, b[n][0], b[n][1]);
    }
  }
}

// The end of a group: its sums times its scales move to the totals.
template <class S>
__device__ __forceinline__ void close_group(Sums<S>& totals, Sums<S>& sums, const float* scales) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int n = 0; n < 2 * S::Tiles; n++) {
    const float2 scale = cu::load_shared(reinterpret_cast<const float2*>(scales + n * 8 + 2 * t));
#pragma unroll
    for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
      for (int e = 0; e < 4; e++) totals.value[m][n][e] += sums.value[m][n][e] * (e & 1 ? scale.y : scale.x);
  }
  sums.clear();
}

// Adds up the parts of the inputs, in fixed order, in the warps of part 0.
template <class S>
__device__ __forceinline__ void reduce_parts(Sums<S>& totals, float* shared, const Work& work) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4, column = (work.warp_tile - work.first_tile) * kTile;
#pragma unroll
  for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
    for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        float* place = shared + (m * 16 + g + h * 8) * S::SumStride + column + n * 8 + 2 * t;
        if (work.part > 0) {
          cu::store_shared(reinterpret_cast<float2*>(place + (work.part - 1) * S::Rows * S::SumStride),
                           make_float2(totals.value[m][n][2 * h], totals.value[m][n][2 * h + 1]));
        }
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
  bf16* y = static_cast<bf16*>(p.y);
#pragma unroll
  for (int m = 0; m < S::Rows / 16; m++)
#pragma unroll
    for (int n = 0; n < 2 * S::Tiles; n++)
#pragma unroll
      for (int h = 0; h < 2; h++) {
        const int row = work.first_row + m * 16 + g + h * 8, column = work.warp_tile * kTile + n * 8 + 2 * t;
        if (row >= p.rows || column >= p.weight.outputs) continue;
        bf16* place = y + int64_t(row) * p.weight.outputs + column;
        if (p.weight.outputs % 2 == 0) {
          *reinterpret_cast<uint32_t*>(place) = cu::pack_bf16(totals.value[m][n][2 * h], totals.value[m][n][2 * h + 1]);
        } else {
          place[0] = cu::to_bf16(totals.value[m][n][2 * h]);
          if (column + 1 < p.weight.outputs) place[1] = cu::to_bf16(totals.value[m][n][2 * h + 1]);
        }
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
  work.steps = (p.weight.inputs + kStep - 1) / kStep;
  const int group_steps = p.weight.group / kStep;
  work.groups = (work.steps + group_steps - 1) / group_steps;
  work.part_steps = (work.groups + S::WarpsK - 1) / S::WarpsK * group_steps;  // whole groups, so that a sum meets one scale

  unsigned char* ring = cu::dynamic_shared<unsigned char>();
#pragma unroll
  for (int i = 0; i < S::Stages - 1; i++) {
    load_stage<S>(p, work, ring, i, i);
    cu::cp_async_commit();
  }
  Sums<S> totals, sums;
  totals.clear();
  sums.clear();
  int index = 0, steps_left = group_steps;
  for (int step = 0; step < work.part_steps; step++) {
    cu::cp_async_wait<S::Stages - 2>();
    __syncthreads();  // this stage is there; nobody reads the stage that is filled next
    load_stage<S>(p, work, ring, index == 0 ? S::Stages - 1 : index - 1, step + S::Stages - 1);
    cu::cp_async_commit();
    const Stage<S> stage(ring, index);
    multiply_step<S>(sums, stage, work);
    if (--steps_left == 0) {
      close_group<S>(totals, sums, stage.affine(work.warp));
      steps_left = group_steps;
    }
    index = index == S::Stages - 1 ? 0 : index + 1;
  }
  cu::cp_async_wait<0>();
  if constexpr (S::WarpsK > 1) {
    __syncthreads();
    reduce_parts<S>(totals, reinterpret_cast<float*>(ring), work);
  }
  if (work.part == 0) store<S>(p, totals, work);
}

constexpr int kPackThreads = 256;

// Where 16 bytes of codes belong: number `item` of all, in the order [tile of outputs][step of inputs][lane].
template <int Bits>
struct Fragment {
  static constexpr int Width = kStep * 4 / Bits;  // inputs that 16 bytes of each lane cover
  int lane, first_output, first_input;
  bool exists;
  __device__ __forceinline__ Fragment(const QuantizedWeight& w, int64_t item) {
    const int tiles = (w.outputs + kTile - 1) / kTile, widths = (w.inputs + kStep - 1) / kStep * (kStep / Width);
    lane = item % 32;
    first_input = item / 32 % widths * Width;
    first_output = item / 32 / widths * kTile;
    exists = item < int64_t(tiles) * widths * 32;
  }
};

// One thread packs 16 bytes; the first threads also bring scales and zeros into [groups, outputs] order.
template <int Bits>
__global__ void __launch_bounds__(kPackThreads) quantized_pack_kernel(const __grid_constant__ QuantizedPackParams p) {
  const QuantizedWeight& w = p.weight;
  const int64_t item = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const int columns = (w.outputs + kTile - 1) / kTile * kTile, groups = (w.inputs + w.group - 1) / w.group;
  if (item < int64_t(groups) * columns) {
    const int64_t column = item % columns, source = column * groups + item / columns;
    const bool valid = column < w.outputs;
    w.scales[item] = valid ? p.scales[source] : 0.f;
    w.zeros[item] = valid && p.zeros ? float(p.zeros[source]) : float(1 << (Bits - 1));
  }
  const Fragment<Bits> fragment(w, item);
  if (!fragment.exists) return;
  constexpr int kCodes = 32 / Bits;  // in a word
  uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
  for (int i = 0; i < 4 * kCodes; i++) {
    const Place place = fragment_code(Bits, fragment.lane, i);
    const int64_t output = fragment.first_output + place.output, input = fragment.first_input + place.input;
    if (output >= w.outputs || input >= w.inputs) continue;
    const uint32_t code = Bits == 8 ? p.codes[output * w.inputs + input]
                                    : p.codes[output * ((w.inputs + 1) / 2) + input / 2] >> (4 * (input % 2)) & 15;
    words[i / kCodes] |= code << (Bits * (i % kCodes));
  }
  static_cast<uint4*>(w.words)[item] = make_uint4(words[0], words[1], words[2], words[3]);
}

// One thread turns 16 bytes of codes into bf16 weights, two neighbouring inputs a store.
template <int Bits>
__global__ void __launch_bounds__(kPackThreads) dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  const QuantizedWeight& w = p.weight;
  const int64_t item = int64_t(blockIdx.x) * kPackThreads + threadIdx.x;
  const Fragment<Bits> fragment(w, item);
  if (!fragment.exists) return;
  const int columns = (w.outputs + kTile - 1) / kTile * kTile;
  const uint4 four = cu::load_streaming(static_cast<const uint4*>(w.words) + item);
  const uint32_t words[4] = {four.x, four.y, four.z, four.w};
  constexpr int kCodes = 32 / Bits, kMask = (1 << Bits) - 1;
  // The second of a pair: 4 nibbles or 1 byte further up, see fragment_code.
  constexpr int kPairs = kCodes / 2, kSecond = Bits == 4 ? 4 : 1;
#pragma unroll
  for (int i = 0; i < 4 * kPairs; i++) {
    const int first = i / kPairs * kCodes + (Bits == 4 ? i % kPairs : 2 * (i % kPairs));
    const Place place = fragment_code(Bits, fragment.lane, first);
    const int64_t output = fragment.first_output + place.output, input = fragment.first_input + place.input;
    if (output >= w.outputs || input >= w.inputs) continue;  // an even number of inputs: both of a pair exist
    const int64_t column = input / w.group * columns + output;
    const float scale = w.scales[column], zero = w.zeros[column];
    const uint32_t word = words[i / kPairs] >> (Bits * (first % kCodes));
    const float low = (float(word & kMask) - zero) * scale, high = (float(word >> (Bits * kSecond) & kMask) - zero) * scale;
    *reinterpret_cast<uint32_t*>(static_cast<bf16*>(p.out) + output * w.inputs + input) = cu::pack_bf16(low, high);
  }
}

int64_t fragments(const QuantizedWeight& w) {
  return int64_t((w.outputs + kTile - 1) / kTile) * ((w.inputs + kStep - 1) / kStep) * (w.bits / 4) * 32;
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
  if (p.weight.bits == 4) {
    if (p.rows <= 16) {
      launch<Shape<4, 16, 2, 4, 1, 6>>(p, stream);
    } else {
      launch<Shape<4, 64, 2, 2, 2, 3>>(p, stream);
    }
  } else {
    if (p.rows <= 16) {
      launch<Shape<8, 16, 2, 4, 1, 5>>(p, stream);
    } else {
      launch<Shape<8, 64, 2, 2, 2, 3>>(p, stream);
    }
  }
}

extern "C" void quantized_pack_launch(const QuantizedPackParams& p, cudaStream_t stream) {
  const int64_t groups = (p.weight.inputs + p.weight.group - 1) / p.weight.group, tiles = (p.weight.outputs + kTile - 1) / kTile;
  const int64_t affine = groups * tiles * kTile, items = fragments(p.weight) > affine ? fragments(p.weight) : affine;
  if (items == 0) return;
  const dim3 grid((items + kPackThreads - 1) / kPackThreads);
  if (p.weight.bits == 4) {
    cu::launch<quantized_pack_kernel<4>>(grid, kPackThreads, 0, stream, p);
  } else {
    cu::launch<quantized_pack_kernel<8>>(grid, kPackThreads, 0, stream, p);
  }
}

extern "C" void dequantize_launch(const DequantizeParams& p, cudaStream_t stream) {
  if (fragments(p.weight) == 0) return;
  const dim3 grid((fragments(p.weight) + kPackThreads - 1) / kPackThreads);
  if (p.weight.bits == 4) {
    cu::launch<dequantize_kernel<4>>(grid, kPackThreads, 0, stream, p);
  } else {
    cu::launch<dequantize_kernel<8>>(grid, kPackThreads, 0, stream, p);
  }
}

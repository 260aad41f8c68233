// Expands quantized weights to bf16 or fp32: for gradients, and for products with many rows, where a dense one is
// faster.
#include "params.h"
#include "quantized.cuh"

namespace {

using cu::bf16;
using quantized::kGroup, quantized::kTile, quantized::store_pair;
constexpr int kExpandThreads = 256;

// One thread expands one word: 8 or 4 neighbouring inputs of one output.
template <int Bits>
__global__ void __launch_bounds__(kExpandThreads) dequantize_kernel(const __grid_constant__ DequantizeParams p) {
  constexpr int kCodes = 32 / Bits, kBlocks = kGroup / kCodes;  // codes of a word, words of an output and group
  const QuantizedWeight& w = p.weight;
  const int tiles = (w.outputs + kTile - 1) / kTile, groups = (w.inputs + kGroup - 1) / kGroup;
  // [tile][group][output][block]: neighbours write in line
  const int64_t item = int64_t(blockIdx.x) * kExpandThreads + threadIdx.x;
  if (item >= int64_t(tiles) * groups * kTile * kBlocks) return;
  const int block = item % kBlocks, output = item / kBlocks % kTile;
  const int64_t place = item / kBlocks / kTile;  // of tile and group
  const int64_t row = place / groups * kTile + output, first = place % groups * kGroup + block * kCodes;
  if (row >= w.outputs) return;
  const uint32_t word = static_cast<const uint32_t*>(w.packed)[(place * kBlocks + block) * kTile + output];
  const float scale = cu::to_float(static_cast<const bf16*>(w.scales)[place * kTile + output]);
  const float zero = w.zeros ? float(w.zeros[place * kTile + output]) : float(1 << (Bits - 1));
#pragma unroll
  for (int i = 0; i < kCodes; i += 2) {
    const int shift = Bits == 8 ? 8 * i : i % 4 * 8 + i / 4 * 4;
    const float low = float(word >> shift & ((1 << Bits) - 1)), high = float(word >> (shift + 8) & ((1 << Bits) - 1));
    if (first + i < w.inputs)
      store_pair(p.out, p.wide, row * w.inputs + first + i, first + i + 1 < w.inputs, (low - zero) * scale,
                 (high - zero) * scale);
  }
}

template <int Bits>
void expand(const DequantizeParams& p, cudaStream_t stream) {
  const int64_t tiles = (p.weight.outputs + kTile - 1) / kTile, groups = (p.weight.inputs + kGroup - 1) / kGroup;
  const int64_t items = tiles * groups * kTile * (kGroup * Bits / 32);
  if (items > 0)
    cu::launch<dequantize_kernel<Bits>>(dim3((items + kExpandThreads - 1) / kExpandThreads), kExpandThreads, 0, stream,
                                        p);
}

}  // namespace

extern "C" void dequantize_launch(const DequantizeParams& p, cudaStream_t stream) {
  p.weight.bits == 4 ? expand<4>(p, stream) : expand<8>(p, stream);
}

// Weight-only quantisation: groups of 128 inputs share a scale, and a zero point unless symmetric.
//
//   weight = (code - zero) * scale      code 0..15 (4 bits) or 0..255 (8 bits); symmetric: zero = 8 or 128
//
// One layout on every device. N outputs in tiles of 16 channels, K inputs in groups of 128, both padded (codes of padding are
// zero points). For each tile and group, blocks of 64 bytes follow each other along K; in a block, channel c owns the 32-bit
// word c:
//   4 bits: a block is 8 inputs;  byte j of the word = code(8b + j) | code(8b + 4 + j) << 4
//   8 bits: a block is 4 inputs;  byte j of the word = code(4b + j)
// Scales (bfloat16) and zeros (uint8) lie as [tile][group][16].
//
// Scales are rounded away from zero to bfloat16 before codes are chosen, so no code leaves its range and the rounding costs
// at most 0.8 % of a step.
#pragma once

#include <cstdint>

#include "arguments.h"

namespace internlm2 {

constexpr int64_t QUANTIZED_GROUP = 128, QUANTIZED_TILE = 16;
constexpr int64_t quantized_bytes(int64_t bits) { return QUANTIZED_GROUP * QUANTIZED_TILE * bits / 8; }  // tile and group

struct QuantizedWeight {
  uint8_t* packed;
  uint16_t* scales;
  uint8_t* zeros;  // null if symmetric
  int64_t bits, out_features, in_features;

  int64_t tiles() const { return (out_features + QUANTIZED_TILE - 1) / QUANTIZED_TILE; }
  int64_t groups() const { return (in_features + QUANTIZED_GROUP - 1) / QUANTIZED_GROUP; }
};

struct Quantize {
  QuantizedWeight weight;
  Dtype dtype;
  const void* source;  // [N, K] with K contiguous; of dequantize, the target
  void* target;
  int64_t row_stride;
  Parallel parallel;
};

struct QuantizedLinear {
  QuantizedWeight weight;
  Dtype dtype;
  const void* x;  // [M, K], K contiguous
  int64_t rows, row_stride;
  int64_t act_bits;
  void* y;  // [M, N]
  int threads;
  Parallel parallel;
};

// A linear layer of the decoder: packed (arguments.h), or quantised where `packed` is null.
struct DecoderWeight {
  PackedWeight packed;
  QuantizedWeight quantized;
};

// One layer: x + wo(attention(norm(x))), then x + down(silu(gate) * up) of the second norm. Norms are [C] in the dtype.
struct DecoderLayer {
  const void *attention_norm, *ffn_norm;
  DecoderWeight wqkv, wo, gate_up, down;  // gate_up: the gate's outputs, then those of up
  void* cache;                            // [slots, G, 2, L, D] rotated keys, then values
};

// The next token of each of the first B slots through all layers. C hidden size, F intermediate size.
struct DecodeStep {
  Dtype dtype;
  int64_t rows, hidden, groups, queries, dim, intermediate, capacity, layers;
  const DecoderLayer* layer;  // [layers]
  const void* norm;           // [C], after the last layer
  const void* x;              // [B, C] embeddings
  const float* cos;           // [P, D / 2], and sin: angle tables
  const float* sin;
  const int32_t* table_offsets;  // [B] first row of each slot's table, or null
  int32_t* lengths;              // [B] tokens in the cache; each grows by one
  float eps;
  int64_t act_bits;  // of the activations that meet quantised weights
  void* out;         // [B, C]
  int threads;
  Parallel parallel;
};

}  // namespace internlm2

// What a launcher is told: plain structs, free of CUDA and of torch, so that bindings and kernels agree without either's headers.
//
// Legend: T tokens of all sequences, n sequences, K kv heads (groups), R query heads of one group, H = K * R query heads,
// D head dim, P rows of the rotation table. Strides count elements. Every bf16 row starts on a 16-byte boundary.
#pragma once

#include <cstdint>

// cos and sin of the rotation, fp32 [P, D / 2]; the first token of sequence i has row table_offsets[i] (null: 0).
struct RotationTable {
  const float* cosine;
  const float* sine;
  const int32_t* offsets;
  int32_t rows;
};

// InternLM2's grouped projection [T, K, R + 2, D]: in each group R queries, then the key, then the value.
struct GroupedQkv {
  const void* data;
  int64_t token_stride, group_stride, slot_stride;
};

struct RotateParams {
  GroupedQkv source;
  int32_t first_slot, slots;  // which slots of a group to rotate: keys (R, 1) or queries (0, R)
  void* target;               // bf16 [K * slots, T, D]
  RotationTable table;
  const int32_t* cu_seqlens;  // [n + 1]
  int32_t sequences, tokens, kv_heads, head_dim;
};

struct AttentionForwardParams {
  GroupedQkv qkv;
  const void* keys;  // bf16 [K, T, D], rotated
  void* out;         // bf16 [T, H, D]
  float* lse;        // fp32 [H, T], natural logarithm
  RotationTable table;
  const int32_t* cu_seqlens;
  int32_t sequences, tokens, max_seqlen, kv_heads, queries_per_group, head_dim;
  float scale;
};

struct AttentionBackwardParams {
  GroupedQkv qkv;        // only the values are read
  const void* queries;   // bf16 [H, T, D], rotated
  const void* keys;      // bf16 [K, T, D], rotated
  const void* out;       // bf16 [T, H, D]
  const void* grad_out;  // bf16 [T, H, D]
  const float* lse;      // fp32 [H, T]
  float* delta;          // fp32 [H, T], scratch: sum over D of out * grad_out
  void* grad_qkv;        // bf16 [T, K, R + 2, D], contiguous
  RotationTable table;
  const int32_t* cu_seqlens;
  int32_t sequences, tokens, max_seqlen, kv_heads, queries_per_group, head_dim;
  float scale;
};

// One new token a row over its cache. Strides of rows, groups and positions, in elements.
struct KvCache {
  const void* data;
  int64_t row_stride, group_stride, position_stride;
};

struct DecodeAttentionParams {
  const void* q;  // bf16 [B, H, D], rotated, contiguous
  KvCache keys, values;
  const int32_t* lengths;  // [B]
  void* out;               // bf16 [B, H, D]
  float* partial_out;      // fp32 [splits, B, H, D], scratch; unused with one split
  float* partial_lse;      // fp32 [splits, B, H], base 2, scratch
  int32_t batch, kv_heads, queries_per_group, head_dim, capacity, splits;
  float scale;
};

// Weights of a linear layer y = x W^T in the order in which the mma fragments take them, W = (code - zero) * scale.
//
// words   4 bit: [ceil(N / 16), ceil(K / 64), 32 lanes] of 16 bytes, 64 inputs of 16 outputs; 8 bit: the same with K / 32.
//         The layout of the 16 bytes is stated at fragment_code() in quantized_linear.cu.
// scales  fp32 [ceil(K / group), 16 * ceil(N / 16)]
// zeros   fp32, same shape: whole numbers, 0 .. 2^bits - 1
struct QuantizedWeight {
  void* words;
  float* scales;
  float* zeros;
  int32_t outputs, inputs, bits, group;  // group: inputs that share a scale, a multiple of 64
};

struct QuantizedPackParams {
  const uint8_t* codes;  // 4 bit: [N, ceil(K / 2)], the lower input in the low half of a byte; 8 bit: [N, K]
  const float* scales;   // [N, ceil(K / group)]
  const uint8_t* zeros;  // [N, ceil(K / group)], or null: 2^(bits - 1)
  QuantizedWeight weight;
};

struct QuantizedLinearParams {
  const void* x;  // bf16 [M, K], contiguous, K a multiple of 8
  QuantizedWeight weight;
  void* y;  // bf16 [M, N]
  int32_t rows;
};

struct DequantizeParams {
  QuantizedWeight weight;
  void* out;  // bf16 [N, K]
};

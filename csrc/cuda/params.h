// What a launcher is told: plain structs, free of CUDA and of torch, so that bindings and kernels agree without
// either's headers.
//
// Legend: T tokens of all sequences, n sequences, K kv heads (groups), R query heads of one group, H = K * R query
// heads, D head dim, P rows of the rotation table. Strides count elements. Every bf16 row starts on a 16-byte boundary.
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

// A linear layer's weight W [N, K] = (code - zero) * scale in the layout that all devices share: tiles of 16 outputs,
// groups of 128 inputs, both padded. Per tile and group, blocks of 64 bytes along K; in a block output c owns the
// 32-bit word c.
//   4 bit: a block is 8 inputs, byte j = code(j) | code(4 + j) << 4;  8 bit: a block is 4 inputs, byte j = code(j)
struct QuantizedWeight {
  const void* packed;    // [tiles, groups, 256 * bits] bytes
  const void* scales;    // bf16 [tiles, groups, 16]
  const uint8_t* zeros;  // [tiles, groups, 16], or null: 2^(bits - 1)
  int32_t outputs, inputs, bits;
};

struct QuantizedLinearParams {
  const void* x;  // bf16 [M, K], contiguous, K a multiple of 8
  QuantizedWeight weight;
  void* y;  // [M, N], fp32 if wide, else bf16
  int32_t rows;
  bool wide;
};

struct DequantizeParams {
  QuantizedWeight weight;
  void* out;  // [N, K], fp32 if wide, else bf16
  bool wide;
};

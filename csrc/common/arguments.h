// What the operators hand to the kernels: plain structs, no torch, the same for every instruction set.
// T tokens, G kv heads ("groups"), R queries per kv head, H = G * R heads, D head dim. Strides count elements.
#pragma once

#include <cstdint>

namespace internlm2 {

enum class Dtype { bfloat16, float32 };

// Runs body(context, i) for every i in [0, items) on torch's threads, handing out items one by one. Each item writes its
// own part of the result, so the values do not depend on which thread takes which item.
using Parallel = void (*)(int64_t items, void* context, void (*body)(void* context, int64_t item));

struct RopeAttention {
  Dtype dtype;
  const void* qkv;  // [T, G, R + 2, D], D contiguous
  int64_t token_stride, group_stride, slot_stride;
  const float* cos;  // [P, D / 2], and sin: angle tables
  const float* sin;
  const int32_t* cu_seqlens;     // [sequences + 1]
  const int32_t* table_offsets;  // [sequences] or null
  // Null, or keys (rotated) and values of each sequence in a slot of a cache [S, G, 2, capacity, D], of which the first
  // past[s] belong to tokens that have no query here. Forward only; the keys and values of qkv are then not read.
  const void* cache;
  const int64_t* slots;  // [sequences]
  const int32_t* past;   // [sequences]
  int64_t capacity;
  int64_t sequences, tokens, groups, queries, dim;
  float scale;
  void* out;   // [T, H, D]; read by the backward pass
  float* lse;  // [H, T] log of the sum of exponentials, natural base; null where nobody asks
  const void* grad_out;  // [T, H, D]
  void* grad_qkv;        // [T, G, R + 2, D]
  int threads;
  Parallel parallel;
};

struct DecodeAttention {
  Dtype dtype;
  const void* q;        // [B, H, D]
  const void* k_cache;  // [B, G, L, D], D contiguous
  const void* v_cache;
  int64_t k_stride[3], v_stride[3];  // of B, G, L
  const int32_t* lengths;            // [B]
  int64_t batch, groups, queries, dim, capacity;
  float scale;
  void* out;  // [B, H, D]
  int threads;
  Parallel parallel;
};

// y = x W' with W packed for products with few rows or many: panels of 64 outputs, padded with zeros; in a panel, for each
// lane of 32 bits along the inputs (a float, or two neighbouring bfloat16), the 64 outputs' lanes side by side.
constexpr int64_t PACKED_COLUMNS = 64;
struct PackedWeight {
  void* packed;  // [ceil(outputs / 64)][lanes of a row][64] lanes
  int64_t outputs, inputs;

  int64_t panels() const { return (outputs + PACKED_COLUMNS - 1) / PACKED_COLUMNS; }
};

struct PackWeight {
  Dtype dtype;
  PackedWeight weight;
  const void* source;  // [outputs, inputs], inputs contiguous
  int64_t row_stride;
  Parallel parallel;
};

struct PackedLinear {
  Dtype dtype;
  PackedWeight weight;
  const void* x;  // [rows, inputs], contiguous
  int64_t rows;
  void* y;  // [rows, outputs]
  int threads;
  Parallel parallel;
};

struct DrawTokens {
  Dtype dtype;
  const void* logits;  // [rows, size], contiguous
  int64_t rows, size;
  const float* temperatures;  // [rows]; 0 takes the most likely token
  const double* uniforms;     // [rows] in [0, 1)
  int64_t* tokens;
  float *logprobs, *sampling_logprobs;  // [rows] natural
  Parallel parallel;
};

struct FewRowsLinear {
  const void* x;       // [rows, inputs] bfloat16, contiguous
  const void* weight;  // [outputs, inputs] bfloat16, inputs contiguous
  int64_t weight_stride, rows, inputs, outputs;
  void* y;  // [rows, outputs]
  Parallel parallel;
};

}  // namespace internlm2

// One table of kernels for each instruction set, and the choice among them at run time.
#pragma once

#include "../common/arguments.h"
#include "../common/quantized.h"

namespace internlm2 {

struct Kernels {
  const char* name;
  void (*rope_attention_forward)(const RopeAttention&);
  void (*rope_attention_backward)(const RopeAttention&);
  void (*decode_attention)(const DecodeAttention&);
  void (*quantize)(const Quantize&);
  void (*dequantize)(const Quantize&);
  void (*quantized_linear)(const QuantizedLinear&);
  void (*few_rows_linear)(const FewRowsLinear&);
  void (*pack_weight)(const PackWeight&);
  void (*packed_linear)(const PackedLinear&);
  void (*decode_step)(const DecodeStep&);
  void (*draw_tokens)(const DrawTokens&);
};

// The widest table that this processor runs; INTERNLM2_CPU_ISA names another one (tests run them all).
const Kernels& kernels();

}  // namespace internlm2

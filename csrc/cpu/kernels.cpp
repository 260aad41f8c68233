// Compiled once for each instruction set, with INTERNLM2_ISA set to its name and the compiler flags that go with it.
#include "kernels.h"

#include "decode_attention.h"
#include "decode_step.h"
#include "draw_tokens.h"
#include "few_rows_linear.h"
#include "packed_linear.h"
#include "quantized_linear.h"
#include "rope_attention_backward.h"
#include "rope_attention_forward.h"

namespace internlm2::INTERNLM2_ISA {
namespace {

#define INTERNLM2_TEXT(x) #x
#define INTERNLM2_NAME(x) INTERNLM2_TEXT(x)

#if defined(__AVX512BF16__)
using NarrowEngine = BFloat16Engine;
#else
using NarrowEngine = Float32Engine;  // bfloat16 widens while it is packed
#endif

void rope_attention_forward(const RopeAttention& a) {
  if (a.dtype == Dtype::bfloat16)
    RopeAttentionForward<NarrowEngine, bfloat16>(a).run();
  else
    RopeAttentionForward<Float32Engine, float>(a).run();
}

void rope_attention_backward(const RopeAttention& a) {
  if (a.dtype == Dtype::bfloat16)
    RopeAttentionBackward<NarrowEngine, bfloat16>(a).run();
  else
    RopeAttentionBackward<Float32Engine, float>(a).run();
}

void decode_attention(const DecodeAttention& a) {
  if (a.dtype == Dtype::bfloat16)
    DecodeAttentionKernel<bfloat16>(a).run();
  else
    DecodeAttentionKernel<float>(a).run();
}

void quantize_weight(const Quantize& a) { a.dtype == Dtype::bfloat16 ? quantize<bfloat16>(a) : quantize<float>(a); }

void dequantize_weight(const Quantize& a) { a.dtype == Dtype::bfloat16 ? dequantize<bfloat16>(a) : dequantize<float>(a); }

void linear(const QuantizedLinear& a) {
  a.dtype == Dtype::bfloat16 ? quantized_linear<bfloat16>(a) : quantized_linear<float>(a);
}

void few_rows_linear(const FewRowsLinear& a) { FewRowsLinearKernel<bfloat16>(a).run(); }

void pack(const PackWeight& a) {
  a.dtype == Dtype::bfloat16 ? pack_weight<BFloat16Engine>(a) : pack_weight<Float32Engine>(a);
}

void packed_linear(const PackedLinear& a) {
  a.dtype == Dtype::bfloat16 ? PackedLinearKernel<BFloat16Engine>(a).run() : PackedLinearKernel<Float32Engine>(a).run();
}

void decode_step(const DecodeStep& a) {
  a.dtype == Dtype::bfloat16 ? DecodeStepKernel<BFloat16Engine>(a).run() : DecodeStepKernel<Float32Engine>(a).run();
}

void draw_tokens(const DrawTokens& a) {
  a.dtype == Dtype::bfloat16 ? DrawTokensKernel<bfloat16>(a).run() : DrawTokensKernel<float>(a).run();
}

}  // namespace

extern const Kernels table;
const Kernels table = {
    INTERNLM2_NAME(INTERNLM2_ISA), rope_attention_forward, rope_attention_backward, decode_attention,
    quantize_weight,               dequantize_weight,      linear,                  few_rows_linear,
    pack,                          packed_linear,          decode_step,             draw_tokens};

}  // namespace internlm2::INTERNLM2_ISA

// Compiled once for each instruction set, with INTERNLM2_ISA set to its name and the compiler flags that go with it.
#include "kernels.h"

#include "decode_attention.h"
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

}  // namespace

extern const Kernels table;
const Kernels table = {INTERNLM2_NAME(INTERNLM2_ISA), rope_attention_forward, rope_attention_backward, decode_attention};

}  // namespace internlm2::INTERNLM2_ISA

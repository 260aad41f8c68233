// y = x W' with W in 4 or 8 bits. Codes are multiplied as they lie in memory:
//   act_bits 8:  codes (unsigned) times int8 activations, with a scale for each token and group of 128. AVX-512 VNNI does 64
//                products in one instruction, AVX2 32 in two to four; elsewhere both become float32
//   act_bits 16: codes become bfloat16 integers, exactly, where there are instructions for such products, else float32
// and scales are applied in float32. Activations are rounded in the same two ways everywhere, so that results agree but for
// the order of sums.
#pragma once

#include "quantized_linear_bytes.h"
#include "quantized_linear_float32.h"
#include "quantized_linear_vnni.h"

namespace internlm2::INTERNLM2_ISA {

template <class T>
static void quantized_linear(const QuantizedLinear& a) {
#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)
  if (a.weight.bits == 4)
    a.act_bits == 8 ? linear_packed<T, 4, 8>(a) : linear_packed<T, 4, 16>(a);
  else
    a.act_bits == 8 ? linear_packed<T, 8, 8>(a) : linear_packed<T, 8, 16>(a);
#else
#if defined(__AVX2__)
  if (a.act_bits == 8) return linear_bytes<T>(a);
#endif
  linear_float32<T>(a);
#endif
}

}  // namespace internlm2::INTERNLM2_ISA

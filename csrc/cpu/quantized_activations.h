// Activations as products with quantised weights need them: rounded once a call, to int8 or bfloat16.
#pragma once

#include "quantize.h"

namespace internlm2::INTERNLM2_ISA {

// Activations as the products need them: int8 with scale and sum per group, or bfloat16 with sum per group.
struct Activations {
  int64_t rows, groups;
  // [groups, M, 128]: the rows of a group lie close together, else a stride of K would crowd a few cache sets.
  Buffer<int8_t> codes;
  Buffer<bfloat16> values;    // reordered within blocks
  Buffer<float> rounded;      // in order, for products in float32
  Buffer<float> scales;       // [M, groups]
  Buffer<int32_t> code_sums;  // [M, groups]
  Buffer<float> sums;         // [M, groups]
};

template <class T>
static inline void read_group(const QuantizedLinear& a, int64_t row, int64_t group, float* x) {
  const int64_t first = group * GROUP, count = least(GROUP, a.weight.in_features - first);
  const T* source = static_cast<const T*>(a.x) + row * a.row_stride + first;
  if (count < GROUP) std::memset(x, 0, GROUP * sizeof(float));
  if (count == GROUP)
    for (int64_t i = 0; i < GROUP; i += WIDTH) store(x + i, widen(source + i));
  else
    for (int64_t i = 0; i < count; i++) x[i] = widen_one(source[i]);
}

// x -> rint(x * 127 / largest); returns the scale. A NaN makes the scale, and with it the outputs, NaN.
static inline float quantize_group(const float* x, int8_t* codes, int32_t* code_sum) {
  Floats largest = Floats{}, poison = Floats{};
  for (int64_t i = 0; i < GROUP; i += WIDTH) {
    const Floats v = widen(x + i);
    largest = larger(largest, v > -v ? v : -v);
    poison += v * 0.f;
  }
  const float top = maximum(largest), inverse = top > 0.f ? 127.f / top : 0.f;
#if defined(__AVX512F__)
  __m512i total = _mm512_setzero_si512();
#else
  Ints total = Ints{};
#endif
  for (int64_t i = 0; i < GROUP; i += WIDTH) {
    // Clamped before it is rounded: else the compiler may fuse the product into the rounding's addition, and ties differ.
    const Floats code = round_even(clamp(widen(x + i) * inverse, -127.f, 127.f));
#if defined(__AVX512F__)
    const __m512i whole = _mm512_cvtps_epi32((__m512)code);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), _mm512_cvtepi32_epi8(whole));
    total = _mm512_add_epi32(total, whole);
#else
    const Ints whole = __builtin_convertvector(code, Ints);
    store(codes + i, __builtin_convertvector(whole, Bytes));
    total += whole;
#endif
  }
#if defined(__AVX512F__)
  *code_sum = _mm512_reduce_add_epi32(total);
#else
  *code_sum = 0;
  for (int l = 0; l < WIDTH; l++) *code_sum += total[l];
#endif
  return top / 127.f + sum(poison);
}

// codes: int8 for products of bytes; values: bfloat16 in the order of shifted words; rounded: float32, as either would be.
enum class Form { codes, values, rounded };

template <class T>
static void prepare(const QuantizedLinear& a, Form form, Activations& out) {
  const int64_t groups = out.groups = a.weight.groups(), size = a.rows * groups * GROUP;
  const bool eight = a.act_bits == 8;
  out.rows = a.rows;
  if (eight) out.codes.allocate(size), out.scales.allocate(a.rows * groups), out.code_sums.allocate(a.rows * groups);
  if (form == Form::rounded) out.rounded.allocate(size);
  if (form == Form::values) out.values.allocate(size), out.sums.allocate(a.rows * groups);
  // In each block, the order in which shifted words give up their inputs.
  static constexpr int ORDER4[8] = {0, 2, 4, 6, 1, 3, 5, 7}, ORDER8[8] = {0, 2, 1, 3, 4, 6, 5, 7};
  const int* order = a.weight.bits == 4 ? ORDER4 : ORDER8;
  const int64_t grain = most(1, 512 / groups);  // a few rows are read sooner than other threads wake
  for_each(a.parallel, (a.rows + grain - 1) / grain, [&](int64_t item) {
    alignas(64) float x[GROUP];
    alignas(64) bfloat16 narrow_x[GROUP];
    for (int64_t m = item * grain; m < least(a.rows, (item + 1) * grain); m++)
      for (int64_t g = 0; g < groups; g++) {
        const int64_t at = (g * a.rows + m) * GROUP;
        read_group<T>(a, m, g, x);
        if (eight) {
          const float scale = out.scales[m * groups + g] = quantize_group(x, &out.codes[at], &out.code_sums[m * groups + g]);
          if (form == Form::rounded)
            for (int64_t i = 0; i < GROUP; i++) out.rounded[at + i] = out.codes[at + i] * scale;
          continue;
        }
        convert(x, GROUP, narrow_x);
        if (form == Form::rounded) {
          convert(narrow_x, GROUP, &out.rounded[at]);
          continue;
        }
        Floats total = Floats{};
        for (int64_t i = 0; i < GROUP; i += WIDTH) total += widen(narrow_x + i);
        out.sums[m * groups + g] = sum(total);
        for (int64_t i = 0; i < GROUP; i += 8)
          for (int64_t j = 0; j < 8; j++) out.values[at + i + j] = narrow_x[i + order[j]];
      }
  });
}

}  // namespace internlm2::INTERNLM2_ISA

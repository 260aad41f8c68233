// y = x W' in bfloat16 for a few rows of x, as in decoding: bound by reading W, which lies as the model holds it. torch's own
// product first rearranges the weight at each call.
#pragma once

#include "../common/arguments.h"
#include "gemm.h"

namespace internlm2::INTERNLM2_ISA {

template <class T>
class FewRowsLinearKernel {
  static constexpr int64_t OUTPUTS = 64;  // of one item: their weights stay in L2 while the rows of x pass

 public:
  explicit FewRowsLinearKernel(const FewRowsLinear& arguments) : a(arguments) {}

  void run() {
    const int64_t items = (a.outputs + OUTPUTS - 1) / OUTPUTS;
    for_each(a.parallel, items, [&](int64_t item) {
      const int64_t begin = item * OUTPUTS, end = least(a.outputs, begin + OUTPUTS);
      for (int64_t m = 0; m < a.rows; m += 8) {
        switch (least(8, a.rows - m)) {
          case 1: strip<1, 4>(m, begin, end); break;
          case 2: strip<2, 4>(m, begin, end); break;
          case 3: strip<3, 4>(m, begin, end); break;
          case 4: strip<4, 4>(m, begin, end); break;
          case 5: strip<5, 2>(m, begin, end); break;
          case 6: strip<6, 2>(m, begin, end); break;
          case 7: strip<7, 2>(m, begin, end); break;
          default: strip<8, 2>(m, begin, end);
        }
      }
    });
  }

 private:
  const FewRowsLinear& a;

  template <int ROWS, int STEP>
  void strip(int64_t m, int64_t begin, int64_t end) const {
    int64_t n = begin;
    for (; n + STEP <= end; n += STEP) dots<ROWS, STEP>(m, n);
    for (; n < end; n++) dots<ROWS, 1>(m, n);
  }

  template <int ROWS, int STEP>
  void dots(int64_t m, int64_t n) const {
    const T* x = static_cast<const T*>(a.x) + m * a.inputs;
    const T* w = static_cast<const T*>(a.weight) + n * a.weight_stride;
    Floats sums[ROWS][STEP];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < STEP; j++) sums[i][j] = Floats{};
    int64_t k = 0;
#if defined(__AVX512BF16__)
    if constexpr (sizeof(T) == 2) {
      for (; k + 32 <= a.inputs; k += 32) {
        __m512bh weights[STEP];
        for (int j = 0; j < STEP; j++) {
          const T* p = w + j * a.weight_stride + k;
          __builtin_prefetch(p + 512);
          weights[j] = (__m512bh)_mm512_loadu_si512(p);
        }
        for (int i = 0; i < ROWS; i++) {
          const __m512bh value = (__m512bh)_mm512_loadu_si512(x + i * a.inputs + k);
          for (int j = 0; j < STEP; j++) sums[i][j] = (Floats)_mm512_dpbf16_ps((__m512)sums[i][j], weights[j], value);
        }
      }
    }
#endif
    for (; k + WIDTH <= a.inputs; k += WIDTH)
      for (int j = 0; j < STEP; j++) {
        const Floats weight = widen(w + j * a.weight_stride + k);
        for (int i = 0; i < ROWS; i++) sums[i][j] += weight * widen(x + i * a.inputs + k);
      }
    float totals[ROWS][STEP];
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < STEP; j++) totals[i][j] = sum(sums[i][j]);
    for (; k < a.inputs; k++)
      for (int i = 0; i < ROWS; i++)
        for (int j = 0; j < STEP; j++)
          totals[i][j] += widen_one(x[i * a.inputs + k]) * widen_one(w[j * a.weight_stride + k]);
    for (int i = 0; i < ROWS; i++)
      for (int j = 0; j < STEP; j++) {
        T rounded[WIDTH];
        narrow(splat(totals[i][j]), rounded);
        static_cast<T*>(a.y)[(m + i) * a.outputs + n + j] = rounded[0];
      }
  }
};

}  // namespace internlm2::INTERNLM2_ISA

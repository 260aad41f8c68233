// Half-rotation RoPE of one row, in float32: the pair (i, i + D/2) turns by the angle of column i.
#pragma once

#include "simd.h"

namespace internlm2::INTERNLM2_ISA {

template <class T, class Element>
static inline void rotate_row(const T* x, const float* cos, const float* sin, int64_t dim, float scale, Element* y) {
  float turned[256];
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    float a = widen_one(x[i]), b = widen_one(x[i + half]);
    turned[i] = scale * (a * cos[i] - b * sin[i]);
    turned[i + half] = scale * (b * cos[i] + a * sin[i]);
  }
  convert(turned, dim, y);
}

// Gradient: the turn the other way.
template <class T>
static inline void rotate_row_back(const float* x, const float* cos, const float* sin, int64_t dim, float scale, T* y) {
  float turned[256];
  const int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i++) {
    turned[i] = scale * (x[i] * cos[i] + x[i + half] * sin[i]);
    turned[i + half] = scale * (x[i + half] * cos[i] - x[i] * sin[i]);
  }
  convert(turned, dim, y);
}

}  // namespace internlm2::INTERNLM2_ISA

// Weights to codes and back; the layout is described in ../common/quantized.h.
#pragma once

#include "../common/quantized.h"
#include "simd.h"

#include <cmath>

namespace internlm2::INTERNLM2_ISA {

constexpr int64_t GROUP = QUANTIZED_GROUP, TILE = QUANTIZED_TILE;

static inline float scale_of(bfloat16 x) { return widen_one(x); }

// bfloat16 not smaller in magnitude.
static inline bfloat16 round_away(float x) {
  uint32_t w;
  std::memcpy(&w, &x, 4);
  return (bfloat16)((w + 0xffffu) >> 16);
}

static inline Floats round_even(Floats x) {  // |x| < 2 ** 22
  const Floats shifted = x + 12582912.f;
  return shifted - 12582912.f;
}
static inline Floats clamp(Floats x, float low, float high) {
  x = x < low ? splat(low) : x;
  return x > high ? splat(high) : x;
}

// 128 codes of one channel (a byte each) into its words of a tile's group, and out again.
static inline void put_codes(const uint8_t* codes, int64_t bits, int64_t channel, uint8_t* packed) {
  const int64_t inputs = bits == 4 ? 8 : 4;
  for (int64_t b = 0; b < GROUP / inputs; b++) {
    uint32_t low, high;
    std::memcpy(&low, codes + b * inputs, 4);
    if (bits == 4) {
      std::memcpy(&high, codes + b * 8 + 4, 4);
      low |= high << 4;
    }
    std::memcpy(packed + b * 64 + channel * 4, &low, 4);
  }
}
static inline void get_codes(const uint8_t* packed, int64_t bits, int64_t channel, uint8_t* codes) {
  const int64_t inputs = bits == 4 ? 8 : 4;
  for (int64_t b = 0; b < GROUP / inputs; b++) {
    uint32_t word;
    std::memcpy(&word, packed + b * 64 + channel * 4, 4);
    if (bits == 8) {
      std::memcpy(codes + b * 4, &word, 4);
      continue;
    }
    const uint32_t low = word & 0x0f0f0f0fu, high = (word >> 4) & 0x0f0f0f0fu;
    std::memcpy(codes + b * 8, &low, 4);
    std::memcpy(codes + b * 8 + 4, &high, 4);
  }
}

struct Range {
  bfloat16 scale;
  uint8_t zero;
};

// Of one group's weights (zeros beyond its end do not widen it).
static inline Range choose_range(const float* w, int64_t bits, bool symmetric) {
  Floats low = Floats{}, high = Floats{}, poison = Floats{};
  for (int64_t i = 0; i < GROUP; i += WIDTH) {
    const Floats x = widen(w + i);
    high = larger(high, x);
    low = x < low ? x : low;
    poison += x * 0.f;  // NaN once anything is not finite: then the scale is NaN, and so is what comes back
  }
  const float top = maximum(high), bottom = -maximum(-low), spoiled = sum(poison);
  if (symmetric && bits == 4) {
    // The side that reaches further takes the code that has no mirror image, -8.
    return {round_away((top >= -bottom ? top : bottom) / -8.f + spoiled), 8};
  }
  if (symmetric) return {round_away((top >= -bottom ? top : -bottom) / 127.f + spoiled), 128};
  const float steps = bits == 4 ? 15.f : 255.f;
  const bfloat16 scale = round_away((top - bottom) / steps + spoiled);
  const float s = scale_of(scale), zero = s != 0.f ? nearbyintf(-bottom / s) : 0.f;
  return {scale, (uint8_t)(zero > steps ? steps : zero > 0.f ? zero : 0.f)};
}

template <class T>
static void quantize(const Quantize& a) {
  const QuantizedWeight& w = a.weight;
  const bool symmetric = w.zeros == nullptr;
  const float most_code = w.bits == 4 ? 15.f : 255.f;
  for_each(a.parallel, w.tiles() * w.groups(), [&](int64_t item) {
    const int64_t tile = item / w.groups(), first = item % w.groups() * GROUP, count = least(GROUP, w.in_features - first);
    alignas(64) float x[GROUP];
    alignas(64) uint8_t codes[GROUP];
    for (int64_t c = 0; c < TILE; c++) {
      const int64_t channel = tile * TILE + c;
      std::memset(x, 0, sizeof(x));
      if (channel < w.out_features) {
        const T* row = static_cast<const T*>(a.source) + channel * a.row_stride + first;
        if (count == GROUP)
          for (int64_t i = 0; i < GROUP; i += WIDTH) store(x + i, widen(row + i));
        else
          for (int64_t i = 0; i < count; i++) x[i] = widen_one(row[i]);
      }
      const Range range = choose_range(x, w.bits, symmetric);
      const float scale = scale_of(range.scale), zero = range.zero;
      for (int64_t i = 0; i < GROUP; i += WIDTH) {
        const Floats code = scale == 0.f ? splat(zero) : clamp(round_even(clamp(widen(x + i) / scale, -512, 512)) + zero, 0, most_code);
        store(codes + i, __builtin_convertvector(__builtin_convertvector(code, Ints), Bytes));
      }
      put_codes(codes, w.bits, c, w.packed + item * quantized_bytes(w.bits));
      w.scales[item * TILE + c] = range.scale;
      if (!symmetric) w.zeros[item * TILE + c] = range.zero;
    }
  });
}

template <class T>
static void dequantize(const Quantize& a) {
  const QuantizedWeight& w = a.weight;
  for_each(a.parallel, w.tiles() * w.groups(), [&](int64_t item) {
    const int64_t tile = item / w.groups(), first = item % w.groups() * GROUP, count = least(GROUP, w.in_features - first);
    uint8_t codes[GROUP];
    for (int64_t c = 0; c < least(TILE, w.out_features - tile * TILE); c++) {
      get_codes(w.packed + item * quantized_bytes(w.bits), w.bits, c, codes);
      const float zero = w.zeros ? w.zeros[item * TILE + c] : w.bits == 4 ? 8.f : 128.f;
      const float scale = scale_of(w.scales[item * TILE + c]);
      alignas(64) float x[GROUP];
      for (int64_t i = 0; i < GROUP; i += WIDTH) {
        const Floats code = __builtin_convertvector(__builtin_convertvector(load<Bytes>(codes + i), Ints), Floats);
        store(x + i, (code - zero) * scale);
      }
      T* target = static_cast<T*>(a.target) + (tile * TILE + c) * w.in_features + first;
      if (count == GROUP) {
        convert(x, GROUP, target);
        continue;
      }
      T y[GROUP];
      convert(x, GROUP, y);
      std::memcpy(target, y, count * sizeof(T));
    }
  });
}

}  // namespace internlm2::INTERNLM2_ISA

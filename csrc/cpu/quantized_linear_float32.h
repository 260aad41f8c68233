// y = x W' with W in 4 or 8 bits, multiplied in float32: for processors without instructions for narrower products.
#pragma once

#include "gemm.h"
#include "quantized_activations.h"

namespace internlm2::INTERNLM2_ISA {

// Codes of WIDTH channels as signed integers, code - 8 or code - 128, in float32.
template <int BITS>
struct Codes {
  static constexpr int INPUTS = BITS == 4 ? 8 : 4;  // of a 32-bit word
  Words words;
  explicit Codes(const uint8_t* p) : words(load<Words>(p) ^ (BITS == 4 ? 0x88888888u : 0x80808080u)) {}
  Floats operator[](int input) const {
    const int position = BITS == 4 ? input % 4 * 8 + input / 4 * 4 : input * 8;
    return __builtin_convertvector((Ints)(words << (32 - BITS - position)) >> (32 - BITS), Floats);
  }
};

// Scale and zero point of WIDTH channels of a tile's group; the zero point less what Codes takes off.
template <int BITS>
struct Step {
  Floats scale{}, zero{};
  Step() = default;
  Step(const QuantizedWeight& w, int64_t at) : scale(widen(w.scales + at)) {
    if (w.zeros != nullptr)
      zero = __builtin_convertvector(__builtin_convertvector(load<Bytes>(w.zeros + at), Ints), Floats) -
             (BITS == 4 ? 8.f : 128.f);
  }
};

// 128 inputs by 16 channels as float32 [128][16] at a stride of `columns`, by the arithmetic of `dequantize`.
template <int BITS>
static inline void unpack_group(const QuantizedWeight& w, int64_t tile, int64_t group, float* to, int64_t columns) {
  constexpr int INPUTS = Codes<BITS>::INPUTS;
  const int64_t at = tile * w.groups() + group;
  for (int64_t c = 0; c < TILE; c += WIDTH) {
    const Step<BITS> step(w, at * TILE + c);
    const uint8_t* p = w.packed + at * quantized_bytes(BITS) + c * 4;
    for (int64_t k = 0; k < GROUP; k += INPUTS, p += 64) {
      const Codes<BITS> codes(p);
#pragma GCC unroll 8
      for (int i = 0; i < INPUTS; i++) store(to + (k + i) * columns + c, (codes[i] - step.zero) * step.scale);
    }
  }
}

// Many rows: a group of some tiles is unpacked into L1, then multiplied.
template <class T, int BITS>
static void unpacked_product(const QuantizedLinear& a, const Activations& x) {
  const QuantizedWeight& w = a.weight;
  constexpr int64_t TILES = PANEL > TILE ? PANEL / TILE : 1, COLUMNS = TILES * TILE;
  for_each(a.parallel, (w.tiles() + TILES - 1) / TILES, [&](int64_t item) {
    const int64_t first = item * TILES, tiles = least(TILES, w.tiles() - first);
    alignas(64) float unpacked[GROUP * COLUMNS];
    Buffer<float> sums(a.rows * COLUMNS);
    sums.clear(a.rows * COLUMNS);
    for (int64_t g = 0; g < x.groups; g++) {
      for (int64_t t = 0; t < tiles; t++) unpack_group<BITS>(w, first + t, g, unpacked + t * TILE, COLUMNS);
      gemm<Float32Engine, true>(reinterpret_cast<const Lane*>(&x.rounded[g * a.rows * GROUP]), GROUP,
                                reinterpret_cast<const Lane*>(unpacked), COLUMNS, GROUP, sums.get(), COLUMNS, a.rows,
                                tiles * TILE);
    }
    for (int64_t m = 0; m < a.rows; m++) {
      T y[COLUMNS];
      convert(&sums[m * COLUMNS], tiles * TILE, y);
      std::memcpy(static_cast<T*>(a.y) + m * w.out_features + first * TILE, y,
                  least(tiles * TILE, w.out_features - first * TILE) * sizeof(T));
    }
  });
}

// A few rows: codes go from memory through registers into the products, and the scale is applied to a group's sum.
template <class T, int BITS, int ROWS>
static void few_rows_product(const QuantizedLinear& a, const Activations& x) {
  constexpr int VECTORS = TILE / WIDTH, INPUTS = Codes<BITS>::INPUTS;
  constexpr int CHAINS = ROWS * VECTORS >= 8 ? 1 : ROWS * VECTORS >= 4 ? 2 : 4;  // else sums wait for their last addition
  const QuantizedWeight& w = a.weight;
  for_each(a.parallel, w.tiles(), [&](int64_t tile) {
    Floats total[ROWS][VECTORS] = {};
    for (int64_t g = 0; g < x.groups; g++) {
      const uint8_t* p = w.packed + (tile * x.groups + g) * quantized_bytes(BITS);
      const float* act = &x.rounded[g * ROWS * GROUP];
      Floats sums[CHAINS][ROWS][VECTORS] = {};
      Step<BITS> steps[VECTORS];
      for (int v = 0; v < VECTORS; v++) steps[v] = Step<BITS>(w, (tile * x.groups + g) * TILE + v * WIDTH);
      for (int64_t k = 0; k < GROUP; k += INPUTS, p += 64) {
        __builtin_prefetch(p + 2048);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; v++) {
          const Codes<BITS> codes(p + v * WIDTH * 4);
#pragma GCC unroll 8
          for (int i = 0; i < INPUTS; i++) {
            const Floats code = w.zeros == nullptr ? codes[i] : codes[i] - steps[v].zero;
            for (int m = 0; m < ROWS; m++) sums[i % CHAINS][m][v] += code * act[m * GROUP + k + i];
          }
        }
      }
      for (int m = 0; m < ROWS; m++)
        for (int v = 0; v < VECTORS; v++) {
          for (int chain = 1; chain < CHAINS; chain++) sums[0][m][v] += sums[chain][m][v];
          total[m][v] += sums[0][m][v] * steps[v].scale;
        }
    }
    for (int m = 0; m < ROWS; m++) {
      T y[TILE];
      for (int v = 0; v < VECTORS; v++) narrow(total[m][v], y + v * WIDTH);
      std::memcpy(static_cast<T*>(a.y) + m * w.out_features + tile * TILE, y,
                  least(TILE, w.out_features - tile * TILE) * sizeof(T));
    }
  });
}

template <class T, int BITS>
static void linear_float32(const QuantizedLinear& a, const Activations& x) {
  // Generation, which takes 8-bit activations, wants a row's bits to be the same whatever stands beside it: one path there.
  if (a.act_bits == 16) switch (a.rows) {
      case 1: return few_rows_product<T, BITS, 1>(a, x);
      case 2: return few_rows_product<T, BITS, 2>(a, x);
      case 3: return few_rows_product<T, BITS, 3>(a, x);
      case 4: return few_rows_product<T, BITS, 4>(a, x);
    }
  unpacked_product<T, BITS>(a, x);
}

template <class T>
static void linear_float32(const QuantizedLinear& a) {
  Activations x;
  prepare<T>(a, Form::rounded, x);
  a.weight.bits == 4 ? linear_float32<T, 4>(a, x) : linear_float32<T, 8>(a, x);
}

}  // namespace internlm2::INTERNLM2_ISA

// y = x W' with W in 4 or 8 bits, by AVX-512 VNNI (int8 activations) and BF16 (bfloat16 activations).
#pragma once

#include "gemm.h"
#include "quantized_activations.h"

#include <type_traits>

#if defined(__AVX512BF16__) && defined(__AVX512VNNI__)

namespace internlm2::INTERNLM2_ISA {

// The bfloat16 of -8 .. 7, twice: the index of a lookup has one bit more than a code.
static inline __m512i lookup_table() {
  alignas(64) bfloat16 entries[32];
  for (int i = 0; i < 32; i++) {
    const float value = (float)((i & 15) - 8);
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    entries[i] = (bfloat16)(bits >> 16);
  }
  return _mm512_load_si512(entries);
}

// The p-th pair of codes in a word as bfloat16, less the implicit zero point.
template <int BITS>
static inline __m512i pair(__m512i word, int p, __m512i table) {
  if constexpr (BITS == 4) return _mm512_permutexvar_epi16(p ? _mm512_srli_epi16(word, 4 * p) : word, table);
  const __m512i codes = p ? _mm512_srli_epi16(word, 8) : _mm512_and_si512(word, _mm512_set1_epi16(255));
  const __m512 offset = _mm512_set1_ps(128.f);  // integers below 256 are exact in bfloat16: its bits are float32's top half
  const __m512 low = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_and_si512(codes, _mm512_set1_epi32(0xffff))), offset);
  const __m512 high = _mm512_sub_ps(_mm512_cvtepi32_ps(_mm512_srli_epi32(codes, 16)), offset);
  return _mm512_mask_blend_epi16(0xaaaaaaaau, _mm512_srli_epi32(_mm512_castps_si512(low), 16), _mm512_castps_si512(high));
}

// Weight scale and zero point of 16 channels of a group, as the sums need them.
template <int BITS, int ACT_BITS, bool SYMMETRIC>
struct Correction {
  __m512 scale, zero;
  Correction(const QuantizedWeight& w, int64_t at) : scale((__m512)widen(w.scales + at)), zero(_mm512_setzero_ps()) {
    if constexpr (!SYMMETRIC) {
      zero = _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at))));
      if (ACT_BITS == 16) zero = _mm512_sub_ps(zero, _mm512_set1_ps(BITS == 4 ? 8.f : 128.f));
    }
  }
  __m512 add(__m512 total, __m512 value, const Activations& x, int64_t group) const {
    if constexpr (!SYMMETRIC) {
      const float sum = ACT_BITS == 8 ? (float)x.code_sums[group] : x.sums[group];
      value = _mm512_fnmadd_ps(zero, _mm512_set1_ps(sum), value);
    }
    const __m512 factor = ACT_BITS == 8 ? _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[group])) : scale;
    return _mm512_fmadd_ps(value, factor, total);
  }
};

// sums += unsigned codes times signed ones. Assembly, because compilers copy the sums around.
static inline __attribute__((always_inline)) __m512i add_products(__m512i sums, __m512i codes, __m512i act) {
  __asm__("vpdpbusd %2, %1, %0" : "+v"(sums) : "v"(codes), "v"(act));
  return sums;
}

// ROWS tokens by TILES tiles of 16 channels.
template <class T, int BITS, int ACT_BITS, bool SYMMETRIC, int ROWS, int TILES>
class Block {
  static constexpr int64_t INPUTS = BITS == 4 ? 8 : 4, BLOCKS = GROUP / INPUTS;  // inputs of a 64-byte block
  // A few accumulators would wait for each other's latency: neighbouring blocks get their own.
  static constexpr int CHAINS = ROWS * TILES <= 4 ? 2 : 1;
  static constexpr int64_t AHEAD = ROWS * TILES <= 2 ? 4096 : 2048;

 public:
  static void run(const QuantizedWeight& w, const Activations& x, int64_t tile, int64_t row, T* y, int64_t ldy) {
    __m512 total[ROWS][TILES];
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < TILES; n++) total[m][n] = _mm512_setzero_ps();
    const int64_t groups = x.groups;
    for (int64_t g = 0; g < groups; g++) {
      __m512 sums[ROWS][TILES];
      if constexpr (ACT_BITS == 8)
        integer_sums(w, x, tile, row, g, sums);
      else
        float_sums(w, x, tile, row, g, sums);
      for (int n = 0; n < TILES; n++) {
        const Correction<BITS, ACT_BITS, SYMMETRIC> correction(w, ((tile + n) * groups + g) * TILE);
        for (int m = 0; m < ROWS; m++) total[m][n] = correction.add(total[m][n], sums[m][n], x, (row + m) * groups + g);
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < TILES; n++) narrow((Floats)total[m][n], y + m * ldy + n * TILE);
  }

 private:
  static const uint8_t* codes(const QuantizedWeight& w, int64_t tile, int64_t g, int64_t b) {
    const uint8_t* p = w.packed + (tile * w.groups() + g) * quantized_bytes(BITS) + b * 64;
    _mm_prefetch(reinterpret_cast<const char*>(p) + AHEAD, _MM_HINT_T0);
    return p;
  }

  static inline __attribute__((always_inline)) void integer_sums(
      const QuantizedWeight& w, const Activations& x, int64_t tile, int64_t row, int64_t g, __m512 (&out)[ROWS][TILES]) {
    __m512i sums[ROWS][TILES], others[ROWS][TILES];
    for (int m = 0; m < ROWS; m++) {
      // Starting from -zero * sum makes the implicit zero point free.
      const int32_t start = SYMMETRIC ? -(BITS == 4 ? 8 : 128) * x.code_sums[(row + m) * x.groups + g] : 0;
      for (int n = 0; n < TILES; n++) sums[m][n] = _mm512_set1_epi32(start), others[m][n] = _mm512_setzero_si512();
    }
    // The rest of the last group holds zero points, and activations of 0: nothing.
    const int64_t inputs = least(GROUP, w.in_features - g * GROUP);
    const int8_t* act = &x.codes[(g * x.rows + row) * GROUP];
    const uint8_t* p = w.packed + (tile * x.groups + g) * quantized_bytes(BITS);
    const int64_t next = x.groups * quantized_bytes(BITS);  // tile
    for (int64_t k = 0; k < inputs; k += 2 * INPUTS, p += 128, act += 2 * INPUTS) {
      add_block(p, next, act, sums);
      if constexpr (CHAINS == 2)
        add_block(p + 64, next, act + INPUTS, others);
      else
        add_block(p + 64, next, act + INPUTS, sums);
    }
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < TILES; n++)
        out[m][n] = _mm512_cvtepi32_ps(CHAINS == 2 ? _mm512_add_epi32(sums[m][n], others[m][n]) : sums[m][n]);
  }

  static inline __attribute__((always_inline)) void add_block(
      const uint8_t* p, int64_t next, const int8_t* act, __m512i (&sums)[ROWS][TILES]) {
    const __m512i nibble = _mm512_set1_epi8(15);
    for (int n = 0; n < TILES; n++) _mm_prefetch(reinterpret_cast<const char*>(p + n * next) + AHEAD, _MM_HINT_T0);
    for (int part = 0; part < (BITS == 4 ? 2 : 1); part++) {
      __m512i code[TILES];
      for (int n = 0; n < TILES; n++) {
        code[n] = _mm512_loadu_si512(p + n * next);  // again for the second part: registers are scarcer than loads
        if (part) code[n] = _mm512_srli_epi16(code[n], 4);
        if (BITS == 4) code[n] = _mm512_and_si512(code[n], nibble);
      }
      for (int m = 0; m < ROWS; m++) {
        int32_t four;
        std::memcpy(&four, act + m * GROUP + 4 * part, 4);
        const __m512i values = _mm512_set1_epi32(four);
        for (int n = 0; n < TILES; n++) sums[m][n] = add_products(sums[m][n], code[n], values);
      }
    }
  }

  static inline __attribute__((always_inline)) void float_sums(
      const QuantizedWeight& w, const Activations& x, int64_t tile, int64_t row, int64_t g, __m512 (&out)[ROWS][TILES]) {
    const __m512i table = lookup_table();
    __m512 sums[CHAINS][ROWS][TILES];
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < TILES; n++) sums[0][m][n] = sums[CHAINS - 1][m][n] = _mm512_setzero_ps();
#pragma GCC unroll 2
    for (int64_t b = 0; b < BLOCKS; b++) {
      __m512i word[TILES];
      for (int n = 0; n < TILES; n++) word[n] = _mm512_loadu_si512(codes(w, tile + n, g, b));
#pragma GCC unroll 4
      for (int p = 0; p < INPUTS / 2; p++) {
        __m512bh weights[TILES];
        for (int n = 0; n < TILES; n++) weights[n] = (__m512bh)pair<BITS>(word[n], p, table);
        for (int m = 0; m < ROWS; m++) {
          int32_t two;
          std::memcpy(&two, &x.values[(g * x.rows + row + m) * GROUP + b * INPUTS + 2 * p], 4);
          __m512(&sum)[ROWS][TILES] = sums[CHAINS == 2 ? p % 2 : 0];
          for (int n = 0; n < TILES; n++)
            sum[m][n] = _mm512_dpbf16_ps(sum[m][n], weights[n], (__m512bh)_mm512_set1_epi32(two));
        }
      }
    }
    for (int m = 0; m < ROWS; m++)
      for (int n = 0; n < TILES; n++)
        out[m][n] = CHAINS == 2 ? _mm512_add_ps(sums[0][m][n], sums[CHAINS - 1][m][n]) : sums[0][m][n];
  }
};

// Accumulators of a block: with int8 a broadcast costs as much as two loads, and so serves four tiles; with bfloat16 what
// unpacks a tile serves as many rows as there are registers. A chunk of activations stays in L2.
template <int ACT_BITS>
struct BlockShape {
  static constexpr int64_t ROWS = ACT_BITS == 8 ? 6 : 8, TILES = ACT_BITS == 8 ? 4 : 2;
};
constexpr int64_t CHUNK = 120, WIDE = 4;  // rows; tiles
// With more rows and bfloat16 activations, unpacking a weight to bfloat16 once costs less than the scales of each group: then
// the product is that of dequantize_weight.
constexpr int64_t MANY_ROWS = 64, MANY_ROWS_CHUNK = 240;

// The p-th pair of inputs in a word, dequantised: lanes of bfloat16.
template <int BITS>
static inline __m512i dequantized_pair(__m512i word, int p, __m512 zero, __m512 scale) {
  constexpr int MASK = BITS == 4 ? 15 : 255;
  // Pairs come in the order of `prepare`: of a word's 16-bit halves, the p-th code of each.
  const __m512i low = _mm512_and_si512(_mm512_srli_epi32(word, BITS * p), _mm512_set1_epi32(MASK));
  const __m512i high = _mm512_and_si512(_mm512_srli_epi32(word, BITS * p + 16), _mm512_set1_epi32(MASK));
  const __m512 first = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(low), zero), scale);
  const __m512 second = _mm512_mul_ps(_mm512_sub_ps(_mm512_cvtepi32_ps(high), zero), scale);
  alignas(64) static constexpr uint16_t INTERLEAVE[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                          8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(INTERLEAVE), (__m512i)_mm512_cvtne2ps_pbh(second, first));
}

// Many rows by up to WIDE tiles.
template <class T, int BITS>
static void unpacked_strip(const QuantizedWeight& w, const Activations& x, int64_t tile, int64_t tiles, int64_t row,
                           int64_t rows, T* y, int64_t ldy) {
  constexpr int64_t LANES = GROUP / 2, COLUMNS = WIDE * TILE, PAIRS = BITS == 4 ? 4 : 2;
  alignas(64) Lane lanes[LANES * COLUMNS];
  alignas(64) float sums[MANY_ROWS_CHUNK * COLUMNS];
  std::memset(sums, 0, rows * COLUMNS * sizeof(float));
  for (int64_t g = 0; g < x.groups; g++) {
    for (int64_t n = 0; n < tiles; n++) {
      const int64_t at = (tile + n) * x.groups + g;
      const uint8_t* p = w.packed + at * quantized_bytes(BITS);
      const __m512 scale = (__m512)widen(w.scales + at * TILE);
      __m512 zero = _mm512_set1_ps(BITS == 4 ? 8.f : 128.f);
      if (w.zeros != nullptr)
        zero = _mm512_cvtepi32_ps(
            _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w.zeros + at * TILE))));
      for (int64_t k = 0; k < LANES; k += PAIRS, p += 64) {
        const __m512i word = _mm512_loadu_si512(p);
#pragma GCC unroll 4
        for (int i = 0; i < PAIRS; i++)
          _mm512_store_si512(lanes + (k + i) * COLUMNS + n * TILE, dequantized_pair<BITS>(word, i, zero, scale));
      }
    }
    gemm<BFloat16Engine, true>(reinterpret_cast<const Lane*>(&x.values[(g * x.rows + row) * GROUP]), LANES, lanes, COLUMNS,
                               LANES, sums, COLUMNS, rows, tiles * TILE);
  }
  for (int64_t m = 0; m < rows; m++) convert(sums + m * COLUMNS, tiles * TILE, y + m * ldy);
}

template <class T, int BITS, int ACT_BITS, bool SYMMETRIC>
static void linear_packed(const QuantizedLinear& a) {
  using Shape = BlockShape<ACT_BITS>;
  const QuantizedWeight& w = a.weight;
  Activations x;
  prepare<T>(a, ACT_BITS == 8 ? Form::codes : Form::values, x);
  const bool unpack = ACT_BITS == 16 && a.rows > MANY_ROWS;
  const int64_t N = w.out_features, strips = (w.tiles() + WIDE - 1) / WIDE;
  const int64_t chunk = unpack ? MANY_ROWS_CHUNK : CHUNK, most_rows = unpack ? chunk : Shape::ROWS;
  const auto block = [&](int64_t tile, auto tiles, int64_t row, int64_t count, T* y, int64_t ldy) {
    const auto run = [&](auto n) { Block<T, BITS, ACT_BITS, SYMMETRIC, n(), tiles()>::run(w, x, tile, row, y, ldy); };
    switch (count) {
      case 1: return run(std::integral_constant<int, 1>{});
      case 2: return run(std::integral_constant<int, 2>{});
      case 3: return run(std::integral_constant<int, 3>{});
      case 4: return run(std::integral_constant<int, 4>{});
      case 5: return run(std::integral_constant<int, 5>{});
      case 6: return run(std::integral_constant<int, 6>{});
    }
    if constexpr (ACT_BITS == 16)
      count == 7 ? run(std::integral_constant<int, 7>{}) : run(std::integral_constant<int, 8>{});
  };
  const auto strip = [&](int64_t tile, int64_t row, int64_t count) {
    const int64_t tiles = least(WIDE, w.tiles() - tile), width = least(N - tile * TILE, tiles * TILE);
    Buffer<T> edge;
    T *y = static_cast<T*>(a.y) + row * N + tile * TILE, *target = y;
    int64_t ldy = N;
    if (width < tiles * TILE) {
      edge.allocate(count * tiles * TILE);
      target = edge.get(), ldy = tiles * TILE;
    }
    if constexpr (ACT_BITS == 16) {
      if (unpack) unpacked_strip<T, BITS>(w, x, tile, tiles, row, count, target, ldy);
    }
    for (int64_t t = 0; !unpack && t < tiles;)
      if (tiles - t >= Shape::TILES && (ACT_BITS == 8 || a.rows > 1)) {
        block(tile + t, std::integral_constant<int, Shape::TILES>{}, row, count, target + t * TILE, ldy);
        t += Shape::TILES;
      } else {
        block(tile + t, std::integral_constant<int, 1>{}, row, count, target + t * TILE, ldy);
        t++;
      }
    if (target != y)
      for (int64_t m = 0; m < count; m++) std::memcpy(y + m * N, target + m * ldy, width * sizeof(T));
  };
  // Some neighbouring tiles an item, so that each thread reads one stream of memory.
  const int64_t span = most(1, strips / (8 * a.threads));
  for_each(a.parallel, (strips + span - 1) / span, [&](int64_t item) {
    for (int64_t first = 0; first < a.rows; first += chunk)
      for (int64_t t = item * span; t < least(strips, (item + 1) * span); t++)
        for (int64_t row = first, end = least(a.rows, first + chunk); row < end;) {
          const int64_t left = end - row;
          const int64_t count = left > most_rows && left < 2 * most_rows ? (left + 1) / 2 : least(left, most_rows);
          strip(t * WIDE, row, count);
          row += count;
        }
  });
}

template <class T, int BITS, int ACT_BITS>
static void linear_packed(const QuantizedLinear& a) {
  a.weight.zeros ? linear_packed<T, BITS, ACT_BITS, false>(a) : linear_packed<T, BITS, ACT_BITS, true>(a);
}

}  // namespace internlm2::INTERNLM2_ISA

#endif

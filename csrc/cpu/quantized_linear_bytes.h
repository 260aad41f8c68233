// y = x W' with W in 4 or 8 bits and int8 activations, by AVX2: 32 products of bytes an instruction, added in pairs to 16 bits.
// Sums of a group are exact integers, so a row's result depends neither on the rows beside it nor on how they are blocked.
#pragma once

#include "quantized_activations.h"

#include <type_traits>

#if defined(__AVX2__)

namespace internlm2::INTERNLM2_ISA {

template <class T, int BITS, bool SYMMETRIC>
class BytesProduct {
  static constexpr int VECTORS = 2;                 // of 8 channels: a tile
  static constexpr int64_t INPUTS = BITS == 4 ? 8 : 4;  // of a 64-byte block

 public:
  explicit BytesProduct(const QuantizedLinear& arguments) : a(arguments), w(a.weight) { prepare<T>(a, Form::codes, x); }

  void run() {
    // Some neighbouring tiles an item, so that each thread reads one stream of memory.
    const int64_t tiles = w.tiles(), span = most(1, tiles / (8 * a.threads));
    for_each(a.parallel, (tiles + span - 1) / span, [&](int64_t item) {
      for (int64_t tile = item * span; tile < least(tiles, (item + 1) * span); tile++)
        for (int64_t row = 0; row < a.rows;) switch (a.rows - row) {
            case 1: row += rows<1>(tile, row); break;
            case 2: row += rows<2>(tile, row); break;
            case 3: row += rows<3>(tile, row); break;
            default: row += rows<4>(tile, row);
          }
    });
  }

 private:
  const QuantizedLinear& a;
  const QuantizedWeight& w;
  Activations x;

  template <int ROWS>
  int64_t rows(int64_t tile, int64_t row) const {
    __m256 total[ROWS][VECTORS];
    for (int m = 0; m < ROWS; m++) total[m][0] = total[m][1] = _mm256_setzero_ps();
    for (int64_t g = 0; g < x.groups; g++) {
      const int64_t at = tile * x.groups + g;
      __m256i sums[ROWS][VECTORS];
      for (int m = 0; m < ROWS; m++) {
        const int32_t start = SYMMETRIC && BITS == 4 ? -8 * x.code_sums[(row + m) * x.groups + g] : 0;
        sums[m][0] = sums[m][1] = _mm256_set1_epi32(start);
      }
      add_group<ROWS>(w.packed + at * quantized_bytes(BITS), &x.codes[(g * a.rows + row) * GROUP], sums);
      for (int v = 0; v < VECTORS; v++) {
        const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(w.scales + at * TILE + v * 8));
        const __m256 scale = _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
        __m256 zero = _mm256_setzero_ps();
        if constexpr (!SYMMETRIC) {
          const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(w.zeros + at * TILE + v * 8));
          zero = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_cvtepu8_epi32(bytes), _mm256_set1_epi32(BITS == 4 ? 0 : 128)));
        }
        for (int m = 0; m < ROWS; m++) {
          const int64_t group = (row + m) * x.groups + g;
          __m256 value = _mm256_cvtepi32_ps(sums[m][v]);
          if constexpr (!SYMMETRIC) value = _mm256_fnmadd_ps(zero, _mm256_set1_ps((float)x.code_sums[group]), value);
          total[m][v] = _mm256_fmadd_ps(value, _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[group])), total[m][v]);
        }
      }
    }
    for (int m = 0; m < ROWS; m++) {
      alignas(64) float wide[TILE];
      for (int v = 0; v < VECTORS; v++) _mm256_store_ps(wide + v * 8, total[m][v]);
      T y[TILE];
      convert(wide, TILE, y);
      std::memcpy(static_cast<T*>(a.y) + (row + m) * w.out_features + tile * TILE, y,
                  least(TILE, w.out_features - tile * TILE) * sizeof(T));
    }
    return ROWS;
  }

  static inline __m256i broadcast(const int8_t* four) {
    int32_t word;
    std::memcpy(&word, four, 4);
    return _mm256_set1_epi32(word);
  }

  // Opaque to the compiler, which would else add products to each other first and keep all of them on the stack.
  static inline void add(__m256i& sum, __m256i pairs) {
    sum = _mm256_add_epi16(sum, pairs);
    __asm__("" : "+x"(sum));
  }

  // sums += codes (less 128 where they have 8 bits) times activations, over the 128 inputs of a group.
  template <int ROWS>
  static inline __attribute__((always_inline)) void add_group(
      const uint8_t* p, const int8_t* act, __m256i (&sums)[ROWS][VECTORS]) {
    const __m256i ones = _mm256_set1_epi16(1);
    if constexpr (BITS == 4) {
      const __m256i nibble = _mm256_set1_epi8(15);
      // 8 products of 15 x 127 in pairs fit 16 bits: 32 inputs between additions to the 32-bit sums.
      for (int64_t k = 0; k < GROUP; k += 32) {
        __m256i part[ROWS][VECTORS];
        for (int m = 0; m < ROWS; m++) part[m][0] = part[m][1] = _mm256_setzero_si256();
        for (int64_t i = 0; i < 32; i += INPUTS, p += 64) {
          _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
          __m256i low[VECTORS], high[VECTORS];
          for (int v = 0; v < VECTORS; v++) {
            const __m256i word = load<__m256i>(p + v * 32);
            low[v] = _mm256_and_si256(word, nibble);
            high[v] = _mm256_and_si256(_mm256_srli_epi16(word, 4), nibble);
          }
          for (int m = 0; m < ROWS; m++) {
            const __m256i first = broadcast(act + m * GROUP + k + i), second = broadcast(act + m * GROUP + k + i + 4);
            for (int v = 0; v < VECTORS; v++) {
              add(part[m][v], _mm256_maddubs_epi16(low[v], first));
              add(part[m][v], _mm256_maddubs_epi16(high[v], second));
            }
          }
        }
        for (int m = 0; m < ROWS; m++)
          for (int v = 0; v < VECTORS; v++)
            sums[m][v] = _mm256_add_epi32(sums[m][v], _mm256_madd_epi16(part[m][v], ones));
      }
    } else {
      const __m256i middle = _mm256_set1_epi8((char)0x80);
      for (int64_t k = 0; k < GROUP; k += INPUTS, p += 64) {
        _mm_prefetch(reinterpret_cast<const char*>(p) + 2048, _MM_HINT_T0);
        // The instruction wants one side unsigned: |weight|, its sign moved to the activation. 2 x 128 x 127 fits 16 bits.
        __m256i code[VECTORS], size[VECTORS];
        for (int v = 0; v < VECTORS; v++) {
          code[v] = _mm256_xor_si256(load<__m256i>(p + v * 32), middle);
          size[v] = _mm256_abs_epi8(code[v]);
        }
        for (int m = 0; m < ROWS; m++) {
          const __m256i four = broadcast(act + m * GROUP + k);
          for (int v = 0; v < VECTORS; v++) {
            const __m256i pairs = _mm256_maddubs_epi16(size[v], _mm256_sign_epi8(four, code[v]));
            sums[m][v] = _mm256_add_epi32(sums[m][v], _mm256_madd_epi16(pairs, ones));
          }
        }
      }
    }
  }
};

template <class T>
static void linear_bytes(const QuantizedLinear& a) {
  const auto run = [&](auto bits, auto symmetric) { BytesProduct<T, bits(), symmetric()>(a).run(); };
  const auto choose = [&](auto bits) { a.weight.zeros ? run(bits, std::false_type{}) : run(bits, std::true_type{}); };
  a.weight.bits == 4 ? choose(std::integral_constant<int, 4>{}) : choose(std::integral_constant<int, 8>{});
}

}  // namespace internlm2::INTERNLM2_ISA

#endif

// Attention of one new token a row over its KV cache: bound by reading the cache, so each key and value is read from memory
// once for all heads of its group. Items are (row, kv head, chunk of keys); the chunks of a row are joined at the end.
#pragma once

#include "../common/arguments.h"
#include "gemm.h"

#include <cmath>
#include <type_traits>

namespace internlm2::INTERNLM2_ISA {

template <class T>
class DecodeAttentionKernel {
  static constexpr int64_t CHUNK = 512;  // keys and values of a chunk stay in L2 between their uses
  static constexpr int HEADS = 4;        // at a time: 16 accumulators of 4 x 64 columns
  // Two neighbouring bfloat16 widen by a shift and a mask of their word, at half the operations of widening each: partial
  // results then lie as blocks of WIDTH even columns and WIDTH odd ones, put in order where they are joined.
  static constexpr bool SPLIT = sizeof(T) == 2 && WIDTH <= 8;
  static constexpr int64_t STEP = WIDTH == 16 ? CHUNK : 64;
  // Accumulators of N heads: all that the registers hold.
  template <int N>
  static constexpr int VECTORS = WIDTH == 16 ? 4 : N == 1 ? 8 : N == 4 ? 2 : 4;
  static constexpr float MINUS_INFINITY = -__builtin_inff();
#if defined(__AVX512BF16__)
  static constexpr bool PAIRS = sizeof(T) == 2;  // bfloat16 products where head_dim is a multiple of 32
#else
  static constexpr bool PAIRS = false;
#endif

 public:
  explicit DecodeAttentionKernel(const DecodeAttention& arguments)
      : a(arguments), chunks(most(1, (a.capacity + CHUNK - 1) / CHUNK)), stride(a.dim + 2) {}

  void run() {
    partial.allocate(a.batch * a.groups * chunks * a.queries * stride);
    // Neighbouring chunks go to one thread, which fetches the keys of the next while it weighs the values of this one.
    const int64_t total = a.batch * a.groups * chunks, span = most(1, total / (16 * a.threads));
    for_each(a.parallel, (total + span - 1) / span, [&](int64_t item) {
      for (int64_t i = item * span; i < least(total, (item + 1) * span); i++)
        attend(i / chunks / a.groups, i / chunks % a.groups, i % chunks);
    });
    const int64_t rows = a.batch * a.groups * a.queries, grain = 32;
    for_each(a.parallel, (rows + grain - 1) / grain, [&](int64_t item) {
      for (int64_t row = item * grain; row < least(rows, (item + 1) * grain); row++) join(row);
    });
  }

 private:
  const DecodeAttention& a;
  int64_t chunks, stride;
  Buffer<float> partial;  // [B, G, chunks, R, D + 2]: weighted values, largest score, total weight

  float* part(int64_t b, int64_t group, int64_t chunk, int64_t r) const {
    return partial.get() + (((b * a.groups + group) * chunks + chunk) * a.queries + r) * stride;
  }

  void attend(int64_t b, int64_t group, int64_t chunk) {
    const int64_t first = chunk * CHUNK, count = least(CHUNK, a.lengths[b] - first);
    if (count <= 0) return;  // join() looks at the length again
    const T* keys = static_cast<const T*>(a.k_cache) + b * a.k_stride[0] + group * a.k_stride[1] + first * a.k_stride[2];
    const T* values = static_cast<const T*>(a.v_cache) + b * a.v_stride[0] + group * a.v_stride[1] + first * a.v_stride[2];
    const T* query = static_cast<const T*>(a.q) + (b * a.groups + group) * a.queries * a.dim;
    const int64_t passes = (a.queries + HEADS - 1) / HEADS;
    for (int64_t p = 0, r = 0; p < passes; p++) {  // even shares: 6 heads are 3 + 3
      const int64_t heads = (a.queries - r + passes - p - 1) / (passes - p);
      float* out = part(b, group, chunk, r);
      switch (heads) {
        case 1: pass<1>(query + r * a.dim, keys, values, count, out); break;
        case 2: pass<2>(query + r * a.dim, keys, values, count, out); break;
        case 3: pass<3>(query + r * a.dim, keys, values, count, out); break;
        default: pass<4>(query + r * a.dim, keys, values, count, out);
      }
      r += heads;
    }
  }

  template <int N>
  void pass(const T* query, const T* keys, const T* values, int64_t count, float* out) const {
    alignas(64) float scores[N][CHUNK];
    score<N>(query, keys, values, count, scores);
    for (int r = 0; r < N; r++) softmax(scores[r], count, out + r * stride + a.dim);
    if constexpr (PAIRS) {
      if (a.dim % 32 == 0) return weigh_pairs<N>(scores, keys, values, count, out);
    }
    // Values of a step stay in L1 between the passes over their columns.
    for (int64_t first = 0; first < count; first += STEP) {
      const int64_t end = least(count, first + STEP);
      int64_t d = 0;
      const auto columns = [&](auto vectors) {
        for (; d + vectors() * WIDTH <= a.dim; d += vectors() * WIDTH)
          weigh<N, vectors()>(scores, keys + d, values + d, first, end, out + d);
      };
      columns(std::integral_constant<int, VECTORS<N>>{});
      columns(std::integral_constant<int, 2>{});
      columns(std::integral_constant<int, 1>{});
    }
  }

  // The even columns of 2 * WIDTH bfloat16, then the odd ones.
  template <class Use>
  static inline void widen_pairs(const T* x, const Use& use) {
    const Words pairs = load<Words>(x);
    use((Floats)(pairs << 16), 0);
    use((Floats)(pairs & 0xffff0000u), 1);
  }

  // Into L2; addresses past the cache are harmless. Keys are scored while values arrive and the other way round, so that
  // memory is never idle: 0.7-0.8 of the bandwidth of a plain sum, against 0.4 without.
  static inline void fetch(const T* x, int64_t columns) {
    for (int64_t d = 0; d < columns; d += 64 / (int64_t)sizeof(T)) __builtin_prefetch(x + d, 0, 2);
  }

  // scores[r][j] = q_r . k_j * scale * log2(e).
  template <int N>
  void score(const T* query, const T* keys, const T* values, int64_t count, float (*scores)[CHUNK]) const {
    if constexpr (PAIRS) switch (a.dim) {
        case 128: return score_pairs<N, 128>(query, keys, values, count, scores);
        case 96: return score_pairs<N, 96>(query, keys, values, count, scores);
        case 64: return score_pairs<N, 64>(query, keys, values, count, scores);
      }
    score_wide<N>(query, keys, values, count, scores);
  }

  // WIDTH keys at a time: dot(key, products) gives lane-wise partial sums for each head, then their transpose adds up.
  template <int N, class Dot>
  void score_keys(const T* keys, const T* values, int64_t count, float (*scores)[CHUNK], const Dot& dot) const {
    const float scale = a.scale * 1.44269504f;
    for (int64_t j = 0; j < count; j += WIDTH) {
      Floats sums[N][WIDTH];
      for (int t = 0; t < WIDTH; t++) {
        fetch(values + (j + t) * a.v_stride[2], a.dim);
        Floats products[N] = {};
        dot(keys + least(j + t, count - 1) * a.k_stride[2], products);
        for (int r = 0; r < N; r++) sums[r][t] = products[r];
      }
      for (int r = 0; r < N; r++) store(&scores[r][j], add_up(sums[r]) * scale);
    }
  }

  // In float32, with the queries widened once.
  template <int N>
  void score_wide(const T* query, const T* keys, const T* values, int64_t count, float (*scores)[CHUNK]) const {
    alignas(64) float wide[N][256];
    for (int r = 0; r < N; r++) {
      if constexpr (SPLIT)
        for (int64_t d = 0; d < a.dim; d += 2 * WIDTH)
          widen_pairs(query + r * a.dim + d, [&](Floats x, int n) { store(wide[r] + d + n * WIDTH, x); });
      else
        convert(query + r * a.dim, a.dim, wide[r]);
    }
    score_keys<N>(keys, values, count, scores, [&](const T* key, Floats* products) {
      const auto add = [&](Floats k, int64_t d) {
        for (int r = 0; r < N; r++) products[r] += k * widen(wide[r] + d);
      };
      if constexpr (SPLIT)
        for (int64_t d = 0; d < a.dim; d += 2 * WIDTH) widen_pairs(key + d, [&](Floats k, int n) { add(k, d + n * WIDTH); });
      else
        for (int64_t d = 0; d < a.dim; d += WIDTH) add(widen(key + d), d);
    });
  }

#if defined(__AVX512BF16__)
  template <int N, int DIM>
  void score_pairs(const T* query, const T* keys, const T* values, int64_t count, float (*scores)[CHUNK]) const {
    score_keys<N>(keys, values, count, scores, [&](const T* key, Floats* products) {
      __m512bh k[DIM / 32];
      for (int d = 0; d < DIM / 32; d++) k[d] = (__m512bh)_mm512_loadu_si512(key + 32 * d);
      for (int r = 0; r < N; r++) {
        __m512 chains[2] = {_mm512_setzero_ps(), _mm512_setzero_ps()};
        for (int d = 0; d < DIM / 32; d++)
          chains[d % 2] = _mm512_dpbf16_ps(chains[d % 2], k[d], (__m512bh)_mm512_loadu_si512(query + r * DIM + 32 * d));
        products[r] = (Floats)_mm512_add_ps(chains[0], chains[1]);
      }
    });
  }
#endif

  static inline Floats add_up(Floats* x) {  // lane t of the result = sum of the lanes of x[t]
#if defined(__AVX512F__)
    transpose16(reinterpret_cast<__m512i*>(x));
    Floats total = x[0];
    for (int t = 1; t < WIDTH; t++) total += x[t];
#elif defined(__AVX2__)
    __m256 pairs[4], fours[2];
    for (int i = 0; i < 4; i++) pairs[i] = _mm256_hadd_ps((__m256)x[2 * i], (__m256)x[2 * i + 1]);
    for (int i = 0; i < 2; i++) fours[i] = _mm256_hadd_ps(pairs[2 * i], pairs[2 * i + 1]);
    const Floats total = (Floats)_mm256_add_ps(_mm256_permute2f128_ps(fours[0], fours[1], 0x20),
                                               _mm256_permute2f128_ps(fours[0], fours[1], 0x31));
#else
    Floats total;
    for (int t = 0; t < WIDTH; t++) total[t] = sum(x[t]);
#endif
    return total;
  }

  // exp2(scores - largest) in place; writes largest and total.
  static void softmax(float* scores, int64_t count, float* largest_and_total) {
    const int64_t last = (count - 1) / WIDTH * WIDTH;
    Floats tail = keep_first(widen(scores + last), count - last, splat(MINUS_INFINITY)), peak = tail;
    for (int64_t j = 0; j < last; j += WIDTH) peak = larger(peak, widen(scores + j));
    const float largest = maximum(peak);
    Floats total = keep_first(exp2(tail - largest), count - last, Floats{});
    store(scores + last, total);
    for (int64_t j = 0; j < last; j += WIDTH) {
      Floats weight = exp2(widen(scores + j) - largest);
      total += weight;
      store(scores + j, weight);
    }
    largest_and_total[0] = largest;
    largest_and_total[1] = sum(total);
  }

  // out (+)= the weighted values of keys first .. end - 1.
  template <int N, int COUNT>
  void weigh(float (*weights)[CHUNK], const T* keys, const T* values, int64_t first, int64_t end, float* out) const {
    Floats sums[N][COUNT];
    for (int r = 0; r < N; r++)
      for (int n = 0; n < COUNT; n++) sums[r][n] = first ? widen(out + r * stride + n * WIDTH) : Floats{};
    for (int64_t j = first; j < end; j++) {
      fetch(keys + (CHUNK + j) * a.k_stride[2], COUNT * WIDTH);
      const T* value = values + j * a.v_stride[2];
      const auto add = [&](Floats v, int n) {
        for (int r = 0; r < N; r++) sums[r][n] += v * weights[r][j];
      };
      if constexpr (SPLIT && COUNT % 2 == 0)
        for (int n = 0; n < COUNT; n += 2) widen_pairs(value + n * WIDTH, [&](Floats v, int odd) { add(v, n + odd); });
      else
        for (int n = 0; n < COUNT; n++) add(widen(value + n * WIDTH), n);
    }
    for (int r = 0; r < N; r++)
      for (int n = 0; n < COUNT; n++) store(out + r * stride + n * WIDTH, sums[r][n]);
  }

#if defined(__AVX512BF16__)
  // Two keys at a time. Interleaving works inside 128-bit parts, so a vector holds columns 0-3, 8-11, 16-19, 24-27 of its 32
  // and its neighbour the rest; the order is put right when the sums are stored.
  template <int N, int BLOCKS>
  void weigh_columns(const Lane (*weights)[CHUNK / 2], const T* keys, const T* values, int64_t count, float* out) const {
    __m512 low[N][BLOCKS], high[N][BLOCKS];
    for (int r = 0; r < N; r++)
      for (int n = 0; n < BLOCKS; n++) low[r][n] = high[r][n] = _mm512_setzero_ps();
    for (int64_t j = 0; j < count; j += 2) {
      const T* first = values + j * a.v_stride[2];
      const T* second = values + least(j + 1, count - 1) * a.v_stride[2];  // its weight is 0 where it is a repeat
      fetch(keys + (CHUNK + j) * a.k_stride[2], 32 * BLOCKS);  // the next chunk's
      fetch(keys + (CHUNK + j + 1) * a.k_stride[2], 32 * BLOCKS);
      for (int n = 0; n < BLOCKS; n++) {
        const __m512i x = _mm512_loadu_si512(first + 32 * n), y = _mm512_loadu_si512(second + 32 * n);
        const __m512bh l = (__m512bh)_mm512_unpacklo_epi16(x, y), h = (__m512bh)_mm512_unpackhi_epi16(x, y);
        for (int r = 0; r < N; r++) {
          const __m512bh w = (__m512bh)_mm512_set1_epi32((int)weights[r][j / 2]);
          low[r][n] = _mm512_dpbf16_ps(low[r][n], l, w);
          high[r][n] = _mm512_dpbf16_ps(high[r][n], h, w);
        }
      }
    }
    const __m512i front = _mm512_setr_epi32(0, 1, 2, 3, 16, 17, 18, 19, 4, 5, 6, 7, 20, 21, 22, 23);
    const __m512i back = _mm512_setr_epi32(8, 9, 10, 11, 24, 25, 26, 27, 12, 13, 14, 15, 28, 29, 30, 31);
    for (int r = 0; r < N; r++)
      for (int n = 0; n < BLOCKS; n++) {
        _mm512_storeu_ps(out + r * stride + 32 * n, _mm512_permutex2var_ps(low[r][n], front, high[r][n]));
        _mm512_storeu_ps(out + r * stride + 32 * n + 16, _mm512_permutex2var_ps(low[r][n], back, high[r][n]));
      }
  }
  template <int N>
  void weigh_pairs(float (*scores)[CHUNK], const T* keys, const T* values, int64_t count, float* out) const {
    alignas(64) Lane weights[N][CHUNK / 2];
    for (int r = 0; r < N; r++)
      for (int64_t j = 0; j < round_up(count, 16); j += 16)
        narrow(widen(&scores[r][j]), reinterpret_cast<bfloat16*>(weights[r]) + j);
    int64_t d = 0;
    for (; d + 64 <= a.dim; d += 64) weigh_columns<N, 2>(weights, keys + d, values + d, count, out + d);
    if (d < a.dim) weigh_columns<N, 1>(weights, keys + d, values + d, count, out + d);
  }
#endif

  void join(int64_t row) const {
    const int64_t b = row / (a.groups * a.queries), group = row / a.queries % a.groups, r = row % a.queries;
    const int64_t used = (a.lengths[b] + CHUNK - 1) / CHUNK;
    T* out = static_cast<T*>(a.out) + row * a.dim;
    float largest = MINUS_INFINITY, total = 0;
    alignas(64) float sums[256] = {};
    for (int64_t c = 0; c < used; c++) largest = fmaxf(largest, part(b, group, c, r)[a.dim]);
    for (int64_t c = 0; c < used; c++) {
      const float* x = part(b, group, c, r);
      const float factor = exp2f(x[a.dim] - largest);
      total += factor * x[a.dim + 1];
      for (int64_t d = 0; d < a.dim; d += WIDTH) store(sums + d, widen(sums + d) + widen(x + d) * factor);
    }
    const float inverse = used ? 1.f / total : 0.f;
    if constexpr (SPLIT) {
      alignas(64) float ordered[256];
      for (int64_t d = 0; d < a.dim; d += 2 * WIDTH)
        for (int64_t i = 0; i < WIDTH; i++) ordered[d + 2 * i] = sums[d + i], ordered[d + 2 * i + 1] = sums[d + WIDTH + i];
      std::memcpy(sums, ordered, a.dim * sizeof(float));
    }
    for (int64_t d = 0; d < a.dim; d += WIDTH) narrow(widen(sums + d) * inverse, out + d);
  }
};

}  // namespace internlm2::INTERNLM2_ISA

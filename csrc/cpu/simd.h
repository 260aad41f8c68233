// Vectors of the widest kind that the compiler flags of this object allow, and the conversions that all kernels share.
// Everything lies in a namespace named after the instruction set: the same source is compiled once for each, and no inline
// function of one object may stand in for that of another.
#pragma once

#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace internlm2::INTERNLM2_ISA {

#if defined(__AVX512F__)
constexpr int WIDTH = 16;
#elif defined(__AVX2__)
constexpr int WIDTH = 8;
#else
constexpr int WIDTH = 4;
#endif

typedef float Floats __attribute__((vector_size(WIDTH * 4)));
typedef uint32_t Words __attribute__((vector_size(WIDTH * 4)));
typedef int32_t Ints __attribute__((vector_size(WIDTH * 4)));
typedef uint16_t Shorts __attribute__((vector_size(WIDTH * 2)));
typedef uint8_t Bytes __attribute__((vector_size(WIDTH)));

using bfloat16 = uint16_t;
typedef uint32_t Lane __attribute__((may_alias));  // one float, or two neighbouring bfloat16

template <class V>
static inline V load(const void* p) {
  V v;
  std::memcpy(&v, p, sizeof(V));
  return v;
}
template <class V>
static inline void store(void* p, V v) {
  std::memcpy(p, &v, sizeof(V));
}

static inline Floats splat(float x) { return Floats{} + x; }
static inline Words splat_lane(Lane x) { return Words{} + x; }

static inline Floats widen(const float* x) { return load<Floats>(x); }
static inline Floats widen(const bfloat16* x) {
  Words w = __builtin_convertvector(load<Shorts>(x), Words) << 16;
  return (Floats)w;
}
static inline float widen_one(float x) { return x; }
static inline float widen_one(bfloat16 x) {
  uint32_t w = (uint32_t)x << 16;
  float f;
  std::memcpy(&f, &w, 4);
  return f;
}

// Round to nearest even; a NaN keeps its top bits and stays one.
static inline Words round_bits(Floats x) {
  Words w = (Words)x;
  Words rounded = (w + 0x7fffu + ((w >> 16) & 1u)) >> 16;
  return (w & 0x7fffffffu) > 0x7f800000u ? (w >> 16) | 0x40u : rounded;
}
static inline void narrow(Floats x, float* y) { store(y, x); }
static inline void narrow(Floats x, bfloat16* y) {
#if defined(__AVX512BF16__)
  store(y, (__m256i)_mm512_cvtneps_pbh((__m512)x));
#else
  store(y, __builtin_convertvector(round_bits(x), Shorts));
#endif
}

template <class From, class To>
static inline void convert(const From* x, int64_t n, To* y) {  // n is a multiple of 16, as head dims are
  for (int64_t i = 0; i < n; i += WIDTH) narrow(widen(x + i), y + i);
}
static inline void convert(const bfloat16* x, int64_t n, bfloat16* y) { std::memcpy(y, x, n * sizeof(bfloat16)); }

static inline float sum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 four = _mm_add_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
#else
  float total = 0;
  for (int i = 0; i < WIDTH; i++) total += x[i];
  return total;
#endif
}
static inline float maximum(Floats x) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)x);
#elif defined(__AVX2__)
  __m128 four = _mm_max_ps(_mm256_castps256_ps128((__m256)x), _mm256_extractf128_ps((__m256)x, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
#else
  float most = x[0];
  for (int i = 1; i < WIDTH; i++) most = x[i] > most ? x[i] : most;
  return most;
#endif
}
static inline Floats larger(Floats a, Floats b) { return a > b ? a : b; }

static inline Words iota() {
  Words w;
  for (int i = 0; i < WIDTH; i++) w[i] = i;
  return w;
}
// First `count` lanes of x, `other` beyond; count may be negative or past the width.
static inline Floats keep_first(Floats x, int64_t count, Floats other) {
  uint32_t limit = count < 0 ? 0 : count > WIDTH ? WIDTH : (uint32_t)count;
  return iota() < splat_lane(limit) ? x : other;
}

static inline Floats drop_first(Floats x, int64_t count) {
  uint32_t limit = count < 0 ? 0 : count > WIDTH ? WIDTH : (uint32_t)count;
  return iota() < splat_lane(limit) ? Floats{} : x;
}

// 2 ** x to 2e-7 relative for x in [-126, 127]; anything lower, -inf included, gives 2 ** -126; NaN stays NaN.
static inline Floats exp2(Floats x) {
  x = x < -126.f ? splat(-126.f) : x;
#if defined(__AVX512F__)
  Floats n = (Floats)_mm512_roundscale_ps((__m512)x, 8);
  Floats r = x - n;
#else
  Floats shifted = x + 12582912.f;  // 1.5 * 2 ** 23: the integer part lands in the low bits
  Floats r = x - (shifted - 12582912.f);
#endif
  Floats p = splat(1.33335581e-3f);
  p = p * r + 9.61812911e-3f;
  p = p * r + 5.55041087e-2f;
  p = p * r + 2.40226507e-1f;
  p = p * r + 6.93147181e-1f;
  p = p * r + 1.f;
#if defined(__AVX512F__)
  return (Floats)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  return (Floats)((Words)p + ((Words)shifted << 23));
#endif
}

#if defined(__AVX512F__)
static inline void transpose16(__m512i* r) {
  __m512i t[16];
  for (int i = 0; i < 8; i++) {
    t[2 * i] = _mm512_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm512_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  for (int i = 0; i < 4; i++) {
    r[4 * i] = _mm512_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 1] = _mm512_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    r[4 * i + 2] = _mm512_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    r[4 * i + 3] = _mm512_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}
#endif

#if defined(__AVX2__)
static inline void transpose8(__m256i* r) {
  __m256i t[8];
  for (int i = 0; i < 4; i++) {
    t[2 * i] = _mm256_unpacklo_epi32(r[2 * i], r[2 * i + 1]);
    t[2 * i + 1] = _mm256_unpackhi_epi32(r[2 * i], r[2 * i + 1]);
  }
  __m256i u[8];
  for (int i = 0; i < 2; i++) {
    u[4 * i] = _mm256_unpacklo_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 1] = _mm256_unpackhi_epi64(t[4 * i], t[4 * i + 2]);
    u[4 * i + 2] = _mm256_unpacklo_epi64(t[4 * i + 1], t[4 * i + 3]);
    u[4 * i + 3] = _mm256_unpackhi_epi64(t[4 * i + 1], t[4 * i + 3]);
  }
  for (int i = 0; i < 4; i++) {
    r[i] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x20);
    r[i + 4] = _mm256_permute2x128_si256(u[i], u[i + 4], 0x31);
  }
}
#endif

// [rows][columns] of 32-bit lanes -> [columns][rows]; rows is a multiple of WIDTH, columns is any.
static inline void transpose(const Lane* x, int64_t ldx, int64_t rows, int64_t columns, Lane* y, int64_t ldy) {
  for (int64_t i = 0; i < rows; i += WIDTH) {
    int64_t j = 0;
#if defined(__AVX512F__)
    for (; j + 16 <= columns; j += 16) {
      __m512i r[16];
      for (int k = 0; k < 16; k++) r[k] = _mm512_loadu_si512(x + (i + k) * ldx + j);
      transpose16(r);
      for (int k = 0; k < 16; k++) _mm512_storeu_si512(y + (j + k) * ldy + i, r[k]);
    }
#elif defined(__AVX2__)
    for (; j + 8 <= columns; j += 8) {
      __m256i r[8];
      for (int k = 0; k < 8; k++) r[k] = load<__m256i>(x + (i + k) * ldx + j);
      transpose8(r);
      for (int k = 0; k < 8; k++) store(y + (j + k) * ldy + i, r[k]);
    }
#endif
    for (; j < columns; j++)
      for (int k = 0; k < WIDTH; k++) y[j * ldy + i + k] = x[(i + k) * ldx + j];
  }
}

// Scratch memory, aligned to a cache line. Not std::vector: its code would be shared between instruction sets by the linker.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t count) { allocate(count); }
  void allocate(size_t count) {  // once
    size_t bytes = (count * sizeof(T) + 63) / 64 * 64 + 64;
    data_ = static_cast<T*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Buffer() { std::free(data_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  T* get() const { return data_; }
  T& operator[](int64_t i) const { return data_[i]; }
  void clear(size_t count) { std::memset(static_cast<void*>(data_), 0, count * sizeof(T)); }

 private:
  T* data_ = nullptr;
};

static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static inline int64_t round_up(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

template <class F>
static void for_each(Parallel parallel, int64_t items, const F& body) {
  parallel(items, const_cast<void*>(static_cast<const void*>(&body)),
           [](void* context, int64_t item) { (*static_cast<const F*>(context))(item); });
}

}  // namespace internlm2::INTERNLM2_ISA

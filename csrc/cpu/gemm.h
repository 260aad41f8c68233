// Small matrix products on packed blocks that stay in cache: C [M, N] float32 (+)= A [M, depth] x B [depth, N].
// A is row-major; B has one 32-bit lane a column: a float, or the bfloat16 of two successive depths ("pairs").
// So one loop nest serves all engines: load lanes of B, broadcast what meets them of A, multiply and add.
#pragma once

#include "simd.h"

namespace internlm2::INTERNLM2_ISA {

// STEPS: products of a lane, each with a 32-bit word of A.
struct Float32Engine {
  using Element = float;
  static constexpr int PER_LANE = 1, STEPS = 1;
  static inline Words part(Words b, int) { return b; }
  static inline Floats multiply_add(Floats c, Words b, Lane a) { return c + (Floats)b * (Floats)splat_lane(a); }
};

#if defined(__AVX512BF16__)
struct BFloat16Engine {
  using Element = bfloat16;
  static constexpr int PER_LANE = 2, STEPS = 1;
  static inline Words part(Words b, int) { return b; }
  static inline Floats multiply_add(Floats c, Words b, Lane a) {
    return (Floats)_mm512_dpbf16_ps((__m512)c, (__m512bh)b, (__m512bh)splat_lane(a));
  }
};
#else
// B stays bfloat16 in memory, A is float32: a pair is widened in registers, at 2 operations for 2 * rows multiply-adds.
struct BFloat16Engine : Float32Engine {
  using Element = bfloat16;
  static constexpr int PER_LANE = 2, STEPS = 2;
  static inline Words part(Words b, int step) { return step ? b & 0xffff0000u : b << 16; }
};
#endif

// 24 accumulators of the 32 registers with AVX-512, 12 of 16 elsewhere.
constexpr int TILE_ROWS = 6;
constexpr int TILE_VECTORS = WIDTH == 16 ? 4 : 2;
constexpr int PANEL = TILE_VECTORS * WIDTH;

template <class Engine, int ROWS, int VECTORS, bool ACCUMULATE>
static inline void tile(const Lane* A, int64_t lda, const Lane* B, int64_t ldb, int64_t depth, float* C, int64_t ldc) {
  Floats c[ROWS][VECTORS];
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) c[m][n] = ACCUMULATE ? load<Floats>(C + m * ldc + n * WIDTH) : Floats{};
#pragma GCC unroll 2
  for (int64_t k = 0; k < depth; k++)
#pragma GCC unroll 2
    for (int step = 0; step < Engine::STEPS; step++) {
      Words b[VECTORS];
      for (int n = 0; n < VECTORS; n++) b[n] = Engine::part(load<Words>(B + k * ldb + n * WIDTH), step);
      for (int m = 0; m < ROWS; m++) {
        const Lane a = A[m * lda + k * Engine::STEPS + step];
        for (int n = 0; n < VECTORS; n++) c[m][n] = Engine::multiply_add(c[m][n], b[n], a);
      }
    }
  for (int m = 0; m < ROWS; m++)
    for (int n = 0; n < VECTORS; n++) store(C + m * ldc + n * WIDTH, c[m][n]);
}

template <class Engine, int VECTORS, bool ACCUMULATE>
static inline void column(
    const Lane* A, int64_t lda, const Lane* B, int64_t ldb, int64_t depth, float* C, int64_t ldc, int64_t rows) {
  for (; rows >= TILE_ROWS; rows -= TILE_ROWS, A += TILE_ROWS * lda, C += TILE_ROWS * ldc)
    tile<Engine, TILE_ROWS, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
  switch (rows) {
    case 5: return tile<Engine, 5, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
    case 4: return tile<Engine, 4, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
    case 3: return tile<Engine, 3, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
    case 2: return tile<Engine, 2, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
    case 1: return tile<Engine, 1, VECTORS, ACCUMULATE>(A, lda, B, ldb, depth, C, ldc);
  }
}

// lda counts words of A, ldb and depth lanes of B; columns is a multiple of WIDTH.
template <class Engine, bool ACCUMULATE>
static inline void gemm(const Lane* A, int64_t lda, const Lane* B, int64_t ldb, int64_t depth, float* C, int64_t ldc,
                        int64_t rows, int64_t columns) {
  int64_t n = 0;
  if constexpr (TILE_VECTORS < 4) {
    // With one row or two, each sum would wait for its own last addition: eight at a time do not, and 64 columns of a row
    // of B are one run of memory. A column's sum is the same whatever stands beside it.
    if (rows == 1)
      for (; n + 8 * WIDTH <= columns; n += 8 * WIDTH) tile<Engine, 1, 8, ACCUMULATE>(A, lda, B + n, ldb, depth, C + n, ldc);
    if (rows == 2)
      for (; n + 4 * WIDTH <= columns; n += 4 * WIDTH) tile<Engine, 2, 4, ACCUMULATE>(A, lda, B + n, ldb, depth, C + n, ldc);
  }
  for (; n + PANEL <= columns; n += PANEL)
    column<Engine, TILE_VECTORS, ACCUMULATE>(A, lda, B + n, ldb, depth, C + n, ldc, rows);
  for (; n < columns; n += WIDTH) {
    if constexpr (TILE_VECTORS == 4) {
      if (n + 2 * WIDTH <= columns) {
        column<Engine, 2, ACCUMULATE>(A, lda, B + n, ldb, depth, C + n, ldc, rows);
        n += WIDTH;
        continue;
      }
    }
    column<Engine, 1, ACCUMULATE>(A, lda, B + n, ldb, depth, C + n, ldc, rows);
  }
}

// Rows of elements as the B operand whose depth is the row: two bfloat16 rows interleave into lanes, floats are lanes.
static inline void pair_rows(const float* first, const float*, int64_t n, Lane* y) { std::memcpy(y, first, n * 4); }
static inline void pair_rows(const bfloat16* first, const bfloat16* second, int64_t n, Lane* y) {
  for (int64_t i = 0; i < n; i += WIDTH) {
    Words low = __builtin_convertvector(load<Shorts>(first + i), Words);
    Words high = __builtin_convertvector(load<Shorts>(second + i), Words);
    store(y + i, low | (high << 16));
  }
}
template <class Engine>
static inline void pack_depth_rows(
    const typename Engine::Element* x, int64_t ldx, int64_t rows, int64_t columns, Lane* y, int64_t ldy) {
  constexpr int P = Engine::PER_LANE;
  for (int64_t i = 0; i < rows; i += P) pair_rows(x + i * ldx, x + (i + P - 1) * ldx, columns, y + i / P * ldy);
}

// Rows of elements transposed as the B operand whose depth is the column.
template <class Engine>
static inline void pack_depth_columns(
    const typename Engine::Element* x, int64_t ldx, int64_t rows, int64_t columns, Lane* y, int64_t ldy) {
  constexpr int P = Engine::PER_LANE;
  transpose(reinterpret_cast<const Lane*>(x), ldx / P, rows, columns / P, y, ldy);
}

}  // namespace internlm2::INTERNLM2_ISA

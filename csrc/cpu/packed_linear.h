// y = x W' with W packed once (arguments.h), bfloat16 or float32. With a few rows it is bound by reading W, in one straight
// run; with many, a chunk of rows and a block of a panel stay in L2. Each row's sums run along the inputs in one order,
// whatever rows stand beside it: its result does not depend on them.
#pragma once

#include "../common/arguments.h"
#include "gemm.h"

#include <type_traits>

namespace internlm2::INTERNLM2_ISA {

template <class Engine>
static void pack_weight(const PackWeight& a) {
  using T = typename Engine::Element;
  constexpr int64_t P = Engine::PER_LANE, N = PACKED_COLUMNS;
  const int64_t inputs = a.weight.inputs, lanes = (inputs + P - 1) / P;
  for_each(a.parallel, a.weight.panels(), [&](int64_t panel) {
    const T* x = static_cast<const T*>(a.source) + panel * N * a.row_stride;
    Lane* y = static_cast<Lane*>(a.weight.packed) + panel * lanes * N;
    const int64_t count = least(N, a.weight.outputs - panel * N);
    if (count == N && inputs % P == 0 && a.row_stride % P == 0) {
      pack_depth_columns<Engine>(x, a.row_stride, N, inputs, y, N);
      return;
    }
    Buffer<T> rows(N * lanes * P);
    rows.clear(N * lanes * P);
    for (int64_t n = 0; n < count; n++) std::memcpy(&rows[n * lanes * P], x + n * a.row_stride, inputs * sizeof(T));
    pack_depth_columns<Engine>(rows.get(), lanes * P, N, lanes * P, y, N);
  });
}

template <class Engine>
class PackedLinearKernel {
  using T = typename Engine::Element;
  static constexpr int64_t P = Engine::PER_LANE, N = PACKED_COLUMNS;
  // What a row of x is made of: the elements, or float32 where the engine multiplies in that.
  static constexpr bool WIDEN = Engine::STEPS > 1;
  using Left = std::conditional_t<WIDEN, float, T>;
  // Rows and lanes of a block: 192 KB of x, 128 KB of W; half of that, in bytes of float32, for the smaller caches and tiles
  // of processors without AVX-512.
  static constexpr int64_t FEW_ROWS = 8;
  static constexpr int64_t ROWS = 96, DEPTH = WIDTH == 16 && !WIDEN ? 512 : 256;

 public:
  explicit PackedLinearKernel(const PackedLinear& arguments) : a(arguments), lanes((a.weight.inputs + P - 1) / P) {}

  void run() {
    if (WIDEN || a.weight.inputs % P)
      copy_rows();
    else
      x = static_cast<const Left*>(a.x);
    const int64_t panels = a.weight.panels(), chunks = (a.rows + ROWS - 1) / ROWS;
    // Some neighbouring panels an item, so that each thread reads one stream of memory.
    const int64_t span = most(1, panels / (8 * a.threads)), spans = (panels + span - 1) / span;
    for_each(a.parallel, spans * chunks, [&](int64_t item) {
      const int64_t first = item / spans * ROWS, begin = item % spans * span;
      for (int64_t panel = begin; panel < least(panels, begin + span); panel++)
        multiply(panel, first, least(ROWS, a.rows - first));
    });
  }

 private:
  const PackedLinear& a;
  int64_t lanes;
  const Left* x = nullptr;
  Buffer<Left> copy;

  void copy_rows() {
    const int64_t inputs = a.weight.inputs, width = lanes * P, grain = most(1, 16384 / width);
    copy.allocate(a.rows * width);
    for_each(a.parallel, (a.rows + grain - 1) / grain, [&](int64_t item) {
      for (int64_t m = item * grain; m < least(a.rows, (item + 1) * grain); m++) {
        const T* from = static_cast<const T*>(a.x) + m * inputs;
        Left* to = &copy[m * width];
        const int64_t whole = inputs / 16 * 16;
        convert(from, whole, to);
        for (int64_t i = whole; i < width; i++) to[i] = i >= inputs ? Left(0) : WIDEN ? Left(widen_one(from[i])) : Left(from[i]);
      }
    });
    x = copy.get();
  }

  void multiply(int64_t panel, int64_t first, int64_t rows) const {
    alignas(64) float sums[ROWS * N];
    const Lane* w = static_cast<const Lane*>(a.weight.packed) + panel * lanes * N;
    if constexpr (WIDEN) {
      if (rows > FEW_ROWS) {
        multiply_widened(w, x + first * lanes * P, sums, rows);
        return write(sums, panel, first, rows);
      }
    }
    const int64_t words = lanes * Engine::STEPS;
    const Lane* left = reinterpret_cast<const Lane*>(x) + first * words;
    gemm<Engine, false>(left, words, w, N, least(DEPTH, lanes), sums, N, rows, N);
    for (int64_t d = DEPTH; d < lanes; d += DEPTH)
      gemm<Engine, true>(left + d * Engine::STEPS, words, w + d * N, N, least(DEPTH, lanes - d), sums, N, rows, N);
    write(sums, panel, first, rows);
  }

  // A block of W becomes float32 once for all rows. The sums run in the same order, so their bits are those of a few rows.
  void multiply_widened(const Lane* w, const float* left, float* sums, int64_t rows) const {
    alignas(64) Lane wide[DEPTH * N];
    std::memset(sums, 0, rows * N * sizeof(float));
    for (int64_t d = 0; d < lanes; d += DEPTH / P) {
      const int64_t depth = least(DEPTH / P, lanes - d);
      for (int64_t k = 0; k < depth; k++)
        for (int step = 0; step < P; step++)
          for (int64_t n = 0; n < N; n += WIDTH)
            store(wide + (P * k + step) * N + n, Engine::part(load<Words>(w + (d + k) * N + n), step));
      gemm<Float32Engine, true>(reinterpret_cast<const Lane*>(left) + d * P, lanes * P, wide, N, depth * P, sums, N, rows, N);
    }
  }

  void write(const float* sums, int64_t panel, int64_t first, int64_t rows) const {
    const int64_t columns = least(N, a.weight.outputs - panel * N);
    T* y = static_cast<T*>(a.y) + first * a.weight.outputs + panel * N;
    for (int64_t m = 0; m < rows; m++, y += a.weight.outputs) {
      if (columns == N) {
        convert(&sums[m * N], N, y);
      } else {
        T edge[N];
        convert(&sums[m * N], N, edge);
        std::memcpy(y, edge, columns * sizeof(T));
      }
    }
  }
};

}  // namespace internlm2::INTERNLM2_ISA

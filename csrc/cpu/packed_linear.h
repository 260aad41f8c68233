// y = x W' with W packed once (arguments.h), bfloat16 or float32. With a few rows it is bound by reading W, in one straight
// run; with many, a chunk of rows and a block of a panel stay in L2. Each row's sums run along the inputs in one order,
// whatever rows stand beside it: its result does not depend on them.
#pragma once

#include "../common/arguments.h"
#include "gemm.h"

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
  static constexpr int64_t ROWS = 96, DEPTH = 512;  // rows and lanes of a block: 192 KB of x, 128 KB of W

 public:
  explicit PackedLinearKernel(const PackedLinear& arguments) : a(arguments), lanes((a.weight.inputs + P - 1) / P) {}

  void run() {
    x = static_cast<const T*>(a.x);
    if (a.weight.inputs % P) pad_rows();
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
  const T* x = nullptr;
  Buffer<T> padded;

  void pad_rows() {
    padded.allocate(a.rows * lanes * P);
    padded.clear(a.rows * lanes * P);
    for (int64_t m = 0; m < a.rows; m++)
      std::memcpy(&padded[m * lanes * P], x + m * a.weight.inputs, a.weight.inputs * sizeof(T));
    x = padded.get();
  }

  void multiply(int64_t panel, int64_t first, int64_t rows) const {
    alignas(64) float sums[ROWS * N];
    const Lane* w = static_cast<const Lane*>(a.weight.packed) + panel * lanes * N;
    const Lane* left = reinterpret_cast<const Lane*>(x) + first * lanes;
    gemm<Engine, false>(left, lanes, w, N, least(DEPTH, lanes), sums, N, rows, N);
    for (int64_t d = DEPTH; d < lanes; d += DEPTH)
      gemm<Engine, true>(left + d, lanes, w + d * N, N, least(DEPTH, lanes - d), sums, N, rows, N);
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

// Tiles of bf16 rows in shared memory, and the loads that fill them.
#pragma once

#include "params.h"
#include "primitives.cuh"

namespace tile {

using cu::bf16;

// Element offset of 16-byte chunk `chunk` of row `row`. Rows of 64 or 128 elements span all 32 banks, so eight rows at
// one chunk would meet in four banks; the XOR spreads them over all (ldmatrix then takes 4 wavefronts, not 32).
template <int D>
__device__ __forceinline__ int swizzled(int row, int chunk) {
  static_assert(D % 64 == 0, "a row must span all banks");
  return row * D + ((chunk ^ (row & 7)) * 8);
}

// Walks down a [*, D] matrix, Rows rows at a time, copying them into a tile; zeros from row `end` on. Holds one running
// pointer: the addresses of all its copies, hoisted out of the caller's loop, would not fit into registers.
template <int D, int Rows, int Threads>
struct AsyncRows {
  static constexpr int kChunks = D / 8, kRowsAtOnce = Threads / kChunks;
  static_assert(kRowsAtOnce % 8 == 0, "the swizzle of a thread's chunk must not change from row to row");
  static_assert(Rows % kRowsAtOnce == 0);
  const bf16* source;
  int row, target;

  __device__ __forceinline__ AsyncRows(const bf16* matrix, int64_t stride, int first) {
    const int chunk = threadIdx.x % kChunks, tile_row = threadIdx.x / kChunks;
    row = first + tile_row;
    source = matrix + row * stride + chunk * 8;
    target = swizzled<D>(tile_row, chunk);
  }
  // One cp.async group is left open.
  __device__ __forceinline__ void load(bf16* shared, int64_t stride, int end) {
#pragma unroll
    for (int i = 0; i < Rows / kRowsAtOnce; i++) {
      cu::cp_async_16(shared + target + i * kRowsAtOnce * D, source, row + i * kRowsAtOnce < end);
      source += kRowsAtOnce * stride;
    }
    row += Rows;
  }
};

struct Pair {
  float low, high;
};

// Half-rotation: elements i and i + D / 2 form a pair.
__device__ __forceinline__ Pair rotate(Pair x, float cosine, float sine) {
  return {x.low * cosine - x.high * sine, x.high * cosine + x.low * sine};
}

// Eight cosines and sines from column `column` of a table row. A row beyond the table reads as NaN: a table that is too
// short shows in the result, and never as a stray load.
__device__ __forceinline__ void load_angles(const RotationTable& table, int row, int half, int column,
                                            float (&cosine)[8], float (&sine)[8]) {
  if (row >= table.rows) {
#pragma unroll
    for (int i = 0; i < 8; i++) cosine[i] = sine[i] = NAN;
    return;
  }
  const int64_t base = int64_t(row) * half + column;
#pragma unroll
  for (int i = 0; i < 8; i += 4) {
    const float4 c = *reinterpret_cast<const float4*>(table.cosine + base + i);
    const float4 s = *reinterpret_cast<const float4*>(table.sine + base + i);
    cosine[i] = c.x, cosine[i + 1] = c.y, cosine[i + 2] = c.z, cosine[i + 3] = c.w;
    sine[i] = s.x, sine[i + 1] = s.y, sine[i + 2] = s.z, sine[i + 3] = s.w;
  }
}

// Rotates eight pairs, held as bf16 pairs of neighbours in `low` (elements i) and `high` (elements i + D / 2).
__device__ __forceinline__ void rotate_chunks(uint4& low, uint4& high, const float (&cosine)[8],
                                              const float (&sine)[8]) {
  uint32_t* a = &low.x;
  uint32_t* b = &high.x;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const Pair even = rotate({cu::low_float(a[i]), cu::low_float(b[i])}, cosine[2 * i], sine[2 * i]);
    const Pair odd = rotate({cu::high_float(a[i]), cu::high_float(b[i])}, cosine[2 * i + 1], sine[2 * i + 1]);
    a[i] = cu::pack_bf16(even.low, odd.low);
    b[i] = cu::pack_bf16(even.high, odd.high);
  }
}

// Rows first .. first + Rows, rotated on the way; zeros from row `end` on. Row r of the matrix has row table_row + r of
// the table.
template <int D, int Rows, int Threads>
__device__ __forceinline__ void load_rotated(bf16* shared, const bf16* global, int64_t stride,
                                             const RotationTable& table, int table_row, int first, int end) {
  constexpr int kChunks = D / 16;  // of half a row
  static_assert(Rows * kChunks % Threads == 0);
#pragma unroll 1  // unrolled, the angles alone would take more registers than there are
  for (int i = 0; i < Rows * kChunks / Threads; i++) {
    const int item = i * Threads + threadIdx.x, chunk = item % kChunks, line = item / kChunks;
    // Eight lanes store together. With 64 columns they fill half of two rows, which the swizzle keeps in different
    // banks when the rows lie four apart.
    const int row = D == 64 ? (line & ~7) | (line & 1) << 2 | (line >> 1 & 3) : line;
    uint4 low = {0, 0, 0, 0}, high = {0, 0, 0, 0};
    if (first + row < end) {
      const bf16* source = global + (first + row) * stride + chunk * 8;
      low = *reinterpret_cast<const uint4*>(source);
      high = *reinterpret_cast<const uint4*>(source + D / 2);
      float cosine[8], sine[8];
      load_angles(table, table_row + first + row, D / 2, chunk * 8, cosine, sine);
      rotate_chunks(low, high, cosine, sine);
    }
    cu::store_shared(reinterpret_cast<uint4*>(shared + swizzled<D>(row, chunk)), low);
    cu::store_shared(reinterpret_cast<uint4*>(shared + swizzled<D>(row, chunk + kChunks)), high);
  }
}

// Where this lane points ldmatrix at column 0 of a tile whose rows start at `row`; `Transposed` as for load_b. Column
// 16 * k is then an XOR away, since the swizzle only flips chunk bits, and 16 rows further is an addition.
template <int D, bool RowsFirst>
__device__ __forceinline__ int lane_offset(int row) {
  const int lane = threadIdx.x % 32;
  return RowsFirst ? swizzled<D>(row + lane % 16, lane / 16)
                   : swizzled<D>(row + lane / 16 * 8 + lane % 8, lane / 8 % 2);
}

// A fragment (16 rows, 16 columns from 16 * k) of a row-major tile; offset = lane_offset<D, true>(first row).
template <int D>
__device__ __forceinline__ void load_a(uint32_t (&a)[4], const bf16* shared, int offset, int k) {
  cu::ldmatrix_x4(a, shared + (offset ^ k * 16));
}

// Two B fragments for A * tile^T: the tile's rows `row` .. `row + 15` are columns of B, its columns 16 * k .. are B's
// rows. b[0], b[1] belong to rows row .. row + 7, b[2], b[3] to the next eight. offset = lane_offset<D, false>(0).
template <int D>
__device__ __forceinline__ void load_b_of_transpose(uint32_t (&b)[4], const bf16* shared, int offset, int row, int k) {
  cu::ldmatrix_x4(b, shared + row * D + (offset ^ k * 16));
}

// Two B fragments for A * tile: the tile's rows `row` .. `row + 15` are B's rows, its columns 16 * n .. B's columns.
// offset = lane_offset<D, true>(0).
template <int D>
__device__ __forceinline__ void load_b(uint32_t (&b)[4], const bf16* shared, int offset, int row, int n) {
  cu::ldmatrix_x4_transposed(b, shared + row * D + (offset ^ n * 16));
}

// Writes 16 rows of accumulators as bf16: through 16 rows of shared memory that this warp alone uses, so that global
// stores are whole 16-byte chunks. `factor` scales row g and row g + 8.
template <int D>
__device__ __forceinline__ void store_accumulators(bf16* shared, int shared_row, const float (&x)[D / 8][4],
                                                   const float (&factor)[2], bf16* global, int64_t stride, int first,
                                                   int end) {
  const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
#pragma unroll
  for (int j = 0; j < D / 8; j++)
#pragma unroll
    for (int i = 0; i < 2; i++)
      cu::store_shared(reinterpret_cast<uint32_t*>(shared + swizzled<D>(shared_row + g + i * 8, j) + 2 * t),
                       cu::pack_bf16(x[j][2 * i] * factor[i], x[j][2 * i + 1] * factor[i]));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 16 * D / 8 / 32; i++) {
    const int item = i * 32 + lane, row = item / (D / 8), chunk = item % (D / 8);
    const uint4 value = cu::load_shared(reinterpret_cast<const uint4*>(shared + swizzled<D>(shared_row + row, chunk)));
    if (first + row < end) *reinterpret_cast<uint4*>(global + (first + row) * stride + chunk * 8) = value;
  }
}

// Gradient with respect to the rows before rotation, in place, on accumulators of rows `row` and `row + 8`.
template <int D>
__device__ __forceinline__ void rotate_back(float (&x)[D / 8][4], const RotationTable& table, int table_row) {
  const int t = threadIdx.x % 4;
#pragma unroll
  for (int i = 0; i < 2; i++) {
    const int row = min(table_row + i * 8, table.rows - 1);  // rows past the sequence are not stored
#pragma unroll
    for (int j = 0; j < D / 16; j++) {
      const int64_t base = int64_t(row) * (D / 2) + j * 8 + 2 * t;
      const float2 c = *reinterpret_cast<const float2*>(table.cosine + base);
      const float2 s = *reinterpret_cast<const float2*>(table.sine + base);
      const Pair even = rotate({x[j][2 * i], x[j + D / 16][2 * i]}, c.x, -s.x);
      const Pair odd = rotate({x[j][2 * i + 1], x[j + D / 16][2 * i + 1]}, c.y, -s.y);
      x[j][2 * i] = even.low, x[j + D / 16][2 * i] = even.high;
      x[j][2 * i + 1] = odd.low, x[j + D / 16][2 * i + 1] = odd.high;
    }
  }
}

}  // namespace tile

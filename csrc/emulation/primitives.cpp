// Warp instructions of the emulation, with the fragment layouts of the PTX ISA ("Matrix fragments for mma.m16n8k16",
// "ldmatrix"). Lane l has group g = l / 4 and place t = l % 4.
#include "primitives.h"

namespace {

struct ShuffleIn {
  float value;
  int source;
};

float shuffle(const char* operation, float value, int source) {
  return emulation::collective<float>(operation, ShuffleIn{value, source}, [](emulation::Warp& warp) {
    for (int lane = 0; lane < emulation::kLanes; lane++) {
      const int source = emulation::deposited<ShuffleIn>(warp, lane).source;
      emulation::deliver(warp, lane, emulation::deposited<ShuffleIn>(warp, source & 31).value);
    }
  });
}

void require_full_mask(unsigned mask) {
  if (mask != 0xFFFFFFFFu) emulation::fail("a shuffle with a partial mask is not emulated");
}

struct MmaIn {
  uint32_t a[4], b[2];
  float c[4];
};
struct MmaOut {
  float d[4];
};

void multiply(emulation::Warp& warp) {
  alignas(64) float a[16][16], b[16][8], c[16][8];
  for (int lane = 0; lane < emulation::kLanes; lane++) {
    const auto in = emulation::deposited<MmaIn>(warp, lane);
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; i++) {  // a0: (g, 2t), a1: (g+8, 2t), a2: (g, 2t+8), a3: (g+8, 2t+8)
      const int row = g + (i & 1) * 8, column = 2 * t + (i >> 1) * 8;
      a[row][column] = cu::low_float(in.a[i]);
      a[row][column + 1] = cu::high_float(in.a[i]);
    }
    for (int i = 0; i < 2; i++) {  // b0: k = 2t, b1: k = 2t+8, both column g
      const int k = 2 * t + i * 8;
      b[k][g] = cu::low_float(in.b[i]);
      b[k + 1][g] = cu::high_float(in.b[i]);
    }
    for (int i = 0; i < 4; i++) c[g + (i >> 1) * 8][2 * t + (i & 1)] = in.c[i];
  }
  for (int m = 0; m < 16; m++)
    for (int k = 0; k < 16; k++)
      for (int n = 0; n < 8; n++) c[m][n] += a[m][k] * b[k][n];
  for (int lane = 0; lane < emulation::kLanes; lane++) {
    const int g = lane / 4, t = lane % 4;
    MmaOut out;
    for (int i = 0; i < 4; i++) out.d[i] = c[g + (i >> 1) * 8][2 * t + (i & 1)];
    emulation::deliver(warp, lane, out);
  }
  warp.counters.mma++;
}

struct Matrices {
  uint32_t r[4];
};

// Rows of matrix m come from the addresses of lanes 8m .. 8m+7. Each matrix is one pass over the banks when its eight
// 16-byte rows fall into eight different 16-byte columns of the 128 bytes that the banks span.
template <bool Transposed>
void load_matrices(emulation::Warp& warp) {
  uint32_t offset[emulation::kLanes];
  for (int lane = 0; lane < emulation::kLanes; lane++) offset[lane] = emulation::deposited<uint32_t>(warp, lane);
  emulation::Fiber& fiber = emulation::current_fiber();
  for (int m = 0; m < 4; m++) {
    int uses[8] = {}, most = 0;
    for (int row = 0; row < 8; row++) most = std::max(most, ++uses[offset[8 * m + row] >> 4 & 7]);
    warp.counters.ldmatrix_wavefronts += most;
  }
  warp.counters.ldmatrix++;
  for (uint32_t row : offset) emulation::note_read(fiber, row, 16, true);
  for (int lane = 0; lane < emulation::kLanes; lane++) {
    Matrices out;
    for (int m = 0; m < 4; m++) {
      uint16_t element[2];
      for (int j = 0; j < 2; j++) {
        const int row = Transposed ? 2 * (lane % 4) + j : lane / 4, column = Transposed ? lane / 4 : 2 * (lane % 4) + j;
        memcpy(&element[j], fiber.block->shared + offset[8 * m + row] + 2 * column, 2);
      }
      out.r[m] = element[0] | uint32_t(element[1]) << 16;
    }
    emulation::deliver(warp, lane, out);
  }
}

}  // namespace

void __syncwarp() {
  emulation::collective<int>("__syncwarp", 0, [](emulation::Warp& warp) {
    warp.sync_epoch++;
    memset(warp.out, 0, sizeof warp.out);
  });
}

float __shfl_xor_sync(unsigned mask, float value, int lane_mask) {
  require_full_mask(mask);
  return shuffle("__shfl_xor_sync", value, static_cast<int>(emulation::current_fiber().lane) ^ lane_mask);
}

float __shfl_sync(unsigned mask, float value, int source_lane) {
  require_full_mask(mask);
  return shuffle("__shfl_sync", value, source_lane);
}

namespace cu {

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  MmaIn in{{a[0], a[1], a[2], a[3]}, {b0, b1}, {d[0], d[1], d[2], d[3]}};
  const auto out = emulation::collective<MmaOut>("mma.m16n8k16", in, multiply);
  memcpy(d, out.d, sizeof out.d);
}

void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  const auto offset = static_cast<uint32_t>(emulation::shared_offset(row, 16, "ldmatrix"));
  const auto out = emulation::collective<Matrices>("ldmatrix", offset, load_matrices<false>);
  memcpy(r, out.r, sizeof out.r);
}

void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row) {
  const auto offset = static_cast<uint32_t>(emulation::shared_offset(row, 16, "ldmatrix.trans"));
  const auto out = emulation::collective<Matrices>("ldmatrix.trans", offset, load_matrices<true>);
  memcpy(r, out.r, sizeof out.r);
}

}  // namespace cu

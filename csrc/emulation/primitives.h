// The CUDA words and the cu:: primitives of csrc/cuda/primitives.cuh for a CPU compiler. See runtime.h.
#pragma once

#include <algorithm>
#include <cmath>

#include "runtime.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
#define __grid_constant__
#define __align__(n) alignas(n)

#define threadIdx (emulation::current_fiber().index)
#define blockIdx (emulation::current_block()->index)
#define blockDim (emulation::current_block()->block_size)
#define gridDim (emulation::current_block()->grid_size)

using cudaStream_t = void*;
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
inline float2 make_float2(float x, float y) {
  return {x, y};
}
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
  return {x, y, z, w};
}
inline int min(int a, int b) {
  return a < b ? a : b;
}
inline int max(int a, int b) {
  return a > b ? a : b;
}

inline void __syncthreads(int line = __builtin_LINE()) {
  emulation::block_barrier(line);
}
void __syncwarp();
float __shfl_xor_sync(unsigned mask, float value, int lane_mask);
float __shfl_sync(unsigned mask, float value, int source_lane);
// Selects four of the eight bytes {b, a}; without the sign-replication mode.
inline uint32_t __byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
  const uint64_t bytes = uint64_t(b) << 32 | a;
  uint32_t result = 0;
  for (int i = 0; i < 4; i++) result |= uint32_t(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xFF) << (8 * i);
  return result;
}
inline float __uint_as_float(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t __float_as_uint(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

namespace cu {

struct bf16 {
  uint16_t bits;
};
inline float to_float(bf16 x) {
  return __uint_as_float(uint32_t(x.bits) << 16);
}
inline bf16 to_bf16(float x) {  // round to nearest even, as cvt.rn.bf16.f32
  const uint32_t bits = __float_as_uint(x);
  if ((bits & 0x7FFFFFFF) > 0x7F800000) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFF + (bits >> 16 & 1)) >> 16)};
}
inline float low_float(uint32_t pair) {
  return __uint_as_float(pair << 16);
}
inline float high_float(uint32_t pair) {
  return __uint_as_float(pair & 0xFFFF0000u);
}
inline uint32_t pack_bf16(float low, float high) {
  return to_bf16(low).bits | uint32_t(to_bf16(high).bits) << 16;
}
inline uint32_t subtract_bf16x2(uint32_t a, uint32_t b) {
  return pack_bf16(low_float(a) - low_float(b), high_float(a) - high_float(b));
}
inline float exp2_approximate(float x) {
  return std::exp2(x);
}
inline float log2_approximate(float x) {
  return std::log2(x);
}

void mma_bf16(float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1);
void ldmatrix_x4(uint32_t (&r)[4], const void* row);
void ldmatrix_x4_transposed(uint32_t (&r)[4], const void* row);

inline void cp_async_16(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 16, valid);
}
inline void cp_async_4(void* shared, const void* global, bool valid) {
  emulation::copy_async(shared, global, 4, valid);
}
inline void cp_async_commit() {
  emulation::copy_commit();
}
template <int N>
void cp_async_wait() {
  emulation::copy_wait(N);
}

template <class T>
T load_shared(const T* pointer, int line = __builtin_LINE()) {
  emulation::Fiber& fiber = emulation::current_fiber();
  const size_t offset = emulation::shared_offset(pointer, sizeof(T), "shared load");
  emulation::note_read(fiber, offset, sizeof(T), false);
  emulation::note_access(fiber, offset, sizeof(T), line);
  return *pointer;
}
template <class T>
void store_shared(T* pointer, const T& value, int line = __builtin_LINE()) {
  emulation::Fiber& fiber = emulation::current_fiber();
  const size_t offset = emulation::shared_offset(pointer, sizeof(T), "shared store");
  emulation::note_write(fiber, offset, sizeof(T), false);
  emulation::note_access(fiber, offset, sizeof(T), line);
  *pointer = value;
}
template <class T>
T load_streaming(const T* pointer) {
  return *pointer;
}

template <class T>
T* dynamic_shared() {
  return reinterpret_cast<T*>(emulation::current_block()->shared);
}

template <auto Kernel, class Params>
void launch(dim3 grid, int threads, int shared_bytes, cudaStream_t, const Params& params) {
  emulation::launch([&] { Kernel(params); }, grid, dim3(threads), shared_bytes);
}

}  // namespace cu

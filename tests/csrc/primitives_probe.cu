// One kernel for each primitive of csrc/cuda/primitives.cuh: 32 lanes, kIn words in and kOut words out for each. Built
// twice, by g++ on the emulation and by nvcc, and called through ctypes, so that the two can be held against each
// other.
#include "../../csrc/cuda/primitives.cuh"

#include <cstdio>
#include <cstring>
#include <exception>

namespace {

constexpr int kIn = 12, kOut = 4;  // 48 bytes in: each lane's words start where a 16-byte copy may

struct ProbeParams {
  const uint32_t* in;
  uint32_t* out;
};

using Body = void (*)(const ProbeParams&, const uint32_t (&)[kIn], uint32_t (&)[kOut]);

template <Body body>
__global__ void __launch_bounds__(32) probe_kernel(const __grid_constant__ ProbeParams p) {
  uint32_t in[kIn], out[kOut] = {};
  for (int i = 0; i < kIn; i++) in[i] = p.in[threadIdx.x * kIn + i];
  body(p, in, out);
  for (int i = 0; i < kOut; i++) p.out[threadIdx.x * kOut + i] = out[i];
}

#define PROBE(name)                                                                                       \
  __device__ void name([[maybe_unused]] const ProbeParams& p, [[maybe_unused]] const uint32_t (&in)[kIn], \
                       uint32_t (&out)[kOut])

PROBE(mma_bf16) {
  const uint32_t a[4] = {in[0], in[1], in[2], in[3]};
  float d[4];
  for (int i = 0; i < 4; i++) d[i] = __uint_as_float(in[6 + i]);
  cu::mma_bf16(d, a, in[4], in[5]);
  for (int i = 0; i < 4; i++) out[i] = __float_as_uint(d[i]);
}

// Lane l stores its four words as row l and points ldmatrix at row (in[4] + l) % 32, which the caller may shift.
template <bool Transposed>
__device__ void load_matrices(const uint32_t (&in)[kIn], uint32_t (&out)[kOut]) {
  uint4* rows = cu::dynamic_shared<uint4>();
  cu::store_shared(rows + threadIdx.x, make_uint4(in[0], in[1], in[2], in[3]));
  __syncwarp();
  if (Transposed) {
    cu::ldmatrix_x4_transposed(out, rows + (in[4] + threadIdx.x) % 32);
  } else {
    cu::ldmatrix_x4(out, rows + (in[4] + threadIdx.x) % 32);
  }
}
PROBE(ldmatrix) {
  load_matrices<false>(in, out);
}
PROBE(ldmatrix_transposed) {
  load_matrices<true>(in, out);
}

// in[4] says which copies are valid; an invalid one brings zeros. Lanes read their neighbour's copy.
PROBE(cp_async) {
  uint4* shared = cu::dynamic_shared<uint4>();
  uint32_t* words = reinterpret_cast<uint32_t*>(shared + 32);
  cu::cp_async_16(shared + threadIdx.x, p.in + threadIdx.x * kIn, in[4] % 2 == 0);
  cu::cp_async_commit();
  cu::cp_async_4(words + threadIdx.x, p.in + threadIdx.x * kIn + 5, in[4] % 4 < 2);
  cu::cp_async_commit();
  cu::cp_async_wait<1>();
  __syncwarp();
  const uint4 value = cu::load_shared(shared + (threadIdx.x + 1) % 32);
  out[0] = value.x, out[1] = value.y, out[2] = value.w;
  cu::cp_async_wait<0>();
  __syncwarp();
  out[3] = cu::load_shared(words + (threadIdx.x + 1) % 32);
}

PROBE(bf16_pairs) {
  out[0] = cu::pack_bf16(__uint_as_float(in[0]), __uint_as_float(in[1]));
  out[1] = __float_as_uint(cu::low_float(in[2]));
  out[2] = __float_as_uint(cu::high_float(in[2]));
  out[3] = cu::subtract_bf16x2(in[2], in[3]);
}
PROBE(bf16_scalars) {
  const cu::bf16 rounded = cu::to_bf16(__uint_as_float(in[0]));
  out[0] = __float_as_uint(cu::to_float(rounded));
  uint16_t bits;
  memcpy(&bits, &rounded, 2);
  out[1] = bits;
}
PROBE(exponentials) {
  out[0] = __float_as_uint(cu::exp2_approximate(__uint_as_float(in[0])));
  out[1] = __float_as_uint(cu::log2_approximate(__uint_as_float(in[1])));
}
PROBE(byte_permutation) {
  out[0] = __byte_perm(in[0], in[1], in[2] & 0x7777);
}
PROBE(shuffles) {
  const float value = __uint_as_float(in[0]);
  out[0] = __float_as_uint(__shfl_xor_sync(~0u, value, 1));
  out[1] = __float_as_uint(__shfl_xor_sync(~0u, value, 2));
  out[2] = __float_as_uint(__shfl_xor_sync(~0u, value, 16));
  out[3] = __float_as_uint(__shfl_sync(~0u, value, in[1] % 32));
}
PROBE(streaming_load) {
  const uint4 value = cu::load_streaming(reinterpret_cast<const uint4*>(p.in + (threadIdx.x ^ 5) * kIn));
  out[0] = value.x, out[1] = value.y, out[2] = value.z, out[3] = value.w;
}

using Launch = void (*)(const ProbeParams&);
template <Body body>
void run(const ProbeParams& p) {
  cu::launch<probe_kernel<body>>(dim3(1), 32, 1024, cudaStream_t{}, p);
}
#define ENTRY(name) {#name, run<name>}
constexpr struct {
  const char* name;
  Launch launch;
} kProbes[] = {ENTRY(mma_bf16),   ENTRY(ldmatrix),      ENTRY(ldmatrix_transposed), ENTRY(cp_async),
               ENTRY(bf16_pairs), ENTRY(bf16_scalars),  ENTRY(exponentials),        ENTRY(byte_permutation),
               ENTRY(shuffles),   ENTRY(streaming_load)};

}  // namespace

// 0: done. Otherwise `message` (256 bytes) says what went wrong. `in` and `out` lie in host memory.
extern "C" __attribute__((visibility("default"))) int probe(const char* name, const uint32_t* in, uint32_t* out,
                                                            char* message) {
  for (const auto& entry : kProbes) {
    if (strcmp(entry.name, name) != 0) continue;
#ifdef __CUDACC__
    uint32_t* device = nullptr;
    cudaMalloc(&device, 32 * (kIn + kOut) * 4);
    cudaMemcpy(device, in, 32 * kIn * 4, cudaMemcpyHostToDevice);
    entry.launch({device, device + 32 * kIn});
    cudaMemcpy(out, device + 32 * kIn, 32 * kOut * 4, cudaMemcpyDeviceToHost);
    cudaFree(device);
    const cudaError_t error = cudaGetLastError();
    snprintf(message, 256, "%s", cudaGetErrorString(error));
    return error == cudaSuccess ? 0 : 1;
#else
    try {
      entry.launch({in, out});
      return 0;
    } catch (const std::exception& error) {
      snprintf(message, 256, "%s", error.what());
      return 1;
    }
#endif
  }
  snprintf(message, 256, "no probe is called %s", name);
  return 1;
}

// Where the bindings run: a CUDA device and torch's current stream, or, for the tests, the CPU emulation of the
// kernels.
#pragma once

#include <torch/csrc/stable/tensor.h>

#ifdef INTERNLM2_EMULATION
using cudaStream_t = void*;

struct OnDevice {
  cudaStream_t stream = nullptr;
  explicit OnDevice(const torch::stable::Tensor&) {}
  static bool holds(const torch::stable::Tensor& x) { return x.is_cpu(); }
  static constexpr const char* name = "CPU";
  int multiprocessors() const { return 4; }  // few, so that small cases already split the cache
  void check_launch(const char*) const {}    // the emulation throws
};

#else
#include <cuda_runtime_api.h>
#include <torch/csrc/stable/accelerator.h>

// Lives in libtorch_cuda.so alone, which this library does not name: a CPU torch must be able to load it as well.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

struct OnDevice {
  torch::stable::accelerator::DeviceGuard guard;
  int device;
  cudaStream_t stream = nullptr;

  explicit OnDevice(const torch::stable::Tensor& x) : guard(x.get_device_index()), device(x.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this torch has no CUDA: the CUDA kernels cannot run.");
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
  }
  static bool holds(const torch::stable::Tensor& x) { return x.is_cuda(); }
  static constexpr const char* name = "CUDA";
  int multiprocessors() const {
    int count = 0;
    cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    return count > 0 ? count : 108;
  }
  void check_launch(const char* operation) const {
    const cudaError_t error = cudaGetLastError();
    STD_TORCH_CHECK(error == cudaSuccess, operation, ": ", cudaGetErrorString(error), ".");
  }
};
#endif

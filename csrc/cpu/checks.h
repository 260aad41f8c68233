// What the bindings ask of their arguments before memory is touched.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <string>

#include "../common/quantized.h"

namespace internlm2 {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline std::string shape(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); i++) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

inline Dtype float_dtype(const char* name, const Tensor& x) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::BFloat16 || type == ScalarType::Float, name, " must be bfloat16 or float32.");
  return type == ScalarType::Float ? Dtype::float32 : Dtype::bfloat16;
}

inline void check_head_dim(const char* name, int64_t dim) {
  STD_TORCH_CHECK(dim % 16 == 0 && dim > 0 && dim <= 256, name, ": head_dim must be a multiple of 16 up to 256, got ", dim,
                  ".");
}

inline void check_plain(const char* name, const Tensor& x, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == type && x.is_contiguous(), name, " must be a contiguous ", type_name,
                  " CPU tensor.");
}

inline void check_bits(const char* name, int64_t bits) {
  STD_TORCH_CHECK(bits == 4 || bits == 8, name, ": bits must be 4 or 8, got ", bits, ".");
}

inline QuantizedWeight quantized_weight(const char* name, const Tensor& packed, const Tensor& scales, const Tensor& zeros,
                                            int64_t bits, int64_t out_features, int64_t in_features) {
  check_bits(name, bits);
  QuantizedWeight w{nullptr, nullptr, nullptr, bits, out_features, in_features};
  STD_TORCH_CHECK(out_features > 0 && in_features > 0, name, ": the weight must not be empty.");
  check_plain((std::string(name) + ": packed").c_str(), packed, ScalarType::Byte, "uint8");
  check_plain((std::string(name) + ": scales").c_str(), scales, ScalarType::BFloat16, "bfloat16");
  check_plain((std::string(name) + ": zeros").c_str(), zeros, ScalarType::Byte, "uint8");
  const bool fits = packed.dim() == 3 && packed.size(0) == w.tiles() && packed.size(1) == w.groups() &&
                    packed.size(2) == quantized_bytes(bits) && scales.numel() == w.tiles() * w.groups() * 16 &&
                    (zeros.numel() == 0 || zeros.numel() == scales.numel());
  STD_TORCH_CHECK(fits, name, ": packed ", shape(packed), ", scales ", shape(scales), " and zeros ", shape(zeros),
                  " are not a weight of ", out_features, " x ", in_features, " in ", bits, " bits.");
  w.packed = static_cast<uint8_t*>(packed.data_ptr());
  w.scales = static_cast<uint16_t*>(scales.data_ptr());
  w.zeros = zeros.numel() ? static_cast<uint8_t*>(zeros.data_ptr()) : nullptr;
  return w;
}

}  // namespace internlm2

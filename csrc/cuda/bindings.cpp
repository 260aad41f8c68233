// The CUDA kernels as torch operators, on torch's stable ABI: built without CUDA torch, loaded by any torch >= 2.10
// that has it. Schemas live in internlm2/ops/schemas.py. Shapes, dtypes, devices and alignment are checked here before
// a kernel is launched; lengths and offsets lie on the device and are trusted, since reading them would stall the
// stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "device.h"
#include "params.h"

extern "C" {
void rotate_launch(const RotateParams&, cudaStream_t);
void attention_forward_launch(const AttentionForwardParams&, cudaStream_t);
void attention_backward_launch(const AttentionBackwardParams&, cudaStream_t);
void quantized_linear_launch(const QuantizedLinearParams&, cudaStream_t);
void dequantize_launch(const DequantizeParams&, cudaStream_t);
void decode_attention_launch(const DecodeAttentionParams&, cudaStream_t);
int32_t decode_attention_splits(int32_t batch, int32_t kv_heads, int32_t queries_per_group, int32_t capacity,
                                int32_t multiprocessors);
}

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::string shape(const Tensor& x) {
  std::string text = "[";
  for (int64_t i = 0; i < x.dim(); i++) text += (i ? ", " : "") + std::to_string(x.size(i));
  return text + "]";
}

void check_place(const char* name, const Tensor& x, ScalarType type, const char* type_name) {
  STD_TORCH_CHECK(OnDevice::holds(x) && x.scalar_type() == type, name, " must be ", type_name, " on ", OnDevice::name,
                  ".");
}

void check_plain(const char* name, const Tensor& x, ScalarType type, const char* type_name) {
  check_place(name, x, type, type_name);
  STD_TORCH_CHECK(x.is_contiguous(), name, " must be contiguous.");
}

void check_head_dim(const char* operation, int64_t dim) {
  STD_TORCH_CHECK(dim == 64 || dim == 128, operation, ": the CUDA kernels take head_dim 64 and 128, got ", dim, ".");
}

// Kernels move 16 bytes at a time.
void check_rows(const char* name, const Tensor& x) {
  bool aligned = reinterpret_cast<uintptr_t>(x.data_ptr()) % 16 == 0 && x.stride(x.dim() - 1) == 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) aligned &= x.size(i) <= 1 || x.stride(i) % 8 == 0;
  STD_TORCH_CHECK(aligned, name,
                  ": the last dimension must be contiguous and each row must start at a multiple of 16 bytes: ",
                  "call .contiguous() on it.");
}

template <class T>
T* pointer(const Tensor& x) {
  return static_cast<T*>(x.data_ptr());
}

// What forward and backward share.
struct Attention {
  GroupedQkv qkv;
  RotationTable table;
  const int32_t* cu_seqlens;
  int32_t sequences, tokens, max_seqlen, kv_heads, queries, dim;

  int32_t heads() const { return kv_heads * queries; }
};

Attention attention_arguments(const char* operation, const Tensor& qkv, const Tensor& cos, const Tensor& sin,
                              const Tensor& cu_seqlens, const std::optional<Tensor>& table_offsets,
                              int64_t max_seqlen) {
  const std::string prefix = std::string(operation) + ": ";
  check_place((prefix + "qkv").c_str(), qkv, ScalarType::BFloat16, "bfloat16");
  STD_TORCH_CHECK(qkv.dim() == 4 && qkv.size(2) >= 3, operation,
                  ": qkv must be [tokens, kv_heads, queries + 2, head_dim], got ", shape(qkv), ".");
  check_head_dim(operation, qkv.size(3));
  check_rows((prefix + "qkv").c_str(), qkv);
  const int64_t half = qkv.size(3) / 2;
  check_plain((prefix + "cos").c_str(), cos, ScalarType::Float, "float32");
  check_plain((prefix + "sin").c_str(), sin, ScalarType::Float, "float32");
  STD_TORCH_CHECK(
      cos.dim() == 2 && sin.dim() == 2 && cos.size(1) == half && sin.size(1) == half && sin.size(0) == cos.size(0),
      operation, ": cos and sin must be [positions, ", half, "], got ", shape(cos), " and ", shape(sin), ".");
  check_rows((prefix + "cos").c_str(), cos);
  check_rows((prefix + "sin").c_str(), sin);
  check_plain((prefix + "cu_seqlens").c_str(), cu_seqlens, ScalarType::Int, "int32");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, operation, ": cu_seqlens must be [sequences + 1].");
  const int64_t sequences = cu_seqlens.size(0) - 1;
  STD_TORCH_CHECK(sequences > 0 || qkv.size(0) == 0, operation, ": cu_seqlens names no sequence, but qkv has ",
                  qkv.size(0), " tokens.");
  STD_TORCH_CHECK(sequences <= 65535, operation, ": at most 65535 sequences a call, got ", sequences, ".");
  STD_TORCH_CHECK(qkv.size(1) * (qkv.size(2) - 2) <= 65535, operation, ": at most 65535 heads.");
  if (table_offsets.has_value()) {
    check_plain((prefix + "table_offsets").c_str(), *table_offsets, ScalarType::Int, "int32");
    STD_TORCH_CHECK(table_offsets->dim() == 1 && table_offsets->size(0) == sequences, operation,
                    ": table_offsets must be [", sequences, "], one a sequence.");
  } else {
    STD_TORCH_CHECK(max_seqlen <= cos.size(0) || qkv.size(0) <= cos.size(0), operation, ": the cos/sin table has ",
                    cos.size(0), " rows, but max_seqlen is ", max_seqlen, ": build a longer table.");
  }
  STD_TORCH_CHECK(cos.size(0) > 0 || qkv.size(0) == 0, operation, ": the cos/sin table has no rows.");
  STD_TORCH_CHECK(max_seqlen >= 0 && (max_seqlen > 0 || qkv.size(0) == 0), operation, ": max_seqlen is ", max_seqlen,
                  ".");
  Attention a{};
  a.qkv = {qkv.data_ptr(), qkv.stride(0), qkv.stride(1), qkv.stride(2)};
  a.table = {pointer<const float>(cos), pointer<const float>(sin),
             table_offsets.has_value() ? pointer<const int32_t>(*table_offsets) : nullptr, (int32_t)cos.size(0)};
  a.cu_seqlens = pointer<const int32_t>(cu_seqlens);
  a.sequences = (int32_t)sequences, a.tokens = (int32_t)qkv.size(0);
  a.max_seqlen = (int32_t)(max_seqlen < qkv.size(0) ? max_seqlen : qkv.size(0));
  a.kv_heads = (int32_t)qkv.size(1), a.queries = (int32_t)qkv.size(2) - 2, a.dim = (int32_t)qkv.size(3);
  return a;
}

// Rotated copy [heads, T, D] of `slots` slots of each group.
Tensor rotated(const Attention& a, const Tensor& qkv, int32_t first_slot, int32_t slots, cudaStream_t stream) {
  Tensor target = torch::stable::new_empty(qkv, {a.kv_heads * slots, a.tokens, a.dim});
  rotate_launch(
      {a.qkv, first_slot, slots, target.data_ptr(), a.table, a.cu_seqlens, a.sequences, a.tokens, a.kv_heads, a.dim},
      stream);
  return target;
}

std::tuple<Tensor, Tensor> rope_attention_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens,
                                                  std::optional<Tensor> table_offsets, int64_t max_seqlen,
                                                  double scale) {
  const Attention a = attention_arguments("rope_attention", qkv, cos, sin, cu_seqlens, table_offsets, max_seqlen);
  const OnDevice place(qkv);
  Tensor out = torch::stable::new_empty(qkv, {a.tokens, a.heads(), a.dim});
  Tensor lse = torch::stable::new_empty(qkv, {a.heads(), a.tokens}, ScalarType::Float);
  const Tensor keys = rotated(a, qkv, a.queries, 1, place.stream);
  attention_forward_launch({a.qkv, keys.data_ptr(), out.data_ptr(), pointer<float>(lse), a.table, a.cu_seqlens,
                            a.sequences, a.tokens, a.max_seqlen, a.kv_heads, a.queries, a.dim, (float)scale},
                           place.stream);
  place.check_launch("rope_attention");
  return {out, lse};
}

Tensor rope_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cos, Tensor sin,
                               Tensor cu_seqlens, std::optional<Tensor> table_offsets, int64_t max_seqlen,
                               double scale) {
  const char* operation = "rope_attention_backward";
  const Attention a = attention_arguments(operation, qkv, cos, sin, cu_seqlens, table_offsets, max_seqlen);
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"rope_attention_backward: grad_out", grad_out},
                                {"rope_attention_backward: out", out}}) {
    check_plain(name, x, ScalarType::BFloat16, "bfloat16");
    check_rows(name, x);
    STD_TORCH_CHECK(x.dim() == 3 && x.size(0) == a.tokens && x.size(1) == a.heads() && x.size(2) == a.dim, name,
                    " must be [", a.tokens, ", ", a.heads(), ", ", a.dim, "], got ", shape(x), ".");
  }
  check_plain("rope_attention_backward: lse", lse, ScalarType::Float, "float32");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == a.heads() && lse.size(1) == a.tokens, operation, ": lse must be [",
                  a.heads(), ", ", a.tokens, "], got ", shape(lse), ".");
  const OnDevice place(qkv);
  Tensor grad_qkv = torch::stable::new_empty(qkv, {a.tokens, a.kv_heads, a.queries + 2, a.dim});
  const Tensor delta = torch::stable::new_empty(qkv, {a.heads(), a.tokens}, ScalarType::Float);
  const Tensor queries = rotated(a, qkv, 0, a.queries, place.stream),
               keys = rotated(a, qkv, a.queries, 1, place.stream);
  attention_backward_launch(
      {a.qkv, queries.data_ptr(), keys.data_ptr(), out.data_ptr(), grad_out.data_ptr(), pointer<const float>(lse),
       pointer<float>(delta), grad_qkv.data_ptr(), a.table, a.cu_seqlens, a.sequences, a.tokens, a.max_seqlen,
       a.kv_heads, a.queries, a.dim, (float)scale},
      place.stream);
  place.check_launch(operation);
  return grad_qkv;
}

KvCache cache_argument(const char* name, const Tensor& x, int64_t batch, int64_t dim) {
  check_place(name, x, ScalarType::BFloat16, "bfloat16");
  STD_TORCH_CHECK(x.dim() == 4 && x.size(0) == batch && x.size(3) == dim, name, " must be [", batch,
                  ", kv_heads, capacity, ", dim, "], got ", shape(x), ".");
  check_rows(name, x);
  return {x.data_ptr(), x.stride(0), x.stride(1), x.stride(2)};
}

Tensor decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, double scale) {
  check_plain("decode_attention: q", q, ScalarType::BFloat16, "bfloat16");
  STD_TORCH_CHECK(q.dim() == 3, "decode_attention: q must be [batch, heads, head_dim], got ", shape(q), ".");
  check_rows("decode_attention: q", q);
  const int64_t batch = q.size(0), heads = q.size(1), dim = q.size(2);
  check_head_dim("decode_attention", dim);
  DecodeAttentionParams p{};
  p.keys = cache_argument("decode_attention: k_cache", k_cache, batch, dim);
  p.values = cache_argument("decode_attention: v_cache", v_cache, batch, dim);
  const int64_t groups = k_cache.size(1), capacity = k_cache.size(2);
  STD_TORCH_CHECK(v_cache.size(1) == groups && v_cache.size(2) == capacity,
                  "decode_attention: k_cache and v_cache differ in shape: ", shape(k_cache), " and ", shape(v_cache),
                  ".");
  STD_TORCH_CHECK(groups > 0 && heads % groups == 0, "decode_attention: ", heads, " query heads do not divide among ",
                  groups, " kv heads.");
  STD_TORCH_CHECK(batch <= 65535 && heads <= 65535, "decode_attention: at most 65535 rows and heads.");
  check_plain("decode_attention: lengths", lengths, ScalarType::Int, "int32");
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == batch, "decode_attention: lengths must be [", batch, "].");
  const OnDevice place(q);
  Tensor out = torch::stable::new_empty(q, {batch, heads, dim});
  p.q = q.data_ptr(), p.lengths = pointer<const int32_t>(lengths), p.out = out.data_ptr();
  p.batch = (int32_t)batch, p.kv_heads = (int32_t)groups, p.queries_per_group = (int32_t)(heads / groups);
  p.head_dim = (int32_t)dim, p.capacity = (int32_t)capacity, p.scale = (float)scale;
  if (batch == 0 || heads == 0) return out;
  p.splits = decode_attention_splits(p.batch, p.kv_heads, p.queries_per_group, p.capacity, place.multiprocessors());
  const int64_t scratch = p.splits > 1 ? p.splits : 0;
  const Tensor partial_out = torch::stable::new_empty(q, {scratch, batch, heads, dim}, ScalarType::Float);
  const Tensor partial_lse = torch::stable::new_empty(q, {scratch, batch, heads}, ScalarType::Float);
  p.partial_out = pointer<float>(partial_out), p.partial_lse = pointer<float>(partial_lse);
  decode_attention_launch(p, place.stream);
  place.check_launch("decode_attention");
  return out;
}

// Above this many rows the weight is expanded once and torch's dense product takes over: it runs at the full rate of
// the tensor cores, which from here on costs more than the expansion saves. An estimate from bandwidth and peak, not
// measured.
constexpr int64_t kDenseRows = 256;

QuantizedWeight quantized_argument(const char* operation, const Tensor& packed, const Tensor& scales,
                                   const Tensor& zeros, int64_t bits, int64_t outputs, int64_t inputs) {
  const std::string prefix = std::string(operation) + ": ";
  STD_TORCH_CHECK(bits == 4 || bits == 8, operation, ": weights have 4 or 8 bits, got ", bits, ".");
  STD_TORCH_CHECK(outputs >= 0 && inputs > 0, operation, ": a weight of [", outputs, ", ", inputs, "] is empty.");
  check_plain((prefix + "packed").c_str(), packed, ScalarType::Byte, "uint8");
  check_plain((prefix + "scales").c_str(), scales, ScalarType::BFloat16, "bfloat16");
  check_plain((prefix + "zeros").c_str(), zeros, ScalarType::Byte, "uint8");
  const int64_t places = (outputs + 15) / 16 * ((inputs + 127) / 128);
  STD_TORCH_CHECK(packed.numel() == places * 256 * bits && scales.numel() == places * 16 &&
                      (zeros.numel() == 0 || zeros.numel() == places * 16),
                  operation, ": packed, scales and zeros are not those of a [", outputs, ", ", inputs, "] weight of ",
                  bits, " bits.");
  return {packed.data_ptr(), scales.data_ptr(), zeros.numel() == 0 ? nullptr : pointer<const uint8_t>(zeros),
          (int32_t)outputs,  (int32_t)inputs,   (int32_t)bits};
}

Tensor expand(const QuantizedWeight& weight, const Tensor& like, bool wide, const OnDevice& place) {
  Tensor out =
      torch::stable::new_empty(like, {weight.outputs, weight.inputs}, wide ? ScalarType::Float : ScalarType::BFloat16);
  dequantize_launch({weight, out.data_ptr(), wide}, place.stream);
  place.check_launch("dequantize_weight");
  return out;
}

Tensor dequantize_weight(Tensor packed, Tensor scales, Tensor zeros, int64_t bits, int64_t outputs, int64_t inputs,
                         bool wide) {
  const QuantizedWeight weight = quantized_argument("dequantize_weight", packed, scales, zeros, bits, outputs, inputs);
  return expand(weight, packed, wide, OnDevice(packed));
}

Tensor quantized_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros, int64_t bits, int64_t outputs,
                        int64_t inputs, int64_t act_bits) {
  const char* operation = "quantized_linear";
  const QuantizedWeight weight = quantized_argument(operation, packed, scales, zeros, bits, outputs, inputs);
  STD_TORCH_CHECK(act_bits == 16, operation, ": the CUDA kernels take act_bits=16, got ", act_bits, ".");
  const bool wide = x.scalar_type() == ScalarType::Float;
  STD_TORCH_CHECK(OnDevice::holds(x) && (wide || x.scalar_type() == ScalarType::BFloat16), operation,
                  ": x must be bfloat16 or float32 on ", OnDevice::name, ".");
  STD_TORCH_CHECK(x.dim() >= 1 && x.size(x.dim() - 1) == inputs, operation, ": x must be [..., ", inputs, "], got ",
                  shape(x), ".");
  const OnDevice place(x);
  std::vector<int64_t> result_shape;
  int64_t rows = 1;
  for (int64_t i = 0; i + 1 < x.dim(); i++) result_shape.push_back(x.size(i)), rows *= x.size(i);
  result_shape.push_back(outputs);
  Tensor flat = torch::stable::reshape(x, {rows, inputs});
  flat = torch::stable::contiguous(wide ? torch::stable::to(flat, ScalarType::BFloat16) : flat);
  // Rows of an odd length do not start at multiples of 16 bytes, which asynchronous copies need.
  if (rows > kDenseRows || inputs % 8 != 0 || reinterpret_cast<uintptr_t>(flat.data_ptr()) % 16 != 0) {
    const Tensor dense = expand(weight, x, wide, place);
    const Tensor rounded = wide ? torch::stable::to(flat, ScalarType::Float) : flat;
    return torch::stable::reshape(torch::stable::matmul(rounded, torch::stable::transpose(dense, 0, 1)), result_shape);
  }
  Tensor y = torch::stable::new_empty(x, result_shape);
  quantized_linear_launch({flat.data_ptr(), weight, y.data_ptr(), (int32_t)rows, wide}, place.stream);
  place.check_launch(operation);
  return y;
}

}  // namespace

static void implement(torch::stable::detail::StableLibrary& m) {
  m.impl("rope_attention_forward", TORCH_BOX(&rope_attention_forward));
  m.impl("rope_attention_backward", TORCH_BOX(&rope_attention_backward));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
}

#ifndef INTERNLM2_EMULATION
STABLE_TORCH_LIBRARY_IMPL(internlm2, CUDA, m) {
  implement(m);
}
#else
// The same functions as CPU operators. Each build brings its own namespace: the tests load mutants beside the real one.
extern "C" const char emulation_namespace[];

static void define(torch::stable::detail::StableLibrary& m) {
  m.def(
      "rope_attention_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens, Tensor? table_offsets, int "
      "max_seqlen, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "rope_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cos, Tensor sin, Tensor "
      "cu_seqlens, "
      "Tensor? table_offsets, int max_seqlen, float scale) -> Tensor");
  m.def("decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, float scale) -> Tensor");
  m.def(
      "dequantize_weight(Tensor packed, Tensor scales, Tensor zeros, int bits, int out_features, int in_features, bool "
      "wide) -> "
      "Tensor");
  m.def(
      "quantized_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros, int bits, int out_features, int "
      "in_features, "
      "int act_bits) -> Tensor");
}

using torch::stable::detail::StableLibrary;
using torch::stable::detail::StableTorchLibraryInit;
static const StableTorchLibraryInit definitions(StableLibrary::Kind::DEF, define, emulation_namespace, nullptr,
                                                __FILE__, __LINE__);
static const StableTorchLibraryInit implementations(StableLibrary::Kind::IMPL, implement, emulation_namespace, "CPU",
                                                    __FILE__, __LINE__);
#endif

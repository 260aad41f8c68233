// The CPU kernels as torch operators, on torch's stable ABI: no Python.h, so one binary serves every Python and torch >= 2.10.
// Every argument is checked here before memory is touched. Schemas live in internlm2/ops/schemas.py.
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "team.h"

namespace {

using namespace internlm2;

RopeAttention rope_arguments(const Tensor& qkv, const Tensor& cos, const Tensor& sin, const Tensor& cu_seqlens,
                                        const std::optional<Tensor>& table_offsets, int64_t max_seqlen, double scale) {
  RopeAttention a{};
  STD_TORCH_CHECK(qkv.is_cpu() && qkv.dim() == 4 && qkv.size(2) >= 3,
                  "rope_attention: qkv must be [tokens, kv_heads, queries + 2, head_dim] on the CPU, got ", shape(qkv), ".");
  a.dtype = float_dtype("rope_attention: qkv", qkv);
  a.tokens = qkv.size(0), a.groups = qkv.size(1), a.queries = qkv.size(2) - 2, a.dim = qkv.size(3);
  check_head_dim("rope_attention", a.dim);
  STD_TORCH_CHECK(qkv.stride(3) == 1, "rope_attention: the last dimension of qkv must be contiguous.");
  a.qkv = qkv.data_ptr();
  a.token_stride = qkv.stride(0), a.group_stride = qkv.stride(1), a.slot_stride = qkv.stride(2);
  check_plain("rope_attention: cos", cos, ScalarType::Float, "float32");
  check_plain("rope_attention: sin", sin, ScalarType::Float, "float32");
  STD_TORCH_CHECK(cos.dim() == 2 && sin.dim() == 2 && cos.size(1) == a.dim / 2 && sin.size(1) == a.dim / 2 &&
                      sin.size(0) == cos.size(0),
                  "rope_attention: cos and sin must be [positions, ", a.dim / 2, "], got ", shape(cos), " and ", shape(sin),
                  ".");
  a.cos = static_cast<const float*>(cos.data_ptr()), a.sin = static_cast<const float*>(sin.data_ptr());
  check_plain("rope_attention: cu_seqlens", cu_seqlens, ScalarType::Int, "int32");
  STD_TORCH_CHECK(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, "rope_attention: cu_seqlens must be [sequences + 1].");
  a.sequences = cu_seqlens.size(0) - 1;
  a.cu_seqlens = static_cast<const int32_t*>(cu_seqlens.data_ptr());
  if (table_offsets.has_value()) {
    check_plain("rope_attention: table_offsets", *table_offsets, ScalarType::Int, "int32");
    STD_TORCH_CHECK(table_offsets->dim() == 1 && table_offsets->size(0) == a.sequences,
                    "rope_attention: table_offsets must be [", a.sequences, "], one a sequence.");
    a.table_offsets = static_cast<const int32_t*>(table_offsets->data_ptr());
  }
  STD_TORCH_CHECK(a.cu_seqlens[0] == 0 && a.cu_seqlens[a.sequences] == a.tokens,
                  "rope_attention: cu_seqlens must rise from 0 to the ", a.tokens, " tokens of qkv.");
  for (int64_t s = 0; s < a.sequences; s++) {
    const int64_t length = (int64_t)a.cu_seqlens[s + 1] - a.cu_seqlens[s], first = a.table_offsets ? a.table_offsets[s] : 0;
    STD_TORCH_CHECK(length >= 0, "rope_attention: cu_seqlens falls after sequence ", s, ".");
    STD_TORCH_CHECK(length <= max_seqlen, "rope_attention: max_seqlen is ", max_seqlen, ", but sequence ", s, " has ", length,
                    " tokens.");
    STD_TORCH_CHECK(length == 0 || (first >= 0 && first + length <= cos.size(0)), "rope_attention: the cos/sin table has ",
                    cos.size(0), " rows, but sequence ", s, " needs rows ", first, " to ", first + length,
                    ": build a longer table.");
  }
  a.scale = (float)scale;
  a.threads = (int)torch::stable::get_num_threads();
  a.parallel = parallel;
  return a;
}

std::tuple<Tensor, Tensor> rope_attention_forward(Tensor qkv, Tensor cos, Tensor sin, Tensor cu_seqlens,
                                                  std::optional<Tensor> table_offsets, int64_t max_seqlen, double scale) {
  RopeAttention a = rope_arguments(qkv, cos, sin, cu_seqlens, table_offsets, max_seqlen, scale);
  Tensor out = torch::stable::new_empty(qkv, {a.tokens, a.groups * a.queries, a.dim});
  Tensor lse = torch::stable::new_empty(qkv, {a.groups * a.queries, a.tokens}, ScalarType::Float);
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  kernels().rope_attention_forward(a);
  return {out, lse};
}

Tensor rope_attention_backward(Tensor grad_out, Tensor qkv, Tensor out, Tensor lse, Tensor cos, Tensor sin, Tensor cu_seqlens,
                               std::optional<Tensor> table_offsets, int64_t max_seqlen, double scale) {
  RopeAttention a = rope_arguments(qkv, cos, sin, cu_seqlens, table_offsets, max_seqlen, scale);
  const int64_t heads = a.groups * a.queries;
  for (const auto& [name, x] : {std::pair<const char*, const Tensor&>{"grad_out", grad_out}, {"out", out}})
    STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.scalar_type() == qkv.scalar_type() && x.dim() == 3 &&
                        x.size(0) == a.tokens && x.size(1) == heads && x.size(2) == a.dim,
                    "rope_attention_backward: ", name, " must be a contiguous [", a.tokens, ", ", heads, ", ", a.dim,
                    "] of qkv's dtype, got ", shape(x), ".");
  check_plain("rope_attention_backward: lse", lse, ScalarType::Float, "float32");
  STD_TORCH_CHECK(lse.dim() == 2 && lse.size(0) == heads && lse.size(1) == a.tokens, "rope_attention_backward: lse must be [",
                  heads, ", ", a.tokens, "], got ", shape(lse), ".");
  Tensor grad_qkv = torch::stable::new_empty(qkv, {a.tokens, a.groups, a.queries + 2, a.dim});
  a.out = out.data_ptr();
  a.lse = static_cast<float*>(lse.data_ptr());
  a.grad_out = grad_out.data_ptr();
  a.grad_qkv = grad_qkv.data_ptr();
  kernels().rope_attention_backward(a);
  return grad_qkv;
}

// Attention of tokens whose keys and values lie in a cache already, behind those of `past` earlier tokens of their sequence.
Tensor prefill_attention(Tensor qkv, Tensor cache, Tensor slots, Tensor past, Tensor cos, Tensor sin, Tensor cu_seqlens,
                         std::optional<Tensor> table_offsets, int64_t max_seqlen, double scale) {
  RopeAttention a = rope_arguments(qkv, cos, sin, cu_seqlens, table_offsets, max_seqlen, scale);
  STD_TORCH_CHECK(cache.is_cpu() && cache.is_contiguous() && cache.scalar_type() == qkv.scalar_type() && cache.dim() == 5 &&
                      cache.size(1) == a.groups && cache.size(2) == 2 && cache.size(4) == a.dim,
                  "prefill_attention: the cache must be a contiguous [slots, ", a.groups, ", 2, length, ", a.dim,
                  "] of qkv's dtype, got ", shape(cache), ".");
  check_plain("prefill_attention: slots", slots, ScalarType::Long, "int64");
  check_plain("prefill_attention: past", past, ScalarType::Int, "int32");
  STD_TORCH_CHECK(slots.numel() == a.sequences && past.numel() == a.sequences, "prefill_attention: slots and past must be [",
                  a.sequences, "], one a sequence.");
  a.cache = cache.data_ptr(), a.capacity = cache.size(3);
  a.slots = static_cast<const int64_t*>(slots.data_ptr());
  a.past = static_cast<const int32_t*>(past.data_ptr());
  for (int64_t s = 0; s < a.sequences; s++) {
    const int64_t end = (int64_t)a.past[s] + a.cu_seqlens[s + 1] - a.cu_seqlens[s];
    STD_TORCH_CHECK(a.slots[s] >= 0 && a.slots[s] < cache.size(0), "prefill_attention: slot ", a.slots[s], " of sequence ", s,
                    " is not one of the cache's ", cache.size(0), ".");
    STD_TORCH_CHECK(a.past[s] >= 0 && end <= a.capacity && (a.table_offsets ? a.table_offsets[s] : 0) + end <= cos.size(0),
                    "prefill_attention: sequence ", s, " ends at ", end, ", beyond its slot's ", a.capacity,
                    " tokens or the cos/sin table's ", cos.size(0), " rows.");
  }
  Tensor out = torch::stable::new_empty(qkv, {a.tokens, a.groups * a.queries, a.dim});
  a.out = out.data_ptr();
  kernels().rope_attention_forward(a);
  return out;
}

Tensor decode_attention(Tensor q, Tensor k_cache, Tensor v_cache, Tensor lengths, double scale) {
  DecodeAttention a{};
  STD_TORCH_CHECK(q.is_cpu() && q.dim() == 3 && q.is_contiguous(),
                  "decode_attention: q must be a contiguous [batch, heads, head_dim] on the CPU, got ", shape(q), ".");
  a.dtype = float_dtype("decode_attention: q", q);
  a.batch = q.size(0), a.dim = q.size(2);
  check_head_dim("decode_attention", a.dim);
  for (const Tensor* cache : {&k_cache, &v_cache})
    STD_TORCH_CHECK(cache->is_cpu() && cache->scalar_type() == q.scalar_type() && cache->dim() == 4 &&
                        cache->size(0) == a.batch && cache->size(1) == k_cache.size(1) &&
                        cache->size(2) == k_cache.size(2) && cache->size(3) == a.dim && cache->stride(3) == 1,
                    "decode_attention: caches must be [", a.batch, ", kv_heads, length, ", a.dim,
                    "] of q's dtype with a contiguous last dimension, got ", shape(*cache), ".");
  a.groups = k_cache.size(1), a.capacity = k_cache.size(2);
  STD_TORCH_CHECK(a.groups > 0 && q.size(1) % a.groups == 0, "decode_attention: ", a.groups, " kv heads do not divide ",
                  q.size(1), " heads.");
  a.queries = q.size(1) / a.groups;
  check_plain("decode_attention: lengths", lengths, ScalarType::Int, "int32");
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) == a.batch, "decode_attention: lengths must be [", a.batch, "].");
  a.lengths = static_cast<const int32_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < a.batch; b++)
    STD_TORCH_CHECK(a.lengths[b] >= 0 && a.lengths[b] <= a.capacity, "decode_attention: length ", a.lengths[b], " of row ", b,
                    " does not lie in 0..", a.capacity, ".");
  for (int i = 0; i < 3; i++) a.k_stride[i] = k_cache.stride(i), a.v_stride[i] = v_cache.stride(i);
  Tensor out = torch::stable::empty_like(q);
  a.q = q.data_ptr(), a.k_cache = k_cache.data_ptr(), a.v_cache = v_cache.data_ptr(), a.out = out.data_ptr();
  a.scale = (float)scale;
  a.threads = (int)torch::stable::get_num_threads();
  a.parallel = parallel;
  kernels().decode_attention(a);
  return out;
}

std::tuple<Tensor, Tensor, Tensor> quantize_weight(Tensor weight, int64_t bits, bool symmetric) {
  check_bits("quantize_weight", bits);
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 && weight.stride(1) == 1,
                  "quantize_weight: the weight must be [out_features, in_features] on the CPU with contiguous rows, got ",
                  shape(weight), ".");
  Quantize a{};
  a.dtype = float_dtype("quantize_weight: the weight", weight);
  a.weight = {nullptr, nullptr, nullptr, bits, weight.size(0), weight.size(1)};
  const int64_t tiles = a.weight.tiles(), groups = a.weight.groups();
  Tensor packed = torch::stable::new_empty(weight, {tiles, groups, quantized_bytes(bits)}, ScalarType::Byte);
  Tensor scales = torch::stable::new_empty(weight, {tiles, groups, 16}, ScalarType::BFloat16);
  Tensor zeros = symmetric ? torch::stable::new_empty(weight, {0}, ScalarType::Byte)
                           : torch::stable::new_empty(weight, {tiles, groups, 16}, ScalarType::Byte);
  a.weight.packed = static_cast<uint8_t*>(packed.data_ptr());
  a.weight.scales = static_cast<uint16_t*>(scales.data_ptr());
  a.weight.zeros = symmetric ? nullptr : static_cast<uint8_t*>(zeros.data_ptr());
  a.source = weight.data_ptr();
  a.row_stride = weight.stride(0);
  a.parallel = parallel;
  kernels().quantize(a);
  return {packed, scales, zeros};
}

Tensor dequantize_weight(Tensor packed, Tensor scales, Tensor zeros, int64_t bits, int64_t out_features, int64_t in_features,
                         bool wide) {
  Quantize a{};
  a.weight = quantized_weight("dequantize_weight", packed, scales, zeros, bits, out_features, in_features);
  a.dtype = wide ? Dtype::float32 : Dtype::bfloat16;
  Tensor target = torch::stable::new_empty(scales, {out_features, in_features}, wide ? ScalarType::Float : ScalarType::BFloat16);
  a.target = target.data_ptr();
  a.parallel = parallel;
  kernels().dequantize(a);
  return target;
}

Tensor quantized_linear(Tensor x, Tensor packed, Tensor scales, Tensor zeros, int64_t bits, int64_t out_features,
                        int64_t in_features, int64_t act_bits) {
  QuantizedLinear a{};
  a.weight = quantized_weight("quantized_linear", packed, scales, zeros, bits, out_features, in_features);
  STD_TORCH_CHECK(act_bits == 8 || act_bits == 16, "quantized_linear: act_bits must be 8 or 16, got ", act_bits, ".");
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() >= 1 && x.size(x.dim() - 1) == in_features,
                  "quantized_linear: x must be a contiguous [..., ", in_features, "] on the CPU, got ", shape(x), ".");
  a.dtype = float_dtype("quantized_linear: x", x);
  a.rows = x.numel() / in_features;
  a.row_stride = in_features;
  a.act_bits = act_bits;
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = out_features;
  Tensor y = torch::stable::new_empty(x, size);
  a.x = x.data_ptr();
  a.y = y.data_ptr();
  a.threads = (int)torch::stable::get_num_threads();
  a.parallel = parallel;
  if (a.rows > 0) kernels().quantized_linear(a);
  return y;
}

Tensor few_rows_linear(Tensor x, Tensor weight) {
  STD_TORCH_CHECK(x.is_cpu() && x.scalar_type() == ScalarType::BFloat16 && x.is_contiguous() && x.dim() >= 1,
                  "few_rows_linear: x must be contiguous bfloat16 [..., in_features] on the CPU, got ", shape(x), ".");
  STD_TORCH_CHECK(weight.is_cpu() && weight.scalar_type() == ScalarType::BFloat16 && weight.dim() == 2 && weight.stride(1) == 1 &&
                      weight.size(1) == x.size(x.dim() - 1) && weight.size(1) > 0,
                  "few_rows_linear: the weight must be bfloat16 [out_features, ", x.size(x.dim() - 1),
                  "] on the CPU with contiguous rows, got ", shape(weight), ".");
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = weight.size(0);
  Tensor y = torch::stable::new_empty(x, size);
  FewRowsLinear a{x.data_ptr(),   weight.data_ptr(), weight.stride(0), x.numel() / weight.size(1),
                             weight.size(1), weight.size(0),    y.data_ptr(),     parallel};
  kernels().few_rows_linear(a);
  return y;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  m.impl("rope_attention_forward", TORCH_BOX(&rope_attention_forward));
  m.impl("prefill_attention", TORCH_BOX(&prefill_attention));
  m.impl("decode_attention", TORCH_BOX(&decode_attention));
  m.impl("quantize_weight", TORCH_BOX(&quantize_weight));
  m.impl("dequantize_weight", TORCH_BOX(&dequantize_weight));
  m.impl("few_rows_linear", TORCH_BOX(&few_rows_linear));
  m.impl("quantized_linear", TORCH_BOX(&quantized_linear));
  m.impl("rope_attention_backward", TORCH_BOX(&rope_attention_backward));
}

// The name of the instruction set in use, for the log: called through ctypes.
extern "C" __attribute__((visibility("default"))) const char* internlm2_cpu_instruction_set() {
  return internlm2::kernels().name;
}

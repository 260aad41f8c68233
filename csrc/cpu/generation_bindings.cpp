// The operators of the generation engine: packed weights, a decoding step through all layers, the draw of the next tokens.
#include <optional>
#include <tuple>
#include <vector>

#include "checks.h"
#include "kernels.h"
#include "team.h"

namespace {

using namespace internlm2;

int64_t lanes(Dtype dtype, int64_t inputs) { return dtype == Dtype::float32 ? inputs : (inputs + 1) / 2; }

PackedWeight packed_weight(const char* name, const Tensor& packed, Dtype dtype, int64_t outputs, int64_t inputs) {
  PackedWeight w{packed.data_ptr(), outputs, inputs};
  STD_TORCH_CHECK(outputs > 0 && inputs > 0, name, ": the weight must not be empty.");
  STD_TORCH_CHECK(packed.is_cpu() && packed.is_contiguous() && packed.dim() == 3 && float_dtype(name, packed) == dtype &&
                      packed.size(0) == w.panels() && packed.size(1) == lanes(dtype, inputs) &&
                      packed.size(2) == PACKED_COLUMNS * (dtype == Dtype::float32 ? 1 : 2),
                  name, ": packed ", shape(packed), " is not a weight of ", outputs, " x ", inputs, " in the dtype of x.");
  return w;
}

Tensor pack_weight(Tensor weight) {
  STD_TORCH_CHECK(weight.is_cpu() && weight.dim() == 2 && weight.size(0) > 0 && weight.size(1) > 0 && weight.stride(1) == 1,
                  "pack_weight: the weight must be [out_features, in_features] on the CPU with contiguous rows, got ",
                  shape(weight), ".");
  PackWeight a{};
  a.dtype = float_dtype("pack_weight: the weight", weight);
  a.weight = {nullptr, weight.size(0), weight.size(1)};
  const int64_t columns = PACKED_COLUMNS * (a.dtype == Dtype::float32 ? 1 : 2);
  Tensor packed = torch::stable::new_empty(weight, {a.weight.panels(), lanes(a.dtype, a.weight.inputs), columns});
  a.weight.packed = packed.data_ptr();
  a.source = weight.data_ptr();
  a.row_stride = weight.stride(0);
  a.parallel = parallel;
  kernels().pack_weight(a);
  return packed;
}

Tensor packed_linear(Tensor x, Tensor packed, int64_t out_features, int64_t in_features) {
  PackedLinear a{};
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() >= 1 && x.size(x.dim() - 1) == in_features,
                  "packed_linear: x must be a contiguous [..., ", in_features, "] on the CPU, got ", shape(x), ".");
  a.dtype = float_dtype("packed_linear: x", x);
  a.weight = packed_weight("packed_linear", packed, a.dtype, out_features, in_features);
  a.x = x.data_ptr();
  a.rows = x.numel() / in_features;
  std::vector<int64_t> size(x.sizes().begin(), x.sizes().end());
  size.back() = out_features;
  Tensor y = torch::stable::new_empty(x, size);
  a.y = y.data_ptr();
  a.threads = (int)torch::stable::get_num_threads();
  a.parallel = parallel;
  if (a.rows > 0) kernels().packed_linear(a);
  return y;
}

Tensor decode_step(Tensor x, std::vector<Tensor> caches, Tensor lengths, Tensor cos, Tensor sin,
                   std::optional<Tensor> table_offsets, std::vector<Tensor> norms, std::vector<Tensor> weights,
                   std::vector<Tensor> scales, int64_t bits, int64_t act_bits, int64_t heads, int64_t intermediate, double eps) {
  const char* name = "decode_step";
  DecodeStep a{};
  a.layers = (int64_t)caches.size();
  STD_TORCH_CHECK(x.is_cpu() && x.is_contiguous() && x.dim() == 2 && x.size(0) > 0 && a.layers > 0,
                  "decode_step: x must be a contiguous [rows, hidden] on the CPU and there must be layers, got ", shape(x), ".");
  a.dtype = float_dtype("decode_step: x", x);
  a.rows = x.size(0), a.hidden = x.size(1), a.intermediate = intermediate;
  STD_TORCH_CHECK(a.hidden % 16 == 0 && intermediate > 0 && intermediate % 16 == 0,
                  "decode_step: the hidden and the intermediate size must be multiples of 16, got ", a.hidden, " and ",
                  intermediate, ".");
  STD_TORCH_CHECK(bits == 4 || bits == 8 || bits == 0, "decode_step: bits must be 4 or 8, or 0 for packed weights, got ", bits,
                  ".");
  STD_TORCH_CHECK(act_bits == 8 || act_bits == 16, "decode_step: act_bits must be 8 or 16, got ", act_bits, ".");
  STD_TORCH_CHECK((int64_t)norms.size() == 2 * a.layers + 1 && (int64_t)weights.size() == 4 * a.layers &&
                      scales.size() == (bits ? weights.size() : 0),
                  "decode_step: ", a.layers, " layers have 2 norms and 4 weights each, with scales where they are quantized, "
                  "and one norm more; got ", norms.size(), ", ", weights.size(), " and ", scales.size(), ".");
  const Tensor& first = caches[0];
  STD_TORCH_CHECK(first.dim() == 5 && first.size(2) == 2 && first.size(0) >= a.rows && first.size(1) > 0 &&
                      heads > 0 && heads % first.size(1) == 0,
                  "decode_step: caches must be [slots, kv_heads, 2, length, head_dim] with a slot for each row and kv heads "
                  "that divide the ", heads, " heads, got ", shape(first), ".");
  a.groups = first.size(1), a.queries = heads / a.groups, a.capacity = first.size(3), a.dim = first.size(4);
  check_head_dim(name, a.dim);
  for (const Tensor& cache : caches)
    STD_TORCH_CHECK(cache.is_cpu() && cache.is_contiguous() && cache.scalar_type() == x.scalar_type() &&
                        cache.dim() == 5 && cache.size(0) == first.size(0) && cache.size(1) == a.groups && cache.size(2) == 2 &&
                        cache.size(3) == a.capacity && cache.size(4) == a.dim,
                    "decode_step: each layer's cache must be contiguous, of x's dtype and equally large.");
  for (const Tensor& norm : norms)
    STD_TORCH_CHECK(norm.is_cpu() && norm.is_contiguous() && norm.scalar_type() == x.scalar_type() && norm.dim() == 1 &&
                        norm.size(0) == a.hidden,
                    "decode_step: norms must be [", a.hidden, "] of x's dtype, got ", shape(norm), ".");
  for (const Tensor* table : {&cos, &sin}) {
    check_plain("decode_step: cos and sin", *table, ScalarType::Float, "float32");
    STD_TORCH_CHECK(table->dim() == 2 && table->size(1) == a.dim / 2 && table->size(0) == cos.size(0),
                    "decode_step: cos and sin must be [positions, ", a.dim / 2, "], got ", shape(*table), ".");
  }
  check_plain("decode_step: lengths", lengths, ScalarType::Int, "int32");
  STD_TORCH_CHECK(lengths.dim() == 1 && lengths.size(0) >= a.rows, "decode_step: lengths must have a number for each row.");
  if (table_offsets.has_value()) {
    check_plain("decode_step: table_offsets", *table_offsets, ScalarType::Int, "int32");
    STD_TORCH_CHECK(table_offsets->dim() == 1 && table_offsets->size(0) >= a.rows,
                    "decode_step: table_offsets must have a number for each row.");
    a.table_offsets = static_cast<const int32_t*>(table_offsets->data_ptr());
  }
  a.lengths = static_cast<int32_t*>(lengths.data_ptr());
  for (int64_t b = 0; b < a.rows; b++) {
    const int64_t length = a.lengths[b], row = (a.table_offsets ? a.table_offsets[b] : 0) + length;
    STD_TORCH_CHECK(length >= 0 && length < a.capacity, "decode_step: row ", b, " has ", length, " tokens in a cache for ",
                    a.capacity, ".");
    STD_TORCH_CHECK(row >= 0 && row < cos.size(0), "decode_step: the cos/sin table has ", cos.size(0), " rows, but row ", b,
                    " needs row ", row, ": build a longer table.");
  }
  std::vector<DecoderLayer> layers(a.layers);
  const int64_t width = heads * a.dim;
  const int64_t sizes[4][2] = {{width + 2 * a.groups * a.dim, a.hidden}, {a.hidden, width}, {2 * intermediate, a.hidden},
                               {a.hidden, intermediate}};
  const Tensor none = torch::stable::new_empty(x, {0}, ScalarType::Byte);
  for (int64_t l = 0; l < a.layers; l++) {
    layers[l].attention_norm = norms[2 * l].data_ptr(), layers[l].ffn_norm = norms[2 * l + 1].data_ptr();
    layers[l].cache = caches[l].data_ptr();
    DecoderWeight* each[4] = {&layers[l].wqkv, &layers[l].wo, &layers[l].gate_up, &layers[l].down};
    for (int64_t i = 0; i < 4; i++) {
      const Tensor& weight = weights[4 * l + i];
      if (bits)
        each[i]->quantized = quantized_weight(name, weight, scales[4 * l + i], none, bits, sizes[i][0], sizes[i][1]);
      else
        each[i]->packed = packed_weight(name, weight, a.dtype, sizes[i][0], sizes[i][1]);
    }
  }
  Tensor out = torch::stable::empty_like(x);
  a.layer = layers.data(), a.norm = norms.back().data_ptr();
  a.x = x.data_ptr(), a.out = out.data_ptr();
  a.cos = static_cast<const float*>(cos.data_ptr()), a.sin = static_cast<const float*>(sin.data_ptr());
  a.eps = (float)eps, a.act_bits = act_bits;
  a.threads = (int)torch::stable::get_num_threads();
  a.parallel = parallel;
  with_team(&a, [](void* context) { kernels().decode_step(*static_cast<DecodeStep*>(context)); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> draw_tokens(Tensor logits, Tensor temperatures, Tensor uniforms) {
  DrawTokens a{};
  STD_TORCH_CHECK(logits.is_cpu() && logits.is_contiguous() && logits.dim() == 2 && logits.size(1) > 0,
                  "draw_tokens: logits must be a contiguous [rows, vocabulary] on the CPU, got ", shape(logits), ".");
  a.dtype = float_dtype("draw_tokens: logits", logits);
  a.rows = logits.size(0), a.size = logits.size(1);
  check_plain("draw_tokens: temperatures", temperatures, ScalarType::Float, "float32");
  check_plain("draw_tokens: uniforms", uniforms, ScalarType::Double, "float64");
  STD_TORCH_CHECK(temperatures.numel() == a.rows && uniforms.numel() == a.rows,
                  "draw_tokens: temperatures and uniforms must be [", a.rows, "], got ", shape(temperatures), " and ",
                  shape(uniforms), ".");
  Tensor tokens = torch::stable::new_empty(logits, {a.rows}, ScalarType::Long);
  Tensor logprobs = torch::stable::new_empty(logits, {a.rows}, ScalarType::Float);
  Tensor sampling_logprobs = torch::stable::new_empty(logits, {a.rows}, ScalarType::Float);
  a.logits = logits.data_ptr();
  a.temperatures = static_cast<const float*>(temperatures.data_ptr());
  a.uniforms = static_cast<const double*>(uniforms.data_ptr());
  a.tokens = static_cast<int64_t*>(tokens.data_ptr());
  a.logprobs = static_cast<float*>(logprobs.data_ptr());
  a.sampling_logprobs = static_cast<float*>(sampling_logprobs.data_ptr());
  a.parallel = parallel;
  kernels().draw_tokens(a);
  return {tokens, logprobs, sampling_logprobs};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(internlm2, CPU, m) {
  m.impl("pack_weight", TORCH_BOX(&pack_weight));
  m.impl("packed_linear", TORCH_BOX(&packed_linear));
  m.impl("decode_step", TORCH_BOX(&decode_step));
  m.impl("draw_tokens", TORCH_BOX(&draw_tokens));
}

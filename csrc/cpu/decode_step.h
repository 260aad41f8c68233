// One decoding step through all layers in one call. Products read weights that were packed once; what lies between them is
// done row by row and rounds where internlm2.model rounds.
#pragma once

#include "../common/quantized.h"
#include "decode_attention.h"
#include "packed_linear.h"
#include "quantized_linear.h"
#include "rotary.h"

#include <cmath>

namespace internlm2::INTERNLM2_ISA {

template <class Engine>
class DecodeStepKernel {
  using T = typename Engine::Element;
  static constexpr int64_t GRAIN = 8192;  // elements that are done sooner than a second thread takes its share

 public:
  explicit DecodeStepKernel(const DecodeStep& arguments)
      : a(arguments),
        heads(a.groups * a.queries * a.dim),
        x(a.rows * a.hidden),
        normed(a.rows * a.hidden),
        change(a.rows * a.hidden),
        qkv(a.rows * a.groups * (a.queries + 2) * a.dim),
        query(a.rows * heads),
        attended(a.rows * heads),
        gate_up(a.rows * 2 * a.intermediate),
        gated(a.rows * a.intermediate) {}

  void run() {
    std::memcpy(x.get(), a.x, a.rows * a.hidden * sizeof(T));
    for (int64_t b = 0; b < a.rows; b++) a.lengths[b]++;
    norm(nullptr, a.layer[0].attention_norm, normed.get());
    for (int64_t l = 0; l < a.layers; l++) {
      const DecoderLayer& layer = a.layer[l];
      linear(layer.wqkv, normed.get(), qkv.get());
      rotate(layer);
      attend(layer);
      linear(layer.wo, attended.get(), change.get());
      norm(change.get(), layer.ffn_norm, normed.get());
      linear(layer.gate_up, normed.get(), gate_up.get());
      multiply_by_gate();
      linear(layer.down, gated.get(), change.get());
      const bool last = l + 1 == a.layers;
      norm(change.get(), last ? a.norm : a.layer[l + 1].attention_norm, last ? static_cast<T*>(a.out) : normed.get());
    }
  }

 private:
  const DecodeStep& a;
  int64_t heads;
  Buffer<T> x, normed, change, qkv, query, attended, gate_up, gated;

  template <class F>
  void for_rows(int64_t elements, const F& body) const {
    const int64_t grain = most(1, GRAIN / elements);
    for_each(a.parallel, (a.rows + grain - 1) / grain, [&](int64_t item) {
      for (int64_t b = item * grain; b < least(a.rows, (item + 1) * grain); b++) body(b);
    });
  }

  void linear(const DecoderWeight& w, const T* from, T* to) const {
    if (w.packed.packed == nullptr)
      quantized_linear<T>({w.quantized, a.dtype, from, a.rows, w.quantized.in_features, a.act_bits, to, a.threads, a.parallel});
    else
      PackedLinearKernel<Engine>({a.dtype, w.packed, from, a.rows, to, a.threads, a.parallel}).run();
  }

  // x += change; y = x / sqrt(mean(x^2) + eps), rounded, times the weight.
  void norm(const T* added, const void* weights, T* y) const {
    const T* w = static_cast<const T*>(weights);
    for_rows(a.hidden, [&](int64_t b) {
      T* row = &x[b * a.hidden];
      Floats squares = Floats{};
      for (int64_t i = 0; i < a.hidden; i += WIDTH) {
        Floats v = widen(row + i);
        if (added != nullptr) {
          narrow(v + widen(added + b * a.hidden + i), row + i);
          v = widen(row + i);
        }
        squares += v * v;
      }
      const float scale = 1.f / std::sqrt(sum(squares) / (float)a.hidden + a.eps);
      T* out = y + b * a.hidden;
      for (int64_t i = 0; i < a.hidden; i += WIDTH) {
        narrow(widen(row + i) * scale, out + i);
        narrow(widen(out + i) * widen(w + i), out + i);
      }
    });
  }

  // Queries turned, in order of heads; keys turned and values into the cache.
  void rotate(const DecoderLayer& layer) const {
    for_rows(heads, [&](int64_t b) {
      const int64_t position = a.lengths[b] - 1, slots = a.queries + 2;
      const int64_t at = ((a.table_offsets ? a.table_offsets[b] : 0) + position) * (a.dim / 2);
      const T* from = &qkv[b * a.groups * slots * a.dim];
      T* cache = static_cast<T*>(layer.cache) + (b * a.groups * 2 * a.capacity + position) * a.dim;
      for (int64_t g = 0; g < a.groups; g++, from += slots * a.dim, cache += 2 * a.capacity * a.dim) {
        for (int64_t r = 0; r < a.queries; r++)
          rotate_row(from + r * a.dim, a.cos + at, a.sin + at, a.dim, 1.f, &query[b * heads + (g * a.queries + r) * a.dim]);
        rotate_row(from + a.queries * a.dim, a.cos + at, a.sin + at, a.dim, 1.f, cache);
        std::memcpy(cache + a.capacity * a.dim, from + (a.queries + 1) * a.dim, a.dim * sizeof(T));
      }
    });
  }

  void attend(const DecoderLayer& layer) const {
    DecodeAttention d{};
    d.dtype = a.dtype, d.q = query.get(), d.out = attended.get();
    d.k_cache = layer.cache, d.v_cache = static_cast<const T*>(layer.cache) + a.capacity * a.dim;
    d.k_stride[2] = d.v_stride[2] = a.dim;
    d.k_stride[1] = d.v_stride[1] = 2 * a.capacity * a.dim;
    d.k_stride[0] = d.v_stride[0] = a.groups * 2 * a.capacity * a.dim;
    d.lengths = a.lengths, d.batch = a.rows, d.groups = a.groups, d.queries = a.queries, d.dim = a.dim;
    // A slot may be far longer than what is in it: chunks past the longest row are not even looked at.
    for (int64_t b = 0; b < a.rows; b++) d.capacity = most(d.capacity, a.lengths[b]);
    d.scale = 1.f / std::sqrt((float)a.dim), d.threads = a.threads, d.parallel = a.parallel;
    DecodeAttentionKernel<T>(d).run();
  }

  // silu(gate) rounded, times up.
  void multiply_by_gate() const {
    for_rows(a.intermediate, [&](int64_t b) {
      const T *gate = &gate_up[b * 2 * a.intermediate], *up = gate + a.intermediate;
      T* y = &gated[b * a.intermediate];
      for (int64_t i = 0; i < a.intermediate; i += WIDTH) {
        const Floats v = widen(gate + i), power = v * -1.44269504f;
        narrow(v / (exp2(power > 126.f ? splat(126.f) : power) + 1.f), y + i);
        narrow(widen(y + i) * widen(up + i), y + i);
      }
    });
  }
};

}  // namespace internlm2::INTERNLM2_ISA

// Causal attention over packed sequences with RoPE, backward: five products a block, in the transposed formulation
//   S' = K Q'   dP' = V dO'   dV += P' dO   dK += dS' Q   dQ' += K' dS'     (' = transposed)
// with P' = exp2(S' - lse) and dS' = P' (dP' - rowsum(dO out)). Keys are rows, queries are columns, so that P' and dS' are
// the row-major left operands of dV and dK as they come. The turn of RoPE is undone when a row is written.
#pragma once

#include "rope_attention_forward.h"

namespace internlm2::INTERNLM2_ISA {

template <class Engine, class T>
class RopeAttentionBackward {
  using Element = typename Engine::Element;
  static constexpr int P = Engine::PER_LANE;
  static constexpr int64_t QUERIES = 128, KEYS = 96;
  static constexpr int64_t CHUNK = 768;  // a multiple of QUERIES and KEYS, so that chunks do not move block borders

 public:
  explicit RopeAttentionBackward(const RopeAttention& arguments) : a(arguments), lanes(a.dim / P) {}

  // One item a (sequence, kv head) does all five products. Where that leaves threads idle, chunks of keys (dK, dV) and
  // chunks of queries (dQ) are items of their own: 7 products instead of 5, the same sums in the same order.
  void run() {
    const int64_t pairs = a.sequences * a.groups;
    if (pairs >= a.threads || a.tokens <= CHUNK * a.sequences) {
      for_each(a.parallel, pairs, [&](int64_t item) {
        const int64_t s = item / a.groups;
        block(s, item % a.groups, 0, length(s), 0, length(s), true, true);
      });
      return;
    }
    int64_t chunks = 0;
    for (int64_t s = 0; s < a.sequences; s++) chunks = most(chunks, (length(s) + CHUNK - 1) / CHUNK);
    for_each(a.parallel, 2 * pairs * chunks, [&](int64_t item) {
      const int64_t pair = item / 2 % pairs, s = pair / a.groups, group = pair % a.groups, n = length(s);
      // Heaviest first: early keys are seen by most queries, late queries see most keys.
      const int64_t rank = item / 2 / pairs;
      if (item % 2 == 0) {
        const int64_t begin = rank * CHUNK;
        if (begin < n) block(s, group, begin, least(n, begin + CHUNK), begin, n, true, false);
      } else {
        const int64_t begin = (chunks - 1 - rank) * CHUNK, end = least(n, begin + CHUNK);
        if (begin < n) block(s, group, 0, end, begin, end, false, true);
      }
    });
  }

 private:
  const RopeAttention& a;
  int64_t lanes;

  int64_t length(int64_t s) const { return a.cu_seqlens[s + 1] - a.cu_seqlens[s]; }
  int64_t offset(int64_t token, int64_t group, int64_t slot) const {  // in grad_qkv, which is contiguous
    return ((token * a.groups + group) * (a.queries + 2) + slot) * a.dim;
  }
  const T* row(int64_t token, int64_t group, int64_t slot) const {
    return static_cast<const T*>(a.qkv) + token * a.token_stride + group * a.group_stride + slot * a.slot_stride;
  }
  const float* angles(const float* table, int64_t s, int64_t position) const {
    return table + ((a.table_offsets ? a.table_offsets[s] : 0) + position) * (a.dim / 2);
  }

  struct Scratch {
    Buffer<Element> key, key_columns, value;  // [keys][D], [D][keys], [keys][D]
    Buffer<float> key_grad, value_grad;       // [keys][D]
    Buffer<Element> rows, weights, score_grads;
    Buffer<Lane> query_columns, grad_columns, query_pairs, grad_pairs, score_pairs;
    Buffer<float> scores, weight_grads, query_grad, rows_out, lse, delta;
    int64_t padded_keys;
    Scratch(int64_t keys, int64_t dim)
        : key(keys * dim),
          key_columns(keys * dim),
          value(keys * dim),
          key_grad(keys * dim),
          value_grad(keys * dim),
          rows(QUERIES * dim),
          weights(KEYS * QUERIES),
          score_grads(KEYS * QUERIES),
          query_columns(dim * QUERIES),
          grad_columns(dim * QUERIES),
          query_pairs(dim * QUERIES),
          grad_pairs(dim * QUERIES),
          score_pairs(KEYS * QUERIES),
          scores(KEYS * QUERIES),
          weight_grads(KEYS * QUERIES),
          query_grad(dim * QUERIES),
          rows_out(dim * QUERIES),
          lse(QUERIES),
          delta(QUERIES),
          padded_keys(keys) {}
  };

  // Keys [k0, k1) against queries [q0, q1) of sequence s, all heads of the group.
  void block(int64_t s, int64_t group, int64_t k0, int64_t k1, int64_t q0, int64_t q1, bool key_side, bool query_side) {
    if (k1 <= k0) return;
    Scratch scratch(round_up(k1 - k0, KEYS), a.dim);
    read_keys(scratch, s, group, k0, k1);
    for (int64_t r = 0; r < a.queries; r++)
      for (int64_t first = q0; first < q1; first += QUERIES) {
        const int64_t count = least(QUERIES, q1 - first), padded = round_up(count, 16);
        read_queries(scratch, s, group, r, first, count, padded);
        scratch.query_grad.clear(a.dim * QUERIES);
        const int64_t end = least(k1, first + count);
        for (int64_t key = k0; key < end; key += KEYS)
          step(scratch, key - k0, least(KEYS, end - key), key - first, padded, key_side, query_side);
        if (query_side) write_queries(scratch, s, group, r, first, count, padded);
      }
    if (key_side) write_keys(scratch, s, group, k0, k1);
  }

  void read_keys(Scratch& x, int64_t s, int64_t group, int64_t k0, int64_t k1) {
    const int64_t count = k1 - k0, token = a.cu_seqlens[s] + k0, ld = x.padded_keys;
    for (int64_t j = 0; j < count; j++) {
      rotate_row(row(token + j, group, a.queries), angles(a.cos, s, k0 + j), angles(a.sin, s, k0 + j), a.dim, 1.f,
                 &x.key[j * a.dim]);
      convert(row(token + j, group, a.queries + 1), a.dim, &x.value[j * a.dim]);
    }
    std::memset(&x.key[count * a.dim], 0, (ld - count) * a.dim * sizeof(Element));
    std::memset(&x.value[count * a.dim], 0, (ld - count) * a.dim * sizeof(Element));
    x.key_grad.clear(ld * a.dim);
    x.value_grad.clear(ld * a.dim);
    Buffer<Lane> strip(lanes * WIDTH);
    for (int64_t j = 0; j < ld; j += WIDTH) {
      transpose(reinterpret_cast<const Lane*>(&x.key[j * a.dim]), lanes, WIDTH, lanes, strip.get(), WIDTH);
      for (int64_t d = 0; d < lanes; d++) {
        const Words w = load<Words>(&strip[d * WIDTH]);
        if constexpr (P == 1) {
          store(&x.key_columns[d * ld + j], w);
        } else {
          store(&x.key_columns[2 * d * ld + j], __builtin_convertvector(w, Shorts));
          store(&x.key_columns[(2 * d + 1) * ld + j], __builtin_convertvector(w >> 16, Shorts));
        }
      }
    }
  }

  void read_queries(Scratch& x, int64_t s, int64_t group, int64_t r, int64_t first, int64_t count, int64_t padded) {
    const int64_t token = a.cu_seqlens[s] + first, heads = a.groups * a.queries, head = group * a.queries + r;
    for (int64_t i = 0; i < count; i++)
      rotate_row(row(token + i, group, r), angles(a.cos, s, first + i), angles(a.sin, s, first + i), a.dim,
                 a.scale * LOG2_E, &x.rows[i * a.dim]);
    std::memset(&x.rows[count * a.dim], 0, (padded - count) * a.dim * sizeof(Element));
    pack_depth_columns<Engine>(x.rows.get(), a.dim, padded, a.dim, x.query_columns.get(), QUERIES);
    pack_depth_rows<Engine>(x.rows.get(), a.dim, padded, a.dim, x.query_pairs.get(), a.dim);
    for (int64_t i = 0; i < count; i++) {
      const int64_t at = ((token + i) * heads + head) * a.dim;
      const T *grad = static_cast<const T*>(a.grad_out) + at, *out = static_cast<const T*>(a.out) + at;
      Floats product = Floats{};
      for (int64_t d = 0; d < a.dim; d += WIDTH) product += widen(grad + d) * widen(out + d);
      x.delta[i] = sum(product);
      x.lse[i] = a.lse[head * a.tokens + token + i] * LOG2_E;
      convert(grad, a.dim, &x.rows[i * a.dim]);
    }
    // Rows past the end: all operands are zero, so whatever weight they get, they add nothing.
    for (int64_t i = count; i < padded; i++) x.delta[i] = x.lse[i] = 0;
    std::memset(&x.rows[count * a.dim], 0, (padded - count) * a.dim * sizeof(Element));
    pack_depth_columns<Engine>(x.rows.get(), a.dim, padded, a.dim, x.grad_columns.get(), QUERIES);
    pack_depth_rows<Engine>(x.rows.get(), a.dim, padded, a.dim, x.grad_pairs.get(), a.dim);
  }

  // `keys` keys from `key` on against the loaded queries; `behind` = first key's position minus first query's.
  void step(Scratch& x, int64_t key, int64_t keys, int64_t behind, int64_t queries, bool key_side, bool query_side) {
    const bool diagonal = behind + keys > 1;  // some query does not see some key
    const int64_t rows = diagonal ? TILE_ROWS : keys;
    for (int64_t j = 0; j < keys; j += rows)
      key_products(x, key, j, least(rows, keys - j), behind, queries, key_side);
    if (!query_side) return;
    const int64_t padded = round_up(keys, P), skip = hidden_columns(behind);
    if (padded > keys) std::memset(&x.score_grads[keys * QUERIES], 0, QUERIES * sizeof(Element));
    pack_depth_rows<Engine>(&x.score_grads[skip], QUERIES, padded, queries - skip, &x.score_pairs[skip], QUERIES);
    for (int64_t i = skip; i < queries; i += PANEL) {
      const int64_t columns = least(PANEL, queries - i), depth = least(padded, round_up(i + columns - behind, P));
      gemm<Engine, true>(lanes_of(&x.key_columns[key]), x.padded_keys / P, &x.score_pairs[i], QUERIES, depth / P,
                         &x.query_grad[i], QUERIES, a.dim, columns);
    }
  }
  // Queries before a key that stands `behind` the first one do not see it; whole vectors of them are left out.
  static int64_t hidden_columns(int64_t behind) { return most(0, behind) / 16 * 16; }

  // Rows [j, j + keys) of a block: their P' and dS', and what they add to dV and dK.
  void key_products(Scratch& x, int64_t key, int64_t j, int64_t keys, int64_t behind, int64_t queries, bool key_side) {
    const int64_t skip = least(queries, hidden_columns(behind + j)), columns = queries - skip, at = j * QUERIES + skip;
    const int64_t row = (key + j) * a.dim;
    if (columns > 0) {
      gemm<Engine, false>(lanes_of(&x.key[row]), lanes, &x.query_columns[skip], QUERIES, lanes, &x.scores[at], QUERIES,
                          keys, columns);
      gemm<Engine, false>(lanes_of(&x.value[row]), lanes, &x.grad_columns[skip], QUERIES, lanes, &x.weight_grads[at],
                          QUERIES, keys, columns);
    }
    for (int64_t n = j; n < j + keys; n++) {
      std::memset(&x.score_grads[n * QUERIES], 0, skip * sizeof(Element));
      differentiate(x, n, behind + n, skip, queries);
    }
    if (!key_side || columns <= 0) return;
    gemm<Engine, true>(lanes_of(&x.weights[at]), QUERIES / P, &x.grad_pairs[skip / P * a.dim], a.dim, columns / P,
                       &x.value_grad[row], a.dim, keys, a.dim);
    gemm<Engine, true>(lanes_of(&x.score_grads[at]), QUERIES / P, &x.query_pairs[skip / P * a.dim], a.dim, columns / P,
                       &x.key_grad[row], a.dim, keys, a.dim);
  }
  static const Lane* lanes_of(const Element* x) { return reinterpret_cast<const Lane*>(x); }

  // One key's row of P' and dS'; queries before `hidden` do not see it.
  static inline void differentiate(Scratch& x, int64_t j, int64_t hidden, int64_t skip, int64_t queries) {
    const int64_t at = j * QUERIES;
    for (int64_t i = skip; i < queries; i += WIDTH) {
      Floats weight = exp2(widen(&x.scores[at + i]) - widen(&x.lse[i]));
      if (hidden > i) weight = drop_first(weight, hidden - i);
      narrow(weight, &x.weights[at + i]);
      narrow(weight * (widen(&x.weight_grads[at + i]) - widen(&x.delta[i])), &x.score_grads[at + i]);
    }
  }

  void write_queries(Scratch& x, int64_t s, int64_t group, int64_t r, int64_t first, int64_t count, int64_t padded) {
    const int64_t token = a.cu_seqlens[s] + first;
    transpose(reinterpret_cast<const Lane*>(x.query_grad.get()), QUERIES, a.dim, padded,
              reinterpret_cast<Lane*>(x.rows_out.get()), a.dim);
    for (int64_t i = 0; i < count; i++)
      rotate_row_back(&x.rows_out[i * a.dim], angles(a.cos, s, first + i), angles(a.sin, s, first + i), a.dim, a.scale,
                      static_cast<T*>(a.grad_qkv) + offset(token + i, group, r));
  }

  void write_keys(Scratch& x, int64_t s, int64_t group, int64_t k0, int64_t k1) {
    for (int64_t j = 0; j < k1 - k0; j++) {
      const int64_t token = a.cu_seqlens[s] + k0 + j;
      T* grad = static_cast<T*>(a.grad_qkv);
      // The packed queries carry scale * log2(e).
      rotate_row_back(&x.key_grad[j * a.dim], angles(a.cos, s, k0 + j), angles(a.sin, s, k0 + j), a.dim, LN_2,
                      grad + offset(token, group, a.queries));
      convert(&x.value_grad[j * a.dim], a.dim, grad + offset(token, group, a.queries + 1));
    }
  }
};

}  // namespace internlm2::INTERNLM2_ISA

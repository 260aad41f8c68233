// Causal attention over packed sequences with RoPE, forward: online softmax over key blocks.
//
// Keys are rotated once while they are packed, transposed, into panels; values are packed beside them; queries are rotated
// and scaled by scale * log2(e) when a block of them is read, so the softmax is one exp2 and RoPE costs nothing of its own.
// With a cache, keys and values come from there, and the queries are those of the last tokens alone. Where these begin at a
// multiple of ROWS they get the bits that they get when the whole sequence is computed.
#pragma once

#include "../common/arguments.h"
#include "gemm.h"
#include "rotary.h"

#include <cmath>

namespace internlm2::INTERNLM2_ISA {

constexpr float LOG2_E = 1.44269504f, LN_2 = 0.693147181f;

template <class Engine, class T>
class RopeAttentionForward {
  using Element = typename Engine::Element;
  static constexpr int P = Engine::PER_LANE;
  static constexpr int64_t ROWS = 48, KEYS = 256;  // queries and keys of one step: scores and operands stay in L2
  static constexpr float MINUS_INFINITY = -__builtin_inff();

 public:
  explicit RopeAttentionForward(const RopeAttention& arguments)
      : a(arguments),
        lanes(a.dim / P),
        key_start(a.sequences + 1),
        block_start(a.sequences + 1) {
    key_start[0] = block_start[0] = 0;
    for (int64_t s = 0; s < a.sequences; s++) {
      key_start[s + 1] = key_start[s] + round_up(past(s) + length(s), PANEL);
      block_start[s + 1] = block_start[s] + (length(s) + ROWS - 1) / ROWS;
    }
    padded = key_start[a.sequences];
    keys.allocate(a.groups * padded * lanes);
    values.allocate(a.groups * padded / P * a.dim);
  }

  void run() {
    const int64_t panels = padded / PANEL, blocks = block_start[a.sequences];
    for_each(a.parallel, a.groups * panels, [&](int64_t item) { pack(item % panels * PANEL, item / panels); });
    // The last blocks of a sequence see the most keys: longest first keeps the threads level.
    for_each(a.parallel, a.groups * blocks, [&](int64_t item) { attend(blocks - 1 - item % blocks, item / blocks); });
  }

 private:
  const RopeAttention& a;
  int64_t lanes, padded;
  Buffer<int64_t> key_start, block_start;  // first padded key, first query block of each sequence
  Buffer<Lane> keys;                       // [G][panel][lanes][PANEL]
  Buffer<Lane> values;                     // [G][padded / P][D]

  int64_t length(int64_t s) const { return a.cu_seqlens[s + 1] - a.cu_seqlens[s]; }
  int64_t past(int64_t s) const { return a.past ? a.past[s] : 0; }
  // A key or, with `value`, a value in the cache.
  const T* cached(int64_t s, int64_t group, bool value, int64_t position) const {
    return static_cast<const T*>(a.cache) + (((a.slots[s] * a.groups + group) * 2 + value) * a.capacity + position) * a.dim;
  }
  const T* row(int64_t token, int64_t group, int64_t slot) const {
    return static_cast<const T*>(a.qkv) + token * a.token_stride + group * a.group_stride + slot * a.slot_stride;
  }
  const float* angles(const float* table, int64_t s, int64_t position) const {
    return table + ((a.table_offsets ? a.table_offsets[s] : 0) + position) * (a.dim / 2);
  }
  // The sequence s with start[s] <= x < start[s + 1]; empty ones own nothing.
  static int64_t owner(const Buffer<int64_t>& start, int64_t count, int64_t x) {
    int64_t low = 0, high = count;
    while (high - low > 1) {
      int64_t middle = (low + high) / 2;
      (start[middle] <= x ? low : high) = middle;
    }
    return low;
  }

  void pack(int64_t padded_key, int64_t group) {
    const int64_t s = owner(key_start, a.sequences, padded_key), first = padded_key - key_start[s];
    const int64_t count = least(PANEL, past(s) + length(s) - first), token = a.cu_seqlens[s] + first;
    alignas(64) Element rows[PANEL * 256];
    for (int64_t j = 0; j < count; j++) {
      if (a.cache)
        convert(cached(s, group, false, first + j), a.dim, rows + j * a.dim);
      else
        rotate_row(row(token + j, group, a.queries), angles(a.cos, s, first + j), angles(a.sin, s, first + j), a.dim, 1.f,
                   rows + j * a.dim);
    }
    std::memset(rows + count * a.dim, 0, (PANEL - count) * a.dim * sizeof(Element));
    pack_depth_columns<Engine>(rows, a.dim, PANEL, a.dim, keys.get() + (group * padded + padded_key) * lanes, PANEL);
    for (int64_t j = 0; j < count; j++)
      convert(a.cache ? cached(s, group, true, first + j) : row(token + j, group, a.queries + 1), a.dim, rows + j * a.dim);
    std::memset(rows + count * a.dim, 0, (PANEL - count) * a.dim * sizeof(Element));
    pack_depth_rows<Engine>(rows, a.dim, PANEL, a.dim, values.get() + (group * padded + padded_key) / P * a.dim, a.dim);
  }

  struct Scratch {
    Buffer<Element> query, weights;
    Buffer<float> scores, out;
    float largest[ROWS], total[ROWS];
    explicit Scratch(int64_t dim) : query(ROWS * dim), weights(ROWS * KEYS), scores(ROWS * KEYS), out(ROWS * dim) {}
  };

  void attend(int64_t block, int64_t group) {
    const int64_t s = owner(block_start, a.sequences, block), offset = (block - block_start[s]) * ROWS;
    const int64_t rows = least(ROWS, length(s) - offset), padded_rows = round_up(rows, TILE_ROWS);
    const int64_t first = past(s) + offset, end = first + rows;  // positions
    const int64_t token = a.cu_seqlens[s] + offset, heads = a.groups * a.queries;
    Scratch scratch(a.dim);
    for (int64_t r = 0; r < a.queries; r++) {
      const int64_t head = group * a.queries + r;
      for (int64_t i = 0; i < rows; i++)
        rotate_row(row(token + i, group, r), angles(a.cos, s, first + i), angles(a.sin, s, first + i), a.dim,
                   a.scale * LOG2_E, &scratch.query[i * a.dim]);
      std::memset(&scratch.query[rows * a.dim], 0, (padded_rows - rows) * a.dim * sizeof(Element));
      scratch.out.clear(padded_rows * a.dim);
      for (int64_t i = 0; i < padded_rows; i++) scratch.largest[i] = MINUS_INFINITY, scratch.total[i] = 0;
      for (int64_t key = 0; key < end; key += KEYS)
        step(scratch, group * padded + key_start[s] + key, first - key, round_up(least(KEYS, end - key), WIDTH),
             padded_rows);
      for (int64_t i = 0; i < rows; i++) {
        if (a.lse) a.lse[head * a.tokens + token + i] = (scratch.largest[i] + log2f(scratch.total[i])) * LN_2;
        T* out = static_cast<T*>(a.out) + ((token + i) * heads + head) * a.dim;
        const Floats inverse = splat(1.f / scratch.total[i]);
        for (int64_t d = 0; d < a.dim; d += WIDTH) narrow(inverse * widen(&scratch.out[i * a.dim + d]), out + d);
      }
    }
  }

  // One block of keys. `ahead` = first query's position minus first key's: query i sees keys 0 .. ahead + i.
  void step(Scratch& scratch, int64_t key, int64_t ahead, int64_t count, int64_t rows) {
    const Lane* query = reinterpret_cast<const Lane*>(scratch.query.get());
    const Lane* weights = reinterpret_cast<const Lane*>(scratch.weights.get());
    // What the last query of a tile of rows sees: the rest of the block is left out.
    const auto seen = [&](int64_t i) { return least(count, most(0, ahead + i / TILE_ROWS * TILE_ROWS + TILE_ROWS)); };
    for (int64_t j = 0; j < count; j += PANEL) {
      const Lane* panel = keys.get() + (key + j) * lanes;
      const int64_t columns = least(PANEL, count - j);
      // All rows see all of the panel, or it lies on the diagonal.
      if (seen(0) >= j + columns) {
        gemm<Engine, false>(query, lanes, panel, PANEL, lanes, &scratch.scores[j], KEYS, rows, columns);
        continue;
      }
      for (int64_t i = 0; i < rows; i += TILE_ROWS)
        if (seen(i) > j)
          gemm<Engine, false>(query + i * lanes, lanes, panel, PANEL, lanes, &scratch.scores[i * KEYS + j], KEYS,
                              TILE_ROWS, least(columns, round_up(seen(i) - j, WIDTH)));
    }
    for (int64_t i = 0; i < rows; i++) {
      if (seen(i) == 0) continue;
      const float correction = softmax(&scratch.scores[i * KEYS], &scratch.weights[i * KEYS],
                                       least(count, round_up(seen(i), WIDTH)), ahead + i + 1, scratch.largest[i],
                                       scratch.total[i]);
      if (correction != 1.f)
        for (int64_t d = 0; d < a.dim; d += WIDTH) {
          float* out = &scratch.out[i * a.dim + d];
          store(out, widen(out) * correction);
        }
    }
    for (int64_t d = 0; d < a.dim; d += PANEL)
      for (int64_t i = 0; i < rows; i += TILE_ROWS) {
        const int64_t depth = (seen(i) + P - 1) / P;
        if (depth > 0)
          gemm<Engine, true>(weights + i * KEYS / P, KEYS / P, values.get() + key / P * a.dim + d, a.dim, depth,
                             &scratch.out[i * a.dim + d], a.dim, TILE_ROWS, least(PANEL, a.dim - d));
      }
  }

  // exp2(scores - running maximum) of the first `valid` keys, 0 beyond; returns the factor for what was summed before.
  static float softmax(const float* scores, Element* weights, int64_t count, int64_t valid, float& largest, float& total) {
    if (valid <= 0) {
      std::memset(weights, 0, count * sizeof(Element));
      return 1.f;
    }
    const int64_t whole = least(valid, count) / WIDTH * WIDTH;
    Floats peak = splat(MINUS_INFINITY);
    for (int64_t j = 0; j < whole; j += WIDTH) peak = larger(peak, widen(scores + j));
    if (whole < count) peak = larger(peak, keep_first(widen(scores + whole), valid - whole, splat(MINUS_INFINITY)));
    const float previous = largest;
    largest = fmaxf(previous, maximum(peak));
    Floats sums = Floats{};
    for (int64_t j = 0; j < whole; j += WIDTH) {
      Floats e = exp2(widen(scores + j) - largest);
      sums += e;
      narrow(e, weights + j);
    }
    for (int64_t j = whole; j < count; j += WIDTH) {
      Floats e = keep_first(exp2(widen(scores + j) - largest), valid - j, Floats{});
      sums += e;
      narrow(e, weights + j);
    }
    const float correction = exp2f(previous - largest);
    total = total * correction + sum(sums);
    return correction;
  }
};

}  // namespace internlm2::INTERNLM2_ISA

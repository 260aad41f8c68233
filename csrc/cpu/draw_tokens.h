// One token a row from logits: the most likely, or drawn by inverting the distribution function over the vocabulary in its
// own order; with the log-probability of the token at temperature 1 and at the row's own.
#pragma once

#include "../common/arguments.h"
#include "simd.h"

#include <cmath>

namespace internlm2::INTERNLM2_ISA {

template <class T>
class DrawTokensKernel {
  static constexpr int64_t BLOCK = 512;  // sums are float inside a block and double across blocks
  static constexpr float MINUS_INFINITY = -__builtin_inff(), LOG2_E = 1.44269504f;

 public:
  explicit DrawTokensKernel(const DrawTokens& arguments) : a(arguments), blocks((a.size + BLOCK - 1) / BLOCK) {}

  void run() {
    for_each(a.parallel, a.rows, [&](int64_t row) { draw(row); });
  }

 private:
  const DrawTokens& a;
  int64_t blocks;

  // The logits of a block, -inf beyond the vocabulary; returns how many vectors there are.
  int64_t read(int64_t row, int64_t block, float* x) const {
    const T* source = static_cast<const T*>(a.logits) + row * a.size + block * BLOCK;
    const int64_t count = least(BLOCK, a.size - block * BLOCK), whole = count / WIDTH * WIDTH;
    for (int64_t i = 0; i < whole; i += WIDTH) store(x + i, widen(source + i));
    if (whole < count) {
      store(x + whole, splat(MINUS_INFINITY));
      for (int64_t i = whole; i < count; i++) x[i] = widen_one(source[i]);
    }
    return (count + WIDTH - 1) / WIDTH;
  }

  // exp((x - largest) / temperature) of a block in place; returns its sum.
  static float weigh(float* x, int64_t vectors, float largest, float rate) {
    Floats total = Floats{};
    for (int64_t i = 0; i < vectors; i++) {
      const Floats z = (widen(x + i * WIDTH) - largest) * rate;
      const Floats e = z < -126.f ? Floats{} : exp2(z);  // exp2 stops at 2 ** -126, which over a vocabulary adds up
      total += e;
      store(x + i * WIDTH, e);
    }
    return sum(total);
  }

  void draw(int64_t row) const {
    alignas(64) float x[BLOCK];
    float largest = MINUS_INFINITY;
    int64_t best = 0;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t vectors = read(row, block, x);
      Floats peak = widen(x);
      for (int64_t i = 1; i < vectors; i++) peak = larger(peak, widen(x + i * WIDTH));
      const float top = maximum(peak);
      if (top > largest) largest = top, best = block;
    }
    const float temperature = a.temperatures[row];
    const bool greedy = temperature == 0.f, tempered = !greedy && temperature != 1.f;
    const float rate = greedy ? LOG2_E : LOG2_E / temperature;
    Buffer<double> sums(blocks);
    double plain = 0, total = 0;
    for (int64_t block = 0; block < blocks; block++) {
      const int64_t vectors = read(row, block, x);
      if (tempered) {
        alignas(64) float copy[BLOCK];
        std::memcpy(copy, x, vectors * WIDTH * sizeof(float));
        plain += weigh(copy, vectors, largest, LOG2_E);
      }
      total += sums[block] = weigh(x, vectors, largest, rate);
    }
    if (!tempered) plain = total;
    const int64_t token = greedy ? first_of(row, best, largest) : find(row, sums, a.uniforms[row] * total, largest, rate);
    const float below = widen_one(static_cast<const T*>(a.logits)[row * a.size + token]) - largest;
    a.tokens[row] = token;
    a.logprobs[row] = (float)(below - std::log(plain));
    a.sampling_logprobs[row] = greedy ? 0.f : (float)((double)below / temperature - std::log(total));
  }

  int64_t first_of(int64_t row, int64_t block, float value) const {
    const T* logits = static_cast<const T*>(a.logits) + row * a.size;
    for (int64_t i = block * BLOCK; i < a.size; i++)
      if (widen_one(logits[i]) == value) return i;
    return block * BLOCK;  // not a number among them: nothing is most likely
  }

  // The first token at which the running sum exceeds `target`; never one of weight 0. Rounding may leave the target at or
  // above the last sum: the last token with weight is meant.
  int64_t find(int64_t row, const Buffer<double>& sums, double target, float largest, float rate) const {
    double before = 0;
    int64_t block = 0, last = 0;
    for (; block < blocks; block++) {
      if (before + sums[block] > target) break;
      before += sums[block];
      if (sums[block] > 0) last = block;
    }
    if (block == blocks) block = last, before = -__builtin_inf();
    alignas(64) float x[BLOCK];
    const int64_t vectors = read(row, block, x);
    weigh(x, vectors, largest, rate);
    int64_t token = block * BLOCK;
    for (int64_t i = 0; i < least(BLOCK, a.size - block * BLOCK); i++) {
      if (x[i] > 0) token = block * BLOCK + i;
      before += x[i];
      if (before > target) break;
    }
    return token;
  }
};

}  // namespace internlm2::INTERNLM2_ISA

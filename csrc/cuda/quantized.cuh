// What the product with quantized weights and their expansion share.
#pragma once

#include "primitives.cuh"

namespace quantized {

using cu::bf16;
constexpr int kTile = 16, kGroup = 128;  // outputs and inputs that lie together, see params.h

// Two neighbours of a row, of which only the first need exist.
__device__ __forceinline__ void store_pair(void* target, bool wide, int64_t place, bool both, float first,
                                           float second) {
  if (wide) {
    static_cast<float*>(target)[place] = first;
    if (both) static_cast<float*>(target)[place + 1] = second;
  } else if (both && place % 2 == 0) {
    reinterpret_cast<uint32_t*>(target)[place / 2] = cu::pack_bf16(first, second);
  } else {
    static_cast<bf16*>(target)[place] = cu::to_bf16(first);
    if (both) static_cast<bf16*>(target)[place + 1] = cu::to_bf16(second);
  }
}

}  // namespace quantized

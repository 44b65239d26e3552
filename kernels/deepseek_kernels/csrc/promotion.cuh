// Sums of 128 products each, as the tensor cores leave them, to FP32 sums of all, times the scales of A and B (V3 report, section 3.3.2).
// Of 8 columns a thread has two neighbours in two rows, "upper" and "lower".
#pragma once
#include "tile_scheduler.cuh"

namespace promotion {

using tile_scheduler::kTile;

// Scales of B by its blocks: a tile's columns lie in the block that it begins in, and in the next.
template <int kColumns>
struct BlockScales {
  const float* along[2];  // K
  bool amid;              // a tile of 192 begins in the middle of a block

  __device__ BlockScales(const tile_scheduler::Problem& p, const tile_scheduler::Piece& w) : amid(w.tile_n % 2) {
    const int blocks = p.b_rows / kTile;
    for (int i = 0; i < 2; ++i) {
      const int block = min(w.tile_n * kColumns / kTile + i, blocks - 1);  // beyond the last there is nothing: any will do
      along[i] = p.b_scales + (static_cast<int64_t>(w.expert) * blocks + block) * p.k_tiles;
    }
  }

  // Of the `product`-th product's columns, 64 each.
  template <int kCount>
  __device__ __forceinline__ void at(int k, int product, float (&scales)[kCount]) const {
    if constexpr (kCount == 3) {
      scales[0] = __ldg(along[0] + k), scales[2] = __ldg(along[1] + k);
      scales[1] = amid ? scales[2] : scales[0];
    } else {
      scales[0] = scales[1] = __ldg(along[product] + k);
    }
  }
};

// sum += part, scaled by A's scales of two rows and B's of blocks, one for 64 columns each.
template <int kCount>
__device__ __forceinline__ void promote(const float (&part)[kCount], float (&sum)[kCount], float upper, float lower,
                                        const float (&blocks)[kCount / 32]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) sum[i] += part[i] * ((i % 4 < 2 ? upper : lower) * blocks[i / 32]);
}

// The same, by B's scales of columns, in shared memory.
template <int kCount>
__device__ __forceinline__ void promote(const float (&part)[kCount], float (&sum)[kCount], float upper, float lower,
                                        const float* columns, int lane) {
#pragma unroll
  for (int j = 0; j < kCount / 4; ++j) {
    const float2 c = *reinterpret_cast<const float2*>(columns + j * 8 + lane % 4 * 2);
    sum[4 * j] += part[4 * j] * (upper * c.x), sum[4 * j + 1] += part[4 * j + 1] * (upper * c.y);
    sum[4 * j + 2] += part[4 * j + 2] * (lower * c.x), sum[4 * j + 3] += part[4 * j + 3] * (lower * c.y);
  }
}

}  // namespace promotion

// A product's tiles in the order in which clusters work on them.
#pragma once

namespace tile_scheduler {

constexpr int kTile = 128;   // of M, N and K
constexpr int kCluster = 2;  // blocks that share B
constexpr int kBand = 4;     // pairs of tiles of M that are worked on together, so that their operands stay in L2

struct Problem {
  int m, n;               // of C
  int pairs_m, tiles_n;   // pairs of tiles of M; tiles of N, as wide as they are
  int k_tiles;            // of the whole contraction axis
  int b_rows;             // of one expert's B in memory
  int experts;
  const float* b_scales;      // [E, b_rows / 128, k_tiles]: where B is scaled by blocks
  const int* tile_expert;     // whose B the tiles of M need; null: there is one
  const int* starts;          // [E + 1], where the contraction axis is cut into experts; null: it is not
  void* c;
};

struct Piece {
  int expert;    // whose sums or whose B
  int tile_m, tile_n, first_k, last_k;
  bool shared;   // the cluster's blocks need the same B
};

// The `index`-th piece of a cluster, for the block with this rank in it. Bands of M, tiles of N outside.
__device__ __forceinline__ Piece piece_at(const Problem& p, int index, int rank) {
  Piece w;
  const int each = p.pairs_m * p.tiles_n;
  w.expert = p.starts ? index / each : 0;
  index -= w.expert * each;
  const int band = index / (kBand * p.tiles_n);
  const int high = min(kBand, p.pairs_m - band * kBand);
  index -= band * kBand * p.tiles_n;
  w.tile_m = (band * kBand + index % high) * kCluster + rank;
  w.tile_n = index / high;
  w.first_k = p.starts ? p.starts[w.expert] / kTile : 0;
  w.last_k = p.starts ? p.starts[w.expert + 1] / kTile : p.k_tiles;
  w.shared = true;
  if (p.tile_expert) {
    const int last = (p.m + kTile - 1) / kTile - 1;  // below it there is nothing: any expert will do
    w.expert = p.tile_expert[min(w.tile_m, last)];
    w.shared = w.expert == p.tile_expert[min(w.tile_m ^ 1, last)];
  }
  return w;
}

__device__ __forceinline__ int count(const Problem& p) {
  return p.pairs_m * p.tiles_n * (p.starts ? p.experts : 1);
}

}  // namespace tile_scheduler

// Block-scaled FP8 products on Hopper: C[m, n] = sum over tiles g of a_scale[g, m] b_scale[.., g] (sum over k in g of A[m, k]
// B[n, k]), contraction last and contiguous in both (V3 report section 3.3.2, promotion every 128 elements).
//
// A block computes a tile of 128 rows and kColumns columns: 128, 192 or 256. One thread copies operands into a ring of stages; two
// warpgroups multiply, each its 64 rows: four matrix instructions add up the 128 elements of a scale tile, whose sum is then
// promoted to FP32 registers while the other warpgroup's instructions run. Two blocks form a cluster: their tiles lie
// one below the other and share B, of which each copies one half for both, as long as they are of one expert. Wide tiles and one
// product as wide as they are read least of L2 and of shared memory; registers end at 192 columns, so that 256 are two products.
#include <cstddef>

#include "hopper.cuh"
#include "tile_scheduler.cuh"
#include "promotion.cuh"
#include "epilogue.cuh"
#include "tensor_map.cuh"

namespace {

using tile_scheduler::kCluster, tile_scheduler::kTile, tile_scheduler::Piece, tile_scheduler::Problem;
using epilogue::Output, epilogue::kStoreBf16, epilogue::kStoreFp32, epilogue::kAddFp32;

constexpr int kWarps = 8;      // that multiply
constexpr int kCopiers = 128;  // threads beside them, of which one copies
constexpr int kOperandBytes = kTile * kTile;

// Whether B, like A, is scaled by rows, and not by blocks: where the contraction is along tokens.
template <Output kOutput>
constexpr bool kRowsB = kOutput == kAddFp32;

template <Output kOutput, int kColumns>
struct Shared {
  static constexpr int kStages = kOutput == kAddFp32 ? (kColumns == 256 ? 3 : 4) : (kColumns == 256 ? 4 : kColumns == 192 ? 5 : 6);
  struct Stage {
    uint8_t a[kOperandBytes];
    uint8_t b[kColumns * kTile];
  } stages[kStages];
  uint8_t results[kWarps][epilogue::kBytes<kOutput, kColumns>];  // of each warp, on their way out
  float a_scales[kStages][kTile];
  float b_scales[kRowsB<kOutput> ? kStages : 1][kRowsB<kOutput> ? kColumns : 1];
  uint64_t full[kStages], empty[kStages];
};

// One thread.
template <Output kOutput, int kColumns>
__device__ void copy_operands(const Problem& p, Shared<kOutput, kColumns>& s, const CUtensorMap* a,
                              const CUtensorMap* b, const CUtensorMap* a_scales, const CUtensorMap* b_scales) {
  using namespace hopper;
  constexpr int kStages = Shared<kOutput, kColumns>::kStages;
  constexpr uint32_t kBytes = kOperandBytes + kColumns * kTile + (kTile + kRowsB<kOutput> * kColumns) * sizeof(float);
  constexpr int kPart = kColumns / kCluster;  // rows of B that a block copies for both
  const int rank = cluster_rank();
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < tile_scheduler::count(p); index += gridDim.x / kCluster) {
    const Piece w = tile_scheduler::piece_at(p, index, rank);
    const int row_a = w.tile_m * kTile, column = w.tile_n * kColumns;
    const int row_b = (p.starts ? 0 : w.expert * p.b_rows) + column;
    for (int k = w.first_k; k < w.last_k; ++k, ++count) {
      const int at = count % kStages;
      auto& stage = s.stages[at];
      uint64_t* full = &s.full[at];
      barrier_wait(&s.empty[at], (count / kStages & 1) ^ 1);
      barrier_expect(full, kBytes);
      load_box(a, full, stage.a, k * kTile, row_a);
      if (w.shared) {
        load_box_for(b, full, stage.b + rank * kPart * kTile, k * kTile, row_b + rank * kPart, (1 << kCluster) - 1);
      } else {
        for (int part = 0; part < kCluster; ++part)
          load_box(b, full, stage.b + part * kPart * kTile, k * kTile, row_b + part * kPart);
      }
      load_box(a_scales, full, s.a_scales[at], row_a, k);
      if constexpr (kRowsB<kOutput>)
        for (int from = 0; from < kColumns; from += kTile)
          load_box(b_scales, full, s.b_scales[at] + from, column + from, k);
    }
  }
}

// part = a warpgroup's rows of A in a stage times rows of B from `first` on.
template <class S, int kCount>
__device__ __forceinline__ void multiply(S& s, int at, int group, int first, float (&part)[kCount]) {
  using namespace hopper;
  const uint64_t a = descriptor(shared_address(s.stages[at].a) + group * 64 * kTile);
  const uint64_t b = descriptor(shared_address(s.stages[at].b) + first * kTile);
  hold(part);
  products_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step) product(part, a + step * 2, b + step * 2, step);  // 32 bytes further each
  products_commit();
  products_wait<0>();
  hold(part);
}

// The stage has served: those who copy, in both blocks, may have it.
template <class S>
__device__ __forceinline__ void release(S& s, int at, int lane) {
  __syncwarp();
  if (lane < kCluster) hopper::barrier_arrive_at(&s.empty[at], lane);
}

// A warpgroup's sums are 64 rows of a tile: of at most 192 columns by one product, of 256 by two, one after the other.
template <Output kOutput, int kColumns>
__device__ void multiply_all(const Problem& p, Shared<kOutput, kColumns>& s, const CUtensorMap* boxes_of_c) {
  using namespace hopper;
  constexpr int kStages = Shared<kOutput, kColumns>::kStages;
  constexpr int kProducts = kColumns == 256 ? 2 : 1, kWidth = kColumns / kProducts, kCount = kWidth / 2;
  const int rank = cluster_rank(), lane = threadIdx.x % 32, warp = (threadIdx.x - kCopiers) / 32;
  const int group = warp / 4, row_in_tile = warp * 16;  // the first warpgroup has rows 0 to 63
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < tile_scheduler::count(p); index += gridDim.x / kCluster) {
    const Piece w = tile_scheduler::piece_at(p, index, rank);
    if (w.first_k == w.last_k) continue;  // an expert without rows
    const promotion::BlockScales<kColumns> blocks(p, w);
    float sum[kProducts][kCount] = {};
    for (int k = w.first_k; k < w.last_k; ++k, ++count) {
      const int at = count % kStages;
      barrier_wait(&s.full[at], count / kStages & 1);
      const float upper = s.a_scales[at][row_in_tile + lane / 4], lower = s.a_scales[at][row_in_tile + lane / 4 + 8];
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const bool done = i == kProducts - 1;
        float part[kCount], scales[kCount / 32];
        if constexpr (!kRowsB<kOutput>) blocks.at(k, i, scales);
        multiply(s, at, group, i * kWidth, part);
        if constexpr (kRowsB<kOutput>) {
          promotion::promote(part, sum[i], upper, lower, s.b_scales[at] + i * kWidth, lane);
          if (done) release(s, at, lane);
        } else {
          if (done) release(s, at, lane);
          promotion::promote(part, sum[i], upper, lower, scales);
        }
      }
    }
    float* sums = static_cast<float*>(p.c);
    if (kRowsB<kOutput> && p.starts) sums += static_cast<int64_t>(w.expert) * p.m * p.n;
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const epilogue::Target to{sums, boxes_of_c, p.m, p.n, w.tile_m * kTile + row_in_tile, w.tile_n * kColumns + i * kWidth};
      epilogue::leave<kOutput, kColumns>(to, sum[i], s.results[warp], lane);
    }
  }
  writes_done();
}

template <Output kOutput, int kColumns>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kCopiers + 32 * kWarps, 1)
    block_scaled_gemm(const __grid_constant__ Problem p, const __grid_constant__ CUtensorMap a,
                      const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap a_scales,
                      const __grid_constant__ CUtensorMap b_scales, const __grid_constant__ CUtensorMap c) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using S = Shared<kOutput, kColumns>;
  S& s = *reinterpret_cast<S*>(memory);
  if (threadIdx.x == 0) {
    hopper::prefetch(&a), hopper::prefetch(&b), hopper::prefetch(&a_scales);
    for (int i = 0; i < S::kStages; ++i) {
      hopper::barrier_init(&s.full[i], 1);
      hopper::barrier_init(&s.empty[i], kCluster * kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  hopper::cluster_sync();
  if (threadIdx.x < kCopiers) {
    hopper::fewer_registers<40>();
    if (threadIdx.x == 0) copy_operands<kOutput, kColumns>(p, s, &a, &b, &a_scales, &b_scales);
  } else {
    hopper::more_registers<232>();
    multiply_all<kOutput, kColumns>(p, s, &c);
  }
  __syncwarp();
  hopper::cluster_sync();  // no block leaves while its neighbour may still signal it
}

template <Output kOutput, int kColumns>
cudaError_t launch_as(const Problem& p, const CUtensorMap (&maps)[5], int blocks, cudaStream_t stream) {
  using S = Shared<kOutput, kColumns>;
  static_assert(sizeof(S) <= 232448, "more shared memory than a block has");
  static_assert(kOutput != kStoreBf16 || offsetof(S, results) % 1024 == 0, "boxes are swizzled by their address");
  const auto kernel = block_scaled_gemm<kOutput, kColumns>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, sizeof(S));
  if (set != cudaSuccess) return set;
  kernel<<<blocks, kCopiers + 32 * kWarps, sizeof(S), stream>>>(p, maps[0], maps[1], maps[2], maps[3], maps[4]);
  return cudaGetLastError();
}

template <Output kOutput>
cudaError_t launch(const Problem& p, const CUtensorMap (&maps)[5], int columns, int blocks, cudaStream_t stream) {
  if constexpr (!kRowsB<kOutput>)
    if (columns == 192) return launch_as<kOutput, 192>(p, maps, blocks, stream);
  return columns == 256 ? launch_as<kOutput, 256>(p, maps, blocks, stream) : launch_as<kOutput, 128>(p, maps, blocks, stream);
}

// How many columns a block takes: 256, unless the rounds of all clusters then are so unevenly filled that fewer are faster.
int columns_for(int pairs_m, int n, int experts, int clusters, bool rows_b) {
  const struct {
    int columns;
    double cost;  // of a round, as measured on an H100
  } widths[] = {{256, 1.76}, {192, 1.355}, {128, 1.0}};
  int best = 0;
  double least = 0;
  for (const auto& [columns, cost] : widths) {
    if (rows_b && columns == 192) continue;  // scales of rows are copied 128 at a time
    const int64_t pieces = static_cast<int64_t>(pairs_m) * ((n + columns - 1) / columns) * experts;
    const double time = cost * static_cast<double>((pieces + clusters - 1) / clusters);
    if (!best || time < least) best = columns, least = time;
  }
  return best;
}

}  // namespace

// a: E4M3 [m, k], a_scales FP32 [k / 128, m]. output: 0 BF16 or 1 FP32, with b E4M3 [experts * b_rows, k] and its scales of blocks;
// 2 added to FP32, with b [n, k] and b_scales FP32 [k / 128, n]. Rows of scales by row begin at multiples of 16 bytes. Returns 0,
// a CUDA error, -1 without the driver's library, -2 for a matrix that cannot be described.
extern "C" int deepseek_block_scaled_gemm(const void* a, const float* a_scales, const void* b, const float* b_scales, void* c,
                                          const int* tile_expert, const int* starts, int m, int n, int k, int b_rows,
                                          int experts, int output, int blocks, void* stream) {
  using namespace tensor_map;
  if (!encoder()) return -1;
  const bool rows_b = output == kAddFp32;
  const int pairs_m = (m + kCluster * kTile - 1) / (kCluster * kTile), cuts = starts ? experts : 1;
  const int columns = columns_for(pairs_m, n, cuts, blocks / kCluster, rows_b), tiles_n = (n + columns - 1) / columns;
  const Problem p{m, n, pairs_m, tiles_n, k / kTile, b_rows, experts, b_scales, tile_expert, starts, c};
  CUtensorMap maps[5];
  const uint64_t rows_of_b = rows_b ? n : static_cast<uint64_t>(experts) * b_rows;
  bool good = describe(&maps[0], kFp8, a, m, k, kTile) && describe(&maps[1], kFp8, b, rows_of_b, k, columns / kCluster) &&
              describe(&maps[2], kFp32, a_scales, k / kTile, (m + 3) / 4 * 4, 1);
  maps[3] = maps[4] = maps[2];
  if (rows_b) good = good && describe(&maps[3], kFp32, b_scales, k / kTile, (n + 3) / 4 * 4, 1);
  if (output == kStoreBf16 && epilogue::boxes_reach(c, n)) good = good && describe(&maps[4], kBf16, c, m, n, epilogue::kRows);
  if (!good) return -2;
  blocks = min(blocks / kCluster * kCluster, pairs_m * tiles_n * cuts * kCluster);
  const auto s = static_cast<cudaStream_t>(stream);
  switch (output) {
    case kStoreBf16: return launch<kStoreBf16>(p, maps, columns, blocks, s);
    case kStoreFp32: return launch<kStoreFp32>(p, maps, columns, blocks, s);
    case kAddFp32: return launch<kAddFp32>(p, maps, columns, blocks, s);
  }
  return cudaErrorInvalidValue;
}

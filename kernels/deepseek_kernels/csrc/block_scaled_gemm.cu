// Block-scaled FP8 products on Hopper: C[m, n] = sum over tiles g of a_scale[g, m] b_scale[.., g] (sum over k in g of A[m, k]
// B[n, k]), contraction last and contiguous in both (V3 report section 3.3.2, promotion every 128 elements).
//
// A block computes a tile of 128 rows and kColumns columns: 128, 192 or 256. One thread copies operands into a ring of stages; two
// warpgroups multiply, each its 64 rows: four matrix instructions add up the 128 elements of a scale tile, whose sum is then
// promoted to FP32 registers while the other warpgroup's instructions run. Two blocks form a cluster: their tiles lie
// one below the other and share B, of which each copies one half for both, as long as they are of one expert. Wide tiles and one
// product as wide as they are read least of L2 and of shared memory; registers end at 192 columns, so that 256 are two products.
#include <dlfcn.h>

#include "hopper.cuh"
#include "results.cuh"

namespace {

using results::Output, results::kStoreBf16, results::kStoreFp32, results::kAddFp32;

constexpr int kTile = 128;      // of M, N and K
constexpr int kCluster = 2;     // blocks that share B
constexpr int kWarps = 8;       // that multiply
constexpr int kBand = 4;        // pairs of tiles of M that are worked on together, so that their operands stay in L2
constexpr int kOperandBytes = kTile * kTile;
constexpr int kCopiers = 128;   // threads beside them, of which one copies

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

template <bool kRowsB, Output kOutput, int kColumns>
struct Shared {
  static constexpr int kStages = kOutput == kAddFp32 ? (kColumns == 256 ? 3 : 4) : (kColumns == 256 ? 4 : kColumns == 192 ? 5 : 6);
  struct Stage {
    uint8_t a[kOperandBytes];
    uint8_t b[kColumns * kTile];
  } stages[kStages];
  uint8_t results[kWarps][results::kBytes<kOutput, kColumns>];  // of each warp, on their way out
  float a_scales[kStages][kTile];
  float b_scales[kRowsB ? kStages : 1][kRowsB ? kColumns : 1];
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  int expert;    // whose sums or whose B
  int tile_m, tile_n, first_k, last_k;
  bool shared;   // the cluster's blocks need the same B
};

// The `index`-th piece of work of a cluster, for the block with this rank in it. Bands of M, tiles of N outside.
__device__ __forceinline__ Work work_at(const Problem& p, int index, int rank) {
  Work w;
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

__device__ __forceinline__ int pieces(const Problem& p) {
  return p.pairs_m * p.tiles_n * (p.starts ? p.experts : 1);
}

// One thread.
template <bool kRowsB, Output kOutput, int kColumns>
__device__ void copy_operands(const Problem& p, Shared<kRowsB, kOutput, kColumns>& s, const CUtensorMap* a,
                              const CUtensorMap* b, const CUtensorMap* a_scales, const CUtensorMap* b_scales) {
  using namespace hopper;
  constexpr int kStages = Shared<kRowsB, kOutput, kColumns>::kStages;
  constexpr uint32_t kBytes = kOperandBytes + kColumns * kTile + (kTile + kRowsB * kColumns) * sizeof(float);
  constexpr int kPart = kColumns / kCluster;  // rows of B that a block copies for both
  const int rank = cluster_rank();
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < pieces(p); index += gridDim.x / kCluster) {
    const Work w = work_at(p, index, rank);
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
      if constexpr (kRowsB)
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

// Scales of B by its blocks, for the columns of a tile from `first` on: of the first 64, the next 64 and, in tiles of 192, the last.
template <int kColumns>
struct BlockScales {
  const float *first, *last;  // along K
  bool second;                // whose the second 64 columns are

  __device__ BlockScales(const Problem& p, const Work& w, int column) {
    const int blocks = p.b_rows / kTile;
    const float* expert = p.b_scales + static_cast<int64_t>(w.expert) * blocks * p.k_tiles;
    const int from = (w.tile_n * kColumns + column) / kTile;  // beyond the last there is nothing: any will do
    first = expert + min(from, blocks - 1) * static_cast<int64_t>(p.k_tiles);
    last = expert + min(from + 1, blocks - 1) * static_cast<int64_t>(p.k_tiles);
    second = w.tile_n % 2;
  }

  template <int kCount>
  __device__ __forceinline__ void at(int k, float (&scales)[kCount]) const {
    scales[0] = __ldg(first + k);
    if constexpr (kCount == 2) {
      scales[1] = scales[0];
    } else {
      scales[2] = __ldg(last + k);
      scales[1] = second ? scales[2] : scales[0];
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

// The same by B's scales of columns, in shared memory.
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

// The stage has served: those who copy, in both blocks, may have it.
template <class S>
__device__ __forceinline__ void release(S& s, int at, int lane) {
  __syncwarp();
  if (lane < kCluster) hopper::barrier_arrive_at(&s.empty[at], lane);
}

// A warpgroup's sums are 64 rows of a tile: of at most 192 columns by one product, of 256 by two, one after the other.
template <bool kRowsB, Output kOutput, int kColumns>
__device__ void multiply_all(const Problem& p, Shared<kRowsB, kOutput, kColumns>& s, const CUtensorMap* c) {
  using namespace hopper;
  constexpr int kStages = Shared<kRowsB, kOutput, kColumns>::kStages;
  constexpr int kProducts = kColumns == 256 ? 2 : 1, kWidth = kColumns / kProducts, kCount = kWidth / 2;
  const int rank = cluster_rank(), lane = threadIdx.x % 32, warp = (threadIdx.x - kCopiers) / 32;
  const int group = warp / 4, row_in_tile = warp * 16;  // the first warpgroup has rows 0 to 63
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < pieces(p); index += gridDim.x / kCluster) {
    const Work w = work_at(p, index, rank);
    if (w.first_k == w.last_k) continue;  // an expert without rows
    const BlockScales<kColumns> blocks[2] = {{p, w, 0}, {p, w, kTile}};  // of 256 columns both, else the first
    float sum[kProducts][kCount] = {};
    for (int k = w.first_k; k < w.last_k; ++k, ++count) {
      const int at = count % kStages;
      barrier_wait(&s.full[at], count / kStages & 1);
      const float upper = s.a_scales[at][row_in_tile + lane / 4], lower = s.a_scales[at][row_in_tile + lane / 4 + 8];
#pragma unroll
      for (int i = 0; i < kProducts; ++i) {
        const bool done = i == kProducts - 1;
        float part[kCount], scales[kCount / 32];
        if constexpr (!kRowsB) blocks[i].at(k, scales);
        multiply(s, at, group, i * kWidth, part);
        if constexpr (kRowsB) {
          promote(part, sum[i], upper, lower, s.b_scales[at] + i * kWidth, lane);
          if (done) release(s, at, lane);
        } else {
          if (done) release(s, at, lane);
          promote(part, sum[i], upper, lower, scales);
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kProducts; ++i) {
      const results::Target to{p.c, c, p.m, p.n, w.tile_m * kTile + row_in_tile, w.tile_n * kColumns + i * kWidth};
      if constexpr (kOutput == kStoreBf16) {
        results::store_bf16<results::kBoxes<kColumns>>(to, sum[i], s.results[warp], lane);
      } else if constexpr (kOutput == kStoreFp32) {
        results::store<false>(to, static_cast<float*>(p.c), sum[i], lane);
      } else {
        const int64_t base = p.starts ? static_cast<int64_t>(w.expert) * p.m * p.n : 0;
        results::add_fp32(to, static_cast<float*>(p.c) + base, sum[i], s.results[warp], lane);
      }
    }
  }
  writes_done();
}

template <bool kRowsB, Output kOutput, int kColumns>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(kCopiers + 32 * kWarps, 1)
    block_scaled_gemm(const __grid_constant__ Problem p, const __grid_constant__ CUtensorMap a,
                      const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap a_scales,
                      const __grid_constant__ CUtensorMap b_scales, const __grid_constant__ CUtensorMap c) {
  extern __shared__ __align__(1024) uint8_t memory[];
  using S = Shared<kRowsB, kOutput, kColumns>;
  S& s = *reinterpret_cast<S*>(memory);
  if (threadIdx.x == 0) {
    hopper::expect_boxes_of(&a), hopper::expect_boxes_of(&b), hopper::expect_boxes_of(&a_scales);
    for (int i = 0; i < S::kStages; ++i) {
      hopper::barrier_init(&s.full[i], 1);
      hopper::barrier_init(&s.empty[i], kCluster * kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  hopper::cluster_sync();
  if (threadIdx.x < kCopiers) {
    hopper::fewer_registers<40>();
    if (threadIdx.x == 0) copy_operands<kRowsB, kOutput, kColumns>(p, s, &a, &b, &a_scales, &b_scales);
  } else {
    hopper::more_registers<232>();
    multiply_all<kRowsB, kOutput, kColumns>(p, s, &c);
  }
  __syncwarp();
  hopper::cluster_sync();  // no block leaves while its neighbour may still signal it
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A row-major matrix of which boxes are copied, with rows of 128 bytes in shared memory, or of 128 scales.
bool describe(Encode encode, CUtensorMap* map, CUtensorMapDataType type, const void* data, uint64_t rows, uint64_t columns,
              uint32_t box_rows) {
  const uint32_t bytes = type == CU_TENSOR_MAP_DATA_TYPE_FLOAT32 ? 4 : type == CU_TENSOR_MAP_DATA_TYPE_BFLOAT16 ? 2 : 1;
  const cuuint64_t size[2] = {columns, rows}, pitch[1] = {columns * bytes};
  const cuuint32_t box[2] = {bytes == 2 ? kTile / 2u : kTile, box_rows}, step[2] = {1, 1};
  return encode(map, type, 2, const_cast<void*>(data), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                bytes == 4 ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool kRowsB, Output kOutput, int kColumns>
cudaError_t launch_as(const Problem& p, const CUtensorMap (&maps)[5], int blocks, cudaStream_t stream) {
  constexpr int kBytes = sizeof(Shared<kRowsB, kOutput, kColumns>);
  static_assert(kBytes <= 232448, "more shared memory than a block has");
  const auto kernel = block_scaled_gemm<kRowsB, kOutput, kColumns>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (set != cudaSuccess) return set;
  kernel<<<blocks, kCopiers + 32 * kWarps, kBytes, stream>>>(p, maps[0], maps[1], maps[2], maps[3], maps[4]);
  return cudaGetLastError();
}

template <bool kRowsB, Output kOutput>
cudaError_t launch(const Problem& p, const CUtensorMap (&maps)[5], int columns, int blocks, cudaStream_t stream) {
  if constexpr (!kRowsB)
    if (columns == 192) return launch_as<kRowsB, kOutput, 192>(p, maps, blocks, stream);
  return columns == 256 ? launch_as<kRowsB, kOutput, 256>(p, maps, blocks, stream)
                        : launch_as<kRowsB, kOutput, 128>(p, maps, blocks, stream);
}

// How many columns a block takes: 256, unless the rounds of all clusters then are so unevenly filled that fewer are faster.
int columns_for(int pairs_m, int n, int experts, int clusters, bool rows_b) {
  const struct {
    int columns;
    double cost, cost_by_rows;  // of a round, as measured on an H100; 0: scales of rows are copied 128 at a time
  } widths[] = {{256, 1.76, 1.64}, {192, 1.355, 0}, {128, 1.0, 1.0}};
  int best = 0;
  double least = 0;
  for (const auto& [columns, by_blocks, by_rows] : widths) {
    const double cost = rows_b ? by_rows : by_blocks;
    if (!cost) continue;
    const int64_t pieces = static_cast<int64_t>(pairs_m) * ((n + columns - 1) / columns) * experts;
    const double time = cost * static_cast<double>((pieces + clusters - 1) / clusters);
    if (!best || time < least) best = columns, least = time;
  }
  return best;
}

}  // namespace

// a: E4M3 [m, k], a_scales FP32 [k / 128, m]. b: E4M3 [experts * b_rows, k] with scales of blocks, or (rows_b) [n, k] with
// b_scales FP32 [k / 128, n]. output: 0 BF16, 1 FP32, 2 added to FP32. columns of a block: 128, 192 (not with rows_b) or 256,
// 0: by the number of blocks. Rows of scales by row begin at multiples of 16 bytes. Returns 0, a CUDA error, -1 without the
// driver's library, -2 for a matrix that cannot be described.
extern "C" int deepseek_block_scaled_gemm(const void* a, const float* a_scales, const void* b, const float* b_scales, void* c,
                                          const int* tile_expert, const int* starts, int m, int n, int k, int b_rows,
                                          int experts, int rows_b, int output, int columns, int blocks, void* stream) {
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
  }();
  if (!encode) return -1;
  const int pairs_m = (m + kCluster * kTile - 1) / (kCluster * kTile), cuts = starts ? experts : 1;
  if (!columns) columns = columns_for(pairs_m, n, cuts, blocks / kCluster, rows_b);
  const int tiles_n = (n + columns - 1) / columns;
  const Problem p{m, n, pairs_m, tiles_n, k / kTile, b_rows, experts, b_scales, tile_expert, starts, c};
  CUtensorMap maps[5];
  constexpr auto kFp8 = CU_TENSOR_MAP_DATA_TYPE_UINT8, kFp32 = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;
  const uint64_t rows_of_b = rows_b ? n : static_cast<uint64_t>(experts) * b_rows;
  bool good = describe(encode, &maps[0], kFp8, a, m, k, kTile) &&
              describe(encode, &maps[1], kFp8, b, rows_of_b, k, columns / kCluster) &&
              describe(encode, &maps[2], kFp32, a_scales, k / kTile, (m + 3) / 4 * 4, 1);
  maps[3] = maps[4] = maps[2];
  if (rows_b) good = good && describe(encode, &maps[3], kFp32, b_scales, k / kTile, (n + 3) / 4 * 4, 1);
  if (output == kStoreBf16 && results::boxes_reach(c, n))
    good = good && describe(encode, &maps[4], CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, c, m, n, results::kRows);
  if (!good) return -2;
  blocks = min(blocks / kCluster * kCluster, pairs_m * tiles_n * cuts * kCluster);
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows_b) {
    return output == kAddFp32 ? launch<true, kAddFp32>(p, maps, columns, blocks, s)
                              : launch<true, kStoreFp32>(p, maps, columns, blocks, s);
  }
  return output == kStoreBf16 ? launch<false, kStoreBf16>(p, maps, columns, blocks, s)
                              : launch<false, kStoreFp32>(p, maps, columns, blocks, s);
}

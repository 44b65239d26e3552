// Block-scaled FP8 products on Hopper: C[m, n] = sum over tiles g of a_scale[g, m] b_scale[.., g] (sum over k in g of A[m, k]
// B[n, k]), contraction last and contiguous in both (V3 report section 3.3.2, promotion every 128 elements).
//
// A block computes a tile of 128 x 128. One thread copies operands into a ring of stages; two warpgroups multiply, each its
// 64 rows: four matrix instructions add up the 128 elements of a scale tile, whose sum is then promoted to FP32
// registers while the other warpgroup's instructions run. Two neighbouring blocks form a cluster: they compute tiles beside
// each other in N and share A, of which each copies one half for both.
#include <dlfcn.h>

#include "hopper.cuh"

namespace {

constexpr int kTile = 128;      // of M, N and K
constexpr int kCluster = 2;     // blocks that share A
constexpr int kWarps = 8;       // that multiply
constexpr int kBand = 8;        // tiles of M that are worked on together, so that their operands stay in L2
constexpr int kOperandBytes = kTile * kTile;

enum Output { kStoreBf16, kStoreFp32, kAddFp32 };

// Bytes of a row of results in shared memory, with as much beside it that no bank is asked twice at once.
template <Output kOutput>
constexpr int kPitchOf = kOutput == kAddFp32 ? 4 * kTile + 32 : 2 * kTile + 16;

struct Problem {
  int m, n;               // of C
  int tiles_m, pairs_n;   // pairs of tiles
  int k_tiles;            // of the whole contraction axis
  int b_rows;             // of one expert's B in memory
  int experts;
  const float* b_scales;      // [E, b_rows / 128, k_tiles]: where B is scaled by blocks
  const int* tile_expert;     // whose B the tiles of M need; null: there is one
  const int* starts;          // [E + 1], where the contraction axis is cut into experts; null: it is not
  void* c;
};

struct Stage {
  uint8_t a[kOperandBytes];
  uint8_t b[kOperandBytes];
};

template <Output kOutput>
struct Shared {
  static constexpr int kStages = kOutput == kAddFp32 ? 4 : 5;
  Stage stages[kStages];
  float a_scales[kStages][kTile];
  float b_scales[kStages][kTile];
  uint8_t results[kWarps][16 * kPitchOf<kOutput>];  // of each warp, on their way out
  uint64_t full[kStages], empty[kStages];
};

struct Work {
  int expert, tile_m, tile_n, first_k, last_k;
};

// The `index`-th piece of work of a cluster, for the block with this rank in it. Bands of M, tiles of N outside.
__device__ __forceinline__ Work work_at(const Problem& p, int index, int rank) {
  Work w;
  const int each = p.tiles_m * p.pairs_n;
  w.expert = p.starts ? index / each : 0;
  index -= w.expert * each;
  const int band = index / (kBand * p.pairs_n);
  const int high = min(kBand, p.tiles_m - band * kBand);
  index -= band * kBand * p.pairs_n;
  w.tile_m = band * kBand + index % high;
  w.tile_n = index / high * kCluster + rank;
  w.first_k = p.starts ? p.starts[w.expert] / kTile : 0;
  w.last_k = p.starts ? p.starts[w.expert + 1] / kTile : p.k_tiles;
  if (p.tile_expert) w.expert = p.tile_expert[w.tile_m];
  return w;
}

__device__ __forceinline__ int pieces(const Problem& p) {
  return p.tiles_m * p.pairs_n * (p.starts ? p.experts : 1);
}

// One thread.
template <bool kRowsB, Output kOutput>
__device__ void copy_operands(const Problem& p, Shared<kOutput>& s, const CUtensorMap* a, const CUtensorMap* b,
                              const CUtensorMap* a_scales, const CUtensorMap* b_scales) {
  using namespace hopper;
  constexpr int kStages = Shared<kOutput>::kStages;
  constexpr uint32_t kBytes = 2 * kOperandBytes + (kRowsB ? 2 : 1) * kTile * sizeof(float);
  constexpr int kHalf = kTile / kCluster;
  const int rank = cluster_rank();
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < pieces(p); index += gridDim.x / kCluster) {
    const Work w = work_at(p, index, rank);
    const int row_a = w.tile_m * kTile, row_b = (p.starts ? 0 : w.expert * p.b_rows) + w.tile_n * kTile;
    for (int k = w.first_k; k < w.last_k; ++k, ++count) {
      const int at = count % kStages;
      barrier_wait(&s.empty[at], (count / kStages & 1) ^ 1);
      barrier_expect(&s.full[at], kBytes);
      load_box_for(a, &s.full[at], s.stages[at].a + rank * kHalf * kTile, k * kTile, row_a + rank * kHalf,
                   (1 << kCluster) - 1);
      load_box(b, &s.full[at], s.stages[at].b, k * kTile, row_b);
      load_box(a_scales, &s.full[at], s.a_scales[at], row_a, k);
      if constexpr (kRowsB) load_box(b_scales, &s.full[at], s.b_scales[at], w.tile_n * kTile, k);
    }
  }
}

// A warp's 16 x 128 sums as BF16, turned in shared memory so that a row leaves in pieces of 16 bytes.
__device__ __forceinline__ void store_bf16(const Problem& p, const float (&sum)[64], uint8_t* turned, int row, int column,
                                           int lane) {
  constexpr int kPitch = kPitchOf<kStoreBf16>;
#pragma unroll
  for (int j = 0; j < 16; ++j) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      uint8_t* to = turned + (lane / 4 + half * 8) * kPitch + (j * 8 + lane % 4 * 2) * 2;
      *reinterpret_cast<__nv_bfloat162*>(to) = __floats2bfloat162_rn(sum[4 * j + 2 * half], sum[4 * j + 2 * half + 1]);
    }
  }
  __syncwarp();
  auto* c = static_cast<__nv_bfloat16*>(p.c);
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const int r = i * 2 + lane / 16, at = column + lane % 16 * 8;
    const uint8_t* from = turned + r * kPitch + lane % 16 * 16;
    if (row + r >= p.m) continue;
    __nv_bfloat16* to = c + static_cast<int64_t>(row + r) * p.n + at;
    if (p.n % 8 == 0) {
      if (at < p.n) *reinterpret_cast<int4*>(to) = *reinterpret_cast<const int4*>(from);
    } else {
      for (int e = 0; e < 8 && at + e < p.n; ++e) to[e] = reinterpret_cast<const __nv_bfloat16*>(from)[e];
    }
  }
  __syncwarp();
}

template <bool kAdd>
__device__ __forceinline__ void store_fp32(const Problem& p, const float (&sum)[64], int64_t base, int row, int column,
                                           int lane) {
  float* c = static_cast<float*>(p.c) + base;
#pragma unroll
  for (int i = 0; i < 64; ++i) {
    const int r = row + lane / 4 + i / 2 % 2 * 8, at = column + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (r >= p.m || at >= p.n) continue;
    float* to = c + static_cast<int64_t>(r) * p.n + at;
    *to = kAdd ? *to + sum[i] : sum[i];
  }
}

// A warp's 16 x 128 sums, added to FP32 by the copy engine while the warp goes on to its next tile.
__device__ __forceinline__ void add_fp32(const Problem& p, const float (&sum)[64], uint8_t* results, int64_t base, int row,
                                         int column, int lane) {
  constexpr int kPitch = kPitchOf<kAddFp32>;
  if (p.n % 4) return store_fp32<true>(p, sum, base, row, column, lane);
  hopper::add_rows_read();  // of the tile before
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    uint8_t* to = results + (lane / 4 + i % 2 * 8) * kPitch + (i / 2 * 8 + lane % 4 * 2) * 4;
    *reinterpret_cast<float2*>(to) = make_float2(sum[2 * i], sum[2 * i + 1]);
  }
  hopper::show_to_copies();
  __syncwarp();
  const int columns = min(kTile, p.n - column);
  if (lane < 16 && row + lane < p.m && columns > 0)
    hopper::add_row(static_cast<float*>(p.c) + base + static_cast<int64_t>(row + lane) * p.n + column,
                    results + lane * kPitch, columns * sizeof(float));
  hopper::add_rows_commit();
}

// Waits for the operands in a stage and starts their product.
template <Output kOutput>
__device__ __forceinline__ void start(Shared<kOutput>& s, int count, int group, float (&part)[64]) {
  using namespace hopper;
  constexpr int kStages = Shared<kOutput>::kStages;
  const int at = count % kStages;
  barrier_wait(&s.full[at], count / kStages & 1);
  const uint64_t a = descriptor(shared_address(s.stages[at].a) + group * 64 * kTile);
  const uint64_t b = descriptor(shared_address(s.stages[at].b));
  hold(part);
  products_begin();
#pragma unroll
  for (int step = 0; step < 4; ++step) product(part, a + step * 2, b + step * 2, step);  // 32 bytes further each
  products_commit();
}

// Gives the stage of a finished product back, to the copies of both blocks, and promotes it. `scale`: of the block of B.
template <bool kRowsB, Output kOutput>
__device__ __forceinline__ void promote(Shared<kOutput>& s, int count, int row, int lane, float scale, float (&part)[64],
                                        float (&sum)[64]) {
  const int at = count % Shared<kOutput>::kStages;
  hopper::hold(part);
  float upper = s.a_scales[at][row + lane / 4], lower = s.a_scales[at][row + lane / 4 + 8];
  if constexpr (kRowsB) {
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      const float2 across = *reinterpret_cast<const float2*>(&s.b_scales[at][j * 8 + lane % 4 * 2]);
      sum[4 * j] += part[4 * j] * (upper * across.x), sum[4 * j + 1] += part[4 * j + 1] * (upper * across.y);
      sum[4 * j + 2] += part[4 * j + 2] * (lower * across.x), sum[4 * j + 3] += part[4 * j + 3] * (lower * across.y);
    }
    __syncwarp();
    if (lane < kCluster) hopper::barrier_arrive_at(&s.empty[at], lane);
  } else {
    __syncwarp();
    if (lane < kCluster) hopper::barrier_arrive_at(&s.empty[at], lane);
    upper *= scale, lower *= scale;
#pragma unroll
    for (int j = 0; j < 16; ++j) {
      sum[4 * j] += part[4 * j] * upper, sum[4 * j + 1] += part[4 * j + 1] * upper;
      sum[4 * j + 2] += part[4 * j + 2] * lower, sum[4 * j + 3] += part[4 * j + 3] * lower;
    }
  }
}

template <bool kRowsB, Output kOutput>
__device__ void multiply(const Problem& p, Shared<kOutput>& s) {
  using namespace hopper;
  const int rank = cluster_rank(), lane = threadIdx.x % 32, warp = threadIdx.x / 32 - 4;
  const int group = warp / 4, row_in_tile = warp * 16;  // the first warpgroup has rows 0 to 63
  int count = 0;
  for (int index = blockIdx.x / kCluster; index < pieces(p); index += gridDim.x / kCluster) {
    const Work w = work_at(p, index, rank);
    const int tiles = w.last_k - w.first_k;
    if (tiles == 0) continue;  // an expert without rows
    float sum[64] = {}, even[64], odd[64];
    const int block_row = w.expert * (p.b_rows / kTile) + min(w.tile_n, p.b_rows / kTile - 1);
    const float* scales = kRowsB ? nullptr : p.b_scales + static_cast<int64_t>(block_row) * p.k_tiles + w.first_k;
    const auto scale_of = [&](int k) { return kRowsB ? 1.f : __ldg(scales + k); };
    // One product is always under way while the one before it is promoted.
    start<kOutput>(s, count, group, even);
    int k = 0;
    for (; k + 2 < tiles; k += 2) {
      const float scale = scale_of(k), next = scale_of(k + 1);
      start<kOutput>(s, count + k + 1, group, odd);
      products_wait<1>();
      promote<kRowsB, kOutput>(s, count + k, row_in_tile, lane, scale, even, sum);
      start<kOutput>(s, count + k + 2, group, even);
      products_wait<1>();
      promote<kRowsB, kOutput>(s, count + k + 1, row_in_tile, lane, next, odd, sum);
    }
    const float scale = scale_of(k);
    if (k + 1 < tiles) {
      const float next = scale_of(k + 1);
      start<kOutput>(s, count + k + 1, group, odd);
      products_wait<1>();
      promote<kRowsB, kOutput>(s, count + k, row_in_tile, lane, scale, even, sum);
      products_wait<0>();
      promote<kRowsB, kOutput>(s, count + k + 1, row_in_tile, lane, next, odd, sum);
    } else {
      products_wait<0>();
      promote<kRowsB, kOutput>(s, count + k, row_in_tile, lane, scale, even, sum);
    }
    count += tiles;
    const int row = w.tile_m * kTile + row_in_tile, column = w.tile_n * kTile;
    if constexpr (kOutput == kStoreBf16) {
      store_bf16(p, sum, s.results[warp], row, column, lane);
    } else if constexpr (kOutput == kStoreFp32) {
      store_fp32<false>(p, sum, 0, row, column, lane);
    } else {
      const int64_t base = p.starts ? static_cast<int64_t>(w.expert) * p.m * p.n : 0;
      add_fp32(p, sum, s.results[warp], base, row, column, lane);
    }
  }
  add_rows_done();
}

template <bool kRowsB, Output kOutput>
__global__ void __cluster_dims__(kCluster, 1, 1) __launch_bounds__(384, 1)
    block_scaled_gemm(const __grid_constant__ Problem p, const __grid_constant__ CUtensorMap a,
                      const __grid_constant__ CUtensorMap b, const __grid_constant__ CUtensorMap a_scales,
                      const __grid_constant__ CUtensorMap b_scales) {
  extern __shared__ __align__(1024) uint8_t memory[];
  auto& s = *reinterpret_cast<Shared<kOutput>*>(memory);
  if (threadIdx.x == 0) {
    for (int i = 0; i < Shared<kOutput>::kStages; ++i) {
      hopper::barrier_init(&s.full[i], 1);
      hopper::barrier_init(&s.empty[i], kCluster * kWarps);
    }
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  }
  hopper::cluster_sync();
  if (threadIdx.x < 128) {
    hopper::fewer_registers<40>();
    if (threadIdx.x == 0) copy_operands<kRowsB, kOutput>(p, s, &a, &b, &a_scales, &b_scales);
  } else {
    hopper::more_registers<232>();
    multiply<kRowsB, kOutput>(p, s);
  }
  hopper::cluster_sync();  // no block leaves while its neighbour may still signal it
}

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);

// A row-major matrix of which boxes of box_rows x 128 elements are copied.
bool describe(Encode encode, CUtensorMap* map, bool fp8, const void* data, uint64_t rows, uint64_t columns,
              uint32_t box_rows) {
  const cuuint64_t size[2] = {columns, rows}, pitch[1] = {columns * (fp8 ? 1 : 4)};
  const cuuint32_t box[2] = {kTile, box_rows}, step[2] = {1, 1};
  return encode(map, fp8 ? CU_TENSOR_MAP_DATA_TYPE_UINT8 : CU_TENSOR_MAP_DATA_TYPE_FLOAT32, 2, const_cast<void*>(data),
                size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                fp8 ? CU_TENSOR_MAP_SWIZZLE_128B : CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

template <bool kRowsB, Output kOutput>
cudaError_t launch(const Problem& p, const CUtensorMap (&maps)[4], int blocks, cudaStream_t stream) {
  const auto kernel = block_scaled_gemm<kRowsB, kOutput>;
  const cudaError_t set =
      cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(sizeof(Shared<kOutput>)));
  if (set != cudaSuccess) return set;
  kernel<<<blocks, 384, sizeof(Shared<kOutput>), stream>>>(p, maps[0], maps[1], maps[2], maps[3]);
  return cudaGetLastError();
}

}  // namespace

// a: E4M3 [m, k], a_scales FP32 [k / 128, m]. b: E4M3 [experts * b_rows, k] with scales of blocks, or (rows_b) [n, k] with
// b_scales FP32 [k / 128, n]. output: 0 BF16, 1 FP32, 2 added to FP32. Rows of scales by row begin
// at multiples of 16 bytes. Returns 0, a CUDA error, -1 without the driver's library, -2 for a matrix that cannot be described.
extern "C" int deepseek_block_scaled_gemm(const void* a, const float* a_scales, const void* b, const float* b_scales, void* c,
                                          const int* tile_expert, const int* starts, int m, int n, int k, int b_rows,
                                          int experts, int rows_b, int output, int blocks, void* stream) {
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
  }();
  if (!encode) return -1;
  const int tiles_n = (n + kTile - 1) / kTile;
  const Problem p{m,       n,        (m + kTile - 1) / kTile, (tiles_n + kCluster - 1) / kCluster, k / kTile, b_rows,
                  experts, b_scales, tile_expert,             starts,                              c};
  CUtensorMap maps[4];
  const uint64_t rows_of_b = rows_b ? n : static_cast<uint64_t>(experts) * b_rows;
  bool good = describe(encode, &maps[0], true, a, m, k, kTile / kCluster) &&
              describe(encode, &maps[1], true, b, rows_of_b, k, kTile) &&
              describe(encode, &maps[2], false, a_scales, k / kTile, (m + 3) / 4 * 4, 1);
  maps[3] = maps[2];
  if (rows_b) good = good && describe(encode, &maps[3], false, b_scales, k / kTile, (n + 3) / 4 * 4, 1);
  if (!good) return -2;
  const int most = p.tiles_m * p.pairs_n * (starts ? experts : 1) * kCluster;
  blocks = min(blocks / kCluster * kCluster, most);
  const auto s = static_cast<cudaStream_t>(stream);
  if (rows_b) return output == kAddFp32 ? launch<true, kAddFp32>(p, maps, blocks, s) : launch<true, kStoreFp32>(p, maps, blocks, s);
  if (output == kStoreBf16) return launch<false, kStoreBf16>(p, maps, blocks, s);
  return launch<false, kStoreFp32>(p, maps, blocks, s);
}

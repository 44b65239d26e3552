// BF16 in 12 bits an element, E5M6, with a power of two for every 1 x 128 (V3 report section 3.3.3; layout: formats.Packed).
//
// A block has 32 rows of 4 tiles. Half a warp has a tile: 8 values a thread, which are three words; the words of a warp change
// threads in shared memory, so that they leave in pieces of 16 bytes.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cstdint>

#include "scales.cuh"

namespace {

constexpr int kTile = 128, kThreads = 256, kWarps = kThreads / 32;
constexpr int kRows = 32, kTiles = 4;  // of a block
constexpr int kPasses = kRows * kTiles / (2 * kWarps);
constexpr int kStep = kRows / kPasses;       // rows of all warps in a pass
constexpr int kWords = kTile / 8 * 3;        // of a tile
constexpr int kLargest = 65024;              // of E5M6

// Two values' codes, 12 bits each: FP16 without its last 4 bits, to nearest even; 0x7E0 for NaN.
__device__ __forceinline__ uint32_t two(float low, float high) {
  const __half2 x = __floats2half2_rn(low, high);
  const uint32_t bits = *reinterpret_cast<const uint32_t*>(&x), nan = __hneu2_mask(x, x);
  const uint32_t codes = (bits + 0x00070007 + (bits >> 4 & 0x00010001)) >> 4 & 0x0FFF0FFF;
  const uint32_t good = (codes & ~nan) | (0x07E007E0 & nan);
  return (good & 0xFFF) | (good >> 4 & 0xFFF000);
}

__global__ void __launch_bounds__(kThreads) pack_e5m6(const uint8_t* x, uint32_t* words, float* scales, int64_t stride, int m,
                                                      int tiles) {
  __shared__ float scale_of_tile[kTiles][kRows];
  __shared__ __align__(16) uint32_t passing[kWarps][2 * kWords];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, across = (tiles + kTiles - 1) / kTiles;
  const int first = static_cast<int>(blockIdx.x / across) * kRows + warp / 2;
  const int first_tile = static_cast<int>(blockIdx.x % across) * kTiles, pair = first_tile + warp % 2 * 2;
  const int tile = pair + lane / 16;
  const uint8_t* from = x + first * stride + tile * kTile * 2 + lane % 16 * 16;
  uint4 raw[kPasses];
#pragma unroll
  for (int i = 0; i < kPasses; ++i)
    raw[i] = tile < tiles && first + i * kStep < m ? *reinterpret_cast<const uint4*>(from + i * kStep * stride) : uint4{};
#pragma unroll
  for (int i = 0; i < kPasses; ++i) {
    const uint32_t in[4] = {raw[i].x, raw[i].y, raw[i].z, raw[i].w};
    float v[8], amax = 0.0f;
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      v[2 * j] = __uint_as_float(in[j] << 16), v[2 * j + 1] = __uint_as_float(in[j] & 0xFFFF0000);
      amax = fmaxf(amax, fmaxf(fabsf(v[2 * j]), fabsf(v[2 * j + 1])));  // NaN does not count
    }
#pragma unroll
    for (int bit = 8; bit; bit /= 2) amax = fmaxf(amax, __shfl_xor_sync(~0u, amax, bit));
    const float scale = scales::scale_of<true, kLargest>(amax), inverse = scales::inverse_of<true>(scale);
    if (lane % 16 == 0) scale_of_tile[warp % 2 * 2 + lane / 16][i * kStep + warp / 2] = scale;
    uint32_t codes[4];
#pragma unroll
    for (int j = 0; j < 4; ++j) codes[j] = two(v[2 * j] * inverse, v[2 * j + 1] * inverse);
    __syncwarp();  // what passed before has left
    passing[warp][lane * 3] = __byte_perm(codes[0], codes[1], 0x4210);
    passing[warp][lane * 3 + 1] = __byte_perm(codes[1], codes[2], 0x5421);
    passing[warp][lane * 3 + 2] = __byte_perm(codes[2], codes[3], 0x6542);
    __syncwarp();
    const int row = first + i * kStep;
    if (lane < 2 * kWords / 4 && row < m && pair + lane / (kWords / 4) < tiles) {
      uint32_t* to = words + (static_cast<int64_t>(row) * tiles + pair) * kWords + lane * 4;
      *reinterpret_cast<uint4*>(to) = *reinterpret_cast<const uint4*>(passing[warp] + lane * 4);
    }
  }
  __syncthreads();
  if (threadIdx.x < kTiles * kRows) {
    const int mine = first_tile + threadIdx.x / kRows, row = static_cast<int>(blockIdx.x / across) * kRows + threadIdx.x % kRows;
    if (mine < tiles && row < m)
      scales[static_cast<int64_t>(mine) * m + row] = scale_of_tile[threadIdx.x / kRows][threadIdx.x % kRows];
  }
}

}  // namespace

// x: BF16 [m, 128 tiles], rows at multiples of 16 bytes, `stride` bytes apart. Returns 0 or a CUDA error.
extern "C" int deepseek_pack_e5m6(const void* x, void* words, float* scales, int64_t stride, int m, int tiles, void* stream) {
  const int64_t blocks = static_cast<int64_t>((m + kRows - 1) / kRows) * ((tiles + kTiles - 1) / kTiles);
  pack_e5m6<<<static_cast<unsigned>(blocks), kThreads, 0, static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint8_t*>(x), static_cast<uint32_t*>(words), scales, stride, m, tiles);
  return cudaGetLastError();
}

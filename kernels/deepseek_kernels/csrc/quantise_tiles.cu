// Tiles of 128 x 128 in, E4M3 out: transposed with a scale for each column (tiles of 128 x 1), and beside it as they lie with
// a scale for each row (tiles of 1 x 128) where that is asked for (V3 report section 3.3.2; scale rule: formats.py). The
// elements are BF16 numbers, numbers kept in FP8, SwiGLU of such, or SwiGLU's two gradients.
//
// A block walks through tiles. The operands of the next one (or two) are copied to shared memory while this one's numbers, in
// registers by now, are scaled and stored. A thread has 8 rows of 4 channels: four rows of a channel are one word of the transpose,
// four channels of a row one word of what lies, of which a warp stores 128 bytes at a time. The transpose's words go by way of shared
// memory, swizzled so that no bank is asked twice.
#include <cuda_bf16.h>
#include <cuda_fp8.h>
#include <cstdint>

#include "scales.cuh"

namespace {

using scales::inverse_of, scales::scale_of;

constexpr int kTile = 128, kThreads = 512, kWarps = kThreads / 32;
constexpr int kRows = kTile / kWarps;  // of a thread
constexpr int kLargest = 448;  // of E4M3

enum Source { kPlain, kKept, kSwiglu, kSwigluKept, kGradients, kGradientsKept };

template <Source kSource>
struct Shape {
  static constexpr bool kKeptInFp8 = kSource % 2, kPair = kSource >= kSwiglu, kDy = kSource >= kGradients;
  static constexpr int kSides = kDy ? 2 : 1;  // results
  static constexpr int kRowBytes = kTile * (kKeptInFp8 ? 1 : 2), kOperand = kTile * kRowBytes;
  static constexpr int kDyAt = (kPair ? 2 : 1) * kOperand, kInput = kDyAt + (kDy ? 2 * kTile * kTile : 0);
  static constexpr int kStages = kSource == kKept ? 2 : 1;  // of operands; more do not help what computes more
  static constexpr int kTurnedAt = kStages * kInput, kAmaxAt = kTurnedAt + kSides * kTile * kTile;
  static constexpr int kInverseAt = kAmaxAt + kSides * kWarps * kTile * 4;
  static constexpr int kBytes = kInverseAt + kSides * kTile * 4;
  static constexpr int kBlocks = kDy ? 1 : 2;  // on a multiprocessor
};

struct Problem {
  const uint8_t* x;        // [M, stride bytes]: a side's channels, or two (gate and up)
  const uint8_t* dy;       // BF16 [M, F]
  const float* x_scales;   // [.., M], where x is kept in FP8
  const float* weight;     // [M], or null
  uint8_t *values, *values_t;   // [M, sides F]; [sides F, MP]
  float *scales, *scales_t;     // [sides F / 128, M]; [MP / 128, sides F]
  float* parts;            // [F / 128, M]: of the weight's gradient, where there is a weight
  int64_t stride;
  int m, f, mp;
};

__device__ __forceinline__ void copy_16(uint32_t to, const void* from, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(there ? 16 : 0) : "memory");
}

// A warp's own rows of kRowBytes, so that no other waits for them; zeros below the matrix.
template <int kRowBytes>
__device__ __forceinline__ void copy_operand(uint8_t* to, const uint8_t* from, int64_t stride, int rows) {
  constexpr int kChunks = kRowBytes / 16, kStep = 32 / kChunks;
  const int lane = threadIdx.x % 32, row = threadIdx.x / 32 * kRows + lane / kChunks, at = lane % kChunks * 16;
  const uint32_t target = static_cast<uint32_t>(__cvta_generic_to_shared(to)) + row * kRowBytes + at;
  const uint8_t* source = from + at;
#pragma unroll
  for (int i = 0; i < kRows / kStep; ++i) {
    const int r = row + i * kStep;
    copy_16(target + i * kStep * kRowBytes, source + (r < rows ? r : 0) * stride, r < rows);
  }
}

// Which tile: rows from 128 `down` on, channels from 128 `g` on.
struct Place {
  int down, g;

  __device__ __forceinline__ void move(Place step, int across) {
    down += step.down, g += step.g;
    if (g >= across) ++down, g -= across;
  }
};

template <class S>
__device__ __forceinline__ void copy_tile(const Problem& p, uint8_t* memory, Place at) {
  const int first = at.down * kTile, column = at.g * kTile;
  const uint8_t* x = p.x + first * p.stride + column * (S::kKeptInFp8 ? 1 : 2);
  copy_operand<S::kRowBytes>(memory, x, p.stride, p.m - first);
  if constexpr (S::kPair)
    copy_operand<S::kRowBytes>(memory + S::kOperand, x + static_cast<int64_t>(p.f) * (S::kKeptInFp8 ? 1 : 2), p.stride,
                               p.m - first);
  if constexpr (S::kDy)
    copy_operand<2 * kTile>(memory + S::kDyAt, p.dy + (static_cast<int64_t>(first) * p.f + column) * 2, 2ll * p.f,
                            p.m - first);
}

// A warp's rows have four lanes each. What row `lane / 4` is multiplied with, by lane % 4: scale of x, or of the gate; of up;
// the weight.
template <class S>
__device__ __forceinline__ float factor_of_lane(const Problem& p, Place at) {
  const int across = p.f / kTile, lane = threadIdx.x % 32;
  const int row = at.down * kTile + threadIdx.x / 32 * kRows + lane / 4;
  if (row >= p.m) return 0.0f;
  if (S::kPair && lane % 4 == 2) return p.weight ? __ldg(p.weight + row) : 1.0f;
  if (!S::kKeptInFp8) return 1.0f;
  return __ldg(p.x_scales + static_cast<int64_t>(at.g + (S::kPair && lane % 4 == 1 ? across : 0)) * p.m + row);
}

// Starts to copy a tile's operands, if there is such a tile; its factors.
template <class S>
__device__ __forceinline__ float fetch(const Problem& p, uint8_t* memory, Place at, int tiles) {
  float factor = 0.0f;
  if (at.down < tiles) {
    copy_tile<S>(p, memory, at);
    factor = factor_of_lane<S>(p, at);
  }
  asm volatile("cp.async.commit_group;" ::: "memory");
  return factor;
}

__device__ __forceinline__ void four_bf16(const uint8_t* from, float (&x)[4]) {
  const uint2 w = *reinterpret_cast<const uint2*>(from);
  x[0] = __uint_as_float(w.x << 16), x[1] = __uint_as_float(w.x & 0xFFFF0000);
  x[2] = __uint_as_float(w.y << 16), x[3] = __uint_as_float(w.y & 0xFFFF0000);
}

// Four numbers of a row, whose scale is `factor` where they are kept in FP8.
template <bool kKeptInFp8>
__device__ __forceinline__ void four(const uint8_t* operand, int row, int lane, float factor, float (&x)[4]) {
  if constexpr (kKeptInFp8) {
    const uint32_t w = *reinterpret_cast<const uint32_t*>(operand + row * kTile + lane * 4);
    const float2 low = __half22float2(__nv_cvt_fp8x2_to_halfraw2(w & 0xFFFF, __NV_E4M3));
    const float2 high = __half22float2(__nv_cvt_fp8x2_to_halfraw2(w >> 16, __NV_E4M3));
    x[0] = __fmul_rn(low.x, factor), x[1] = __fmul_rn(low.y, factor);
    x[2] = __fmul_rn(high.x, factor), x[3] = __fmul_rn(high.y, factor);
  } else {
    four_bf16(operand + row * 2 * kTile + lane * 8, x);
  }
}

// As Triton's kernels have it, to the bit (what is flushed here is added to 1).
__device__ __forceinline__ float sigmoid(float x) {
  float power, root;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(__fmul_rn(-x, 1.44269504088896340736f)));
  asm("rsqrt.approx.ftz.f32 %0, %1;" : "=f"(root) : "f"(__fadd_rn(1.0f, power)));
  return __fmul_rn(root, root);
}

struct Larger {
  static __device__ __forceinline__ float of(float a, float b) { return fmaxf(a, b); }
};
struct Sum {
  static __device__ __forceinline__ float of(float a, float b) { return a + b; }
};

// Each of 8 rows' numbers over the warp; row lane / 4 is returned.
template <class Op>
__device__ __forceinline__ float over_warp(float (&v)[kRows], int lane) {
#pragma unroll
  for (int half = 4, bit = 16; half; half /= 2, bit /= 2) {
    const bool high = lane & bit;
#pragma unroll
    for (int i = 0; i < half; ++i) {
      const float keep = high ? v[i + half] : v[i], give = high ? v[i] : v[i + half];
      v[i] = Op::of(keep, __shfl_xor_sync(~0u, give, bit));
    }
  }
  const float once = Op::of(v[0], __shfl_xor_sync(~0u, v[0], 2));
  return Op::of(once, __shfl_xor_sync(~0u, once, 1));
}

__device__ __forceinline__ uint32_t word(float a, float b, float c, float d) {
  const uint32_t low = __nv_cvt_float2_to_fp8x2(make_float2(a, b), __NV_SATFINITE, __NV_E4M3);
  const uint32_t high = __nv_cvt_float2_to_fp8x2(make_float2(c, d), __NV_SATFINITE, __NV_E4M3);
  return low | high << 16;
}

template <class S>
__device__ __forceinline__ void numbers_of(const Problem& p, const uint8_t* memory, float factor, Place at,
                                           float (&x)[S::kSides][kRows][4]) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRows;
  [[maybe_unused]] float terms[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float scale = S::kKeptInFp8 ? __shfl_sync(~0u, factor, 4 * r) : 1.0f;
    if constexpr (!S::kPair) {
      four<S::kKeptInFp8>(memory, first + r, lane, scale, x[0][r]);
    } else {
      const float up_scale = S::kKeptInFp8 ? __shfl_sync(~0u, factor, 4 * r + 1) : 1.0f;
      const float weight = __shfl_sync(~0u, factor, 4 * r + 2);
      float gate[4], up[4];
      four<S::kKeptInFp8>(memory, first + r, lane, scale, gate);
      four<S::kKeptInFp8>(memory + S::kOperand, first + r, lane, up_scale, up);
      [[maybe_unused]] float dy[4];
      if constexpr (S::kDy) {
        four_bf16(memory + S::kDyAt + (first + r) * 2 * kTile + lane * 8, dy);
        terms[r] = 0.0f;
      }
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const float s = sigmoid(gate[c]), silu = __fmul_rn(gate[c], s);
        if constexpr (S::kDy) {
          const float dyw = __fmul_rn(dy[c], weight);
          const float slope = __fmul_rn(s, __fadd_rn(1.0f, __fmul_rn(gate[c], __fadd_rn(1.0f, -s))));
          x[0][r][c] = __fmul_rn(__fmul_rn(dyw, up[c]), slope);
          x[S::kSides - 1][r][c] = __fmul_rn(dyw, silu);
          terms[r] = __fmaf_rn(__fmul_rn(dy[c], silu), up[c], terms[r]);
        } else {
          x[0][r][c] = __fmul_rn(__fmul_rn(silu, up[c]), weight);
        }
      }
    }
  }
  if constexpr (S::kDy) {
    if (!p.weight) return;
    const float sum = over_warp<Sum>(terms, lane);
    const int row = at.down * kTile + first + lane / 4;
    if (lane % 4 == 0 && row < p.m) p.parts[static_cast<int64_t>(at.g) * p.m + row] = sum;
  }
}

// One side's numbers in tiles of 1 x 128, to rows that are `pitch` apart; their scales to `scales`.
template <bool kPow2>
__device__ __forceinline__ void quantise_rows(const float (&x)[kRows][4], uint8_t* to, int64_t pitch, float* scales, int rows) {
  const int lane = threadIdx.x % 32, first = threadIdx.x / 32 * kRows;
  float amax[kRows];
#pragma unroll
  for (int r = 0; r < kRows; ++r)
    amax[r] = fmaxf(fmaxf(fabsf(x[r][0]), fabsf(x[r][1])), fmaxf(fabsf(x[r][2]), fabsf(x[r][3])));
  const float scale = scale_of<kPow2, kLargest>(over_warp<Larger>(amax, lane)), inverse = inverse_of<kPow2>(scale);
  if (lane % 4 == 0 && first + lane / 4 < rows) scales[first + lane / 4] = scale;
#pragma unroll
  for (int r = 0; r < kRows; ++r) {
    const float i = __shfl_sync(~0u, inverse, 4 * r);
    if (first + r >= rows) continue;
    *reinterpret_cast<uint32_t*>(to + (first + r) * pitch + lane * 4) = word(x[r][0] * i, x[r][1] * i, x[r][2] * i, x[r][3] * i);
  }
}

// One side's numbers transposed, each channel times its inverse, to shared memory: pieces of 8 tokens, swizzled.
__device__ __forceinline__ void quantise_columns(const float (&x)[kRows][4], uint8_t* to, const float* inverses) {
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const float4 i = *reinterpret_cast<const float4*>(inverses + lane * 4);
  const float inverse[4] = {i.x, i.y, i.z, i.w};
#pragma unroll
  for (int c = 0; c < 4; ++c) {
    const float k = inverse[c];
    uint2 both;
    both.x = word(x[0][c] * k, x[1][c] * k, x[2][c] * k, x[3][c] * k);
    both.y = word(x[4][c] * k, x[5][c] * k, x[6][c] * k, x[7][c] * k);
    *reinterpret_cast<uint2*>(to + (lane * 4 + c) * kTile + (warp ^ (lane & 15)) * 8) = both;
  }
}

// 128 channels of 128 bytes from shared memory to rows `pitch` apart, 16 bytes a thread.
__device__ __forceinline__ void store_square(const uint8_t* from, uint8_t* to, int64_t pitch) {
  const int piece = threadIdx.x % 8;
#pragma unroll
  for (int i = 0; i < kTile * 8 / kThreads; ++i) {
    const int row = threadIdx.x / 8 + i * (kThreads / 8), swizzle = row / 4 & 15;
    uint4 v = *reinterpret_cast<const uint4*>(from + row * kTile + ((2 * piece ^ swizzle) & 14) * 8);
    if (swizzle & 1) v = make_uint4(v.z, v.w, v.x, v.y);
    *reinterpret_cast<uint4*>(to + row * pitch + piece * 16) = v;
  }
}

template <Source kSource, bool kWithRows, bool kPow2>
__global__ void __launch_bounds__(kThreads, Shape<kSource>::kBlocks)
    quantise_tiles(const __grid_constant__ Problem p) {
  using S = Shape<kSource>;
  extern __shared__ __align__(128) uint8_t memory[];
  uint8_t* turned = memory + S::kTurnedAt;
  float* amax = reinterpret_cast<float*>(memory + S::kAmaxAt);         // [sides, warps, channels]
  float* inverses = reinterpret_cast<float*>(memory + S::kInverseAt);  // [sides, channels]
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int across = p.f / kTile, width = S::kSides * p.f, tiles = p.mp / kTile;
  const int blocks = static_cast<int>(gridDim.x), block = static_cast<int>(blockIdx.x);
  const Place step{blocks / across, blocks % across};
  Place at{block / across, block % across}, ahead = at;
  float factors[S::kStages];
#pragma unroll
  for (int i = 0; i < S::kStages; ++i) {
    factors[i] = fetch<S>(p, memory + i * S::kInput, ahead, tiles);
    ahead.move(step, across);
  }
  for (int count = 0; at.down < tiles; ++count, at.move(step, across)) {
    uint8_t* operands = memory + count % S::kStages * S::kInput;
    float x[S::kSides][kRows][4];
    asm volatile("cp.async.wait_group %0;" ::"n"(S::kStages - 1) : "memory");
    __syncwarp();
    numbers_of<S>(p, operands, factors[0], at, x);
    __syncwarp();  // the operands have been read
    factors[0] = factors[S::kStages - 1];
    factors[S::kStages - 1] = fetch<S>(p, operands, ahead, tiles);
    ahead.move(step, across);
#pragma unroll
    for (int side = 0; side < S::kSides; ++side) {
      float most[4];
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        most[c] = fmaxf(fabsf(x[side][0][c]), fabsf(x[side][1][c]));  // NaN does not count
#pragma unroll
        for (int r = 2; r < kRows; ++r) most[c] = fmaxf(most[c], fabsf(x[side][r][c]));
      }
      *reinterpret_cast<float4*>(amax + (side * kWarps + warp) * kTile + lane * 4) =
          make_float4(most[0], most[1], most[2], most[3]);
    }
    __syncthreads();
    if (threadIdx.x < S::kSides * kTile) {
      const int side = threadIdx.x / kTile, channel = threadIdx.x % kTile;
      float most = 0.0f;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) most = fmaxf(most, amax[(side * kWarps + w) * kTile + channel]);
      const float scale = scale_of<kPow2, kLargest>(most);
      inverses[threadIdx.x] = inverse_of<kPow2>(scale);
      p.scales_t[static_cast<int64_t>(at.down) * width + side * p.f + at.g * kTile + channel] = scale;
    }
    if constexpr (kWithRows)
#pragma unroll
      for (int side = 0; side < S::kSides; ++side)
        quantise_rows<kPow2>(x[side], p.values + static_cast<int64_t>(at.down) * kTile * width + side * p.f + at.g * kTile, width,
                             p.scales + static_cast<int64_t>(side * across + at.g) * p.m + at.down * kTile,
                             p.m - at.down * kTile);
    __syncthreads();
#pragma unroll
    for (int side = 0; side < S::kSides; ++side)
      quantise_columns(x[side], turned + side * kTile * kTile, inverses + side * kTile);
    __syncthreads();
#pragma unroll
    for (int side = 0; side < S::kSides; ++side) {
      const int64_t channel = static_cast<int64_t>(side) * p.f + at.g * kTile;
      store_square(turned + side * kTile * kTile, p.values_t + channel * p.mp + at.down * kTile, p.mp);
    }
  }
}

template <Source kSource, bool kWithRows, bool kPow2>
cudaError_t launch(const Problem& p, int multiprocessors, cudaStream_t stream) {
  using S = Shape<kSource>;
  const auto kernel = quantise_tiles<kSource, kWithRows, kPow2>;
  const cudaError_t set = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, S::kBytes);
  if (set != cudaSuccess) return set;
  const int64_t tiles = static_cast<int64_t>(p.mp / kTile) * (p.f / kTile);
  const int blocks = static_cast<int>(min(tiles, static_cast<int64_t>(multiprocessors) * S::kBlocks));
  kernel<<<blocks, kThreads, S::kBytes, stream>>>(p);
  return cudaGetLastError();
}

template <Source kSource, bool kWithRows>
cudaError_t launch(const Problem& p, bool pow2, int multiprocessors, cudaStream_t stream) {
  return pow2 ? launch<kSource, kWithRows, true>(p, multiprocessors, stream)
              : launch<kSource, kWithRows, false>(p, multiprocessors, stream);
}

}  // namespace

// source: 0 BF16 x [M, F]; 1 x [M, F] kept in FP8 with scales [F / 128, M]; 2, 3 the same of gate and up [M, 2 F], whose
// SwiGLU is meant; 4, 5 the same beside dy [M, F], whose gradients are. F is a multiple of 128, rows begin at multiples of 16
// bytes, `stride` bytes apart. values and scales: the tiles of 1 x 128, of 0, 4 and 5. Returns 0 or a CUDA error.
extern "C" int deepseek_quantise_tiles(const void* x, const void* dy, const float* x_scales, const float* weight, void* values,
                                       float* scales, void* values_t, float* scales_t, float* parts, int64_t stride, int m,
                                       int f, int source, int pow2, int multiprocessors, void* stream) {
  const Problem p{static_cast<const uint8_t*>(x), static_cast<const uint8_t*>(dy), x_scales, weight,
                  static_cast<uint8_t*>(values), static_cast<uint8_t*>(values_t), scales, scales_t, parts, stride, m, f,
                  (m + kTile - 1) / kTile * kTile};
  const auto s = static_cast<cudaStream_t>(stream);
  switch (source) {
    case kPlain: return launch<kPlain, true>(p, pow2, multiprocessors, s);
    case kKept: return launch<kKept, false>(p, pow2, multiprocessors, s);
    case kSwiglu: return launch<kSwiglu, false>(p, pow2, multiprocessors, s);
    case kSwigluKept: return launch<kSwigluKept, false>(p, pow2, multiprocessors, s);
    case kGradients: return launch<kGradients, true>(p, pow2, multiprocessors, s);
    case kGradientsKept: return launch<kGradientsKept, true>(p, pow2, multiprocessors, s);
  }
  return cudaErrorInvalidValue;
}

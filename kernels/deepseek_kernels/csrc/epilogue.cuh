// How sums leave a warp's registers: 16 rows of a product as the matrix instructions leave them, of which a thread has
// two neighbours in every 8 columns of rows lane / 4 and lane / 4 + 8. By way of shared memory, from which the copy engine writes them
// while the warp goes on. Threads write what the engine cannot address, and FP32 that is not added.
#pragma once
#include "hopper.cuh"

namespace epilogue {

enum Output { kStoreBf16, kStoreFp32, kAddFp32 };

constexpr int kRows = 16, kColumnsAdded = 128;
constexpr int kBoxBytes = kRows * 128;             // 64 columns of BF16
constexpr int kPitch = 4 * kColumnsAdded + 32;     // of rows that are added: no bank of shared memory is asked twice at once

// Boxes that a warp has for the results of tiles so wide: what operands leave room for.
template <int kColumns>
constexpr int kBoxes = kColumns == 256 ? 2 : 1;

template <Output kOutput, int kColumns>
constexpr int kBytes = kOutput == kStoreBf16 ? kBoxes<kColumns> * kBoxBytes : kOutput == kAddFp32 ? kRows * kPitch : 16;  // 16: of no use

// Where a warp's results go: C [m, n], of one expert, from this row and column on.
struct Target {
  void* c;
  const CUtensorMap* boxes;
  int m, n, row, column;
};

// The copy engine's rows begin at multiples of 16 bytes.
__host__ __device__ inline bool boxes_reach(const void* c, int n) {
  return n % 8 == 0 && reinterpret_cast<uintptr_t>(c) % 16 == 0;
}

template <bool kAdd, class T, int kCount>
__device__ __forceinline__ void store(const Target& to, const float (&sum)[kCount], int lane) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const int row = to.row + lane / 4 + i / 2 % 2 * 8, column = to.column + i / 4 * 8 + lane % 4 * 2 + i % 2;
    if (row >= to.m || column >= to.n) continue;
    T* at = static_cast<T*>(to.c) + static_cast<int64_t>(row) * to.n + column;
    if constexpr (kAdd) *at += sum[i];
    else *at = static_cast<T>(sum[i]);
  }
}

// 64 columns at a time. A box's rows of 128 bytes are swizzled: 16 bytes lie where their place and the row's last bits differ.
template <int kBoxes, int kCount>
__device__ __forceinline__ void store_bf16(const Target& to, const float (&sum)[kCount], uint8_t* memory, int lane) {
  if (!boxes_reach(to.c, to.n)) return store<false, __nv_bfloat16>(to, sum, lane);
#pragma unroll
  for (int box = 0; box < kCount / 32; ++box) {
    uint8_t* bytes = memory + box % kBoxes * kBoxBytes;
    hopper::writes_read<kBoxes - 1>();  // what this box held before
    __syncwarp();
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      const int row = lane / 4 + i % 2 * 8, place = i / 2 ^ row % 8, from = 32 * box + 2 * i;
      *reinterpret_cast<__nv_bfloat162*>(bytes + row * 128 + place * 16 + lane % 4 * 4) =
          __floats2bfloat162_rn(sum[from], sum[from + 1]);
    }
    hopper::show_to_copies();
    __syncwarp();
    if (lane == 0) hopper::write_box(to.boxes, bytes, to.column + box * 64, to.row);
    hopper::writes_commit();
  }
}

// 128 columns, added to FP32 numbers in the L2 cache.
__device__ __forceinline__ void add_fp32(const Target& to, const float (&sum)[64], uint8_t* memory, int lane) {
  float* c = static_cast<float*>(to.c);
  if (to.n % 4 || reinterpret_cast<uintptr_t>(c) % 16) return store<true, float>(to, sum, lane);
  hopper::writes_read<0>();  // of what was added before
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 32; ++i) {
    uint8_t* at = memory + (lane / 4 + i % 2 * 8) * kPitch + (i / 2 * 8 + lane % 4 * 2) * 4;
    *reinterpret_cast<float2*>(at) = make_float2(sum[2 * i], sum[2 * i + 1]);
  }
  hopper::show_to_copies();
  __syncwarp();
  const int columns = min(kColumnsAdded, to.n - to.column);
  if (lane < kRows && to.row + lane < to.m && columns > 0)
    hopper::add_row(c + static_cast<int64_t>(to.row + lane) * to.n + to.column, memory + lane * kPitch,
                    columns * sizeof(float));
  hopper::writes_commit();
}

template <Output kOutput, int kColumns, int kCount>
__device__ __forceinline__ void leave(const Target& to, const float (&sum)[kCount], uint8_t* memory, int lane) {
  if constexpr (kOutput == kStoreBf16) store_bf16<kBoxes<kColumns>>(to, sum, memory, lane);
  if constexpr (kOutput == kStoreFp32) store<false, float>(to, sum, lane);
  if constexpr (kOutput == kAddFp32) add_fp32(to, sum, memory, lane);
}

}  // namespace epilogue

// Matrices as the copy engine knows them; by the driver's library, so that nothing has to be linked.
#pragma once
#include <cuda.h>
#include <dlfcn.h>

#include <cstdint>

namespace tensor_map {

using Encode = CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*, const cuuint64_t*,
                            const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave, CUtensorMapSwizzle,
                            CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
constexpr auto kFp8 = CU_TENSOR_MAP_DATA_TYPE_UINT8, kBf16 = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
constexpr auto kFp32 = CU_TENSOR_MAP_DATA_TYPE_FLOAT32;

// Null without the library.
inline Encode encoder() {
  static const auto encode = [] {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY);
    return driver ? reinterpret_cast<Encode>(dlsym(driver, "cuTensorMapEncodeTiled")) : nullptr;
  }();
  return encode;
}

// A row-major matrix, copied in boxes of so many rows: of 128 bytes, swizzled in shared memory, or of 128 scales (FP32).
inline bool describe(CUtensorMap* map, CUtensorMapDataType type, const void* data, uint64_t rows, uint64_t columns,
                     uint32_t box_rows) {
  const bool scales = type == kFp32;
  const uint32_t bytes = scales ? 4 : type == kBf16 ? 2 : 1;
  const cuuint64_t size[2] = {columns, rows}, pitch[1] = {columns * bytes};
  const cuuint32_t box[2] = {scales ? 128 : 128 / bytes, box_rows}, step[2] = {1, 1};
  return encoder()(map, type, 2, const_cast<void*>(data), size, pitch, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE,
                   scales ? CU_TENSOR_MAP_SWIZZLE_NONE : CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                   CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE) == CUDA_SUCCESS;
}

}  // namespace tensor_map

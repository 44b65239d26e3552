// The scale of a tile from its largest magnitude, to the bit as everywhere (formats.py, tile_math.py).
#pragma once

namespace scales {

constexpr float kSmallestAmax = 0x1p-100f;

template <bool kPow2, int kLargest>
__device__ __forceinline__ float scale_of(float amax) {
  amax = fmaxf(amax, kSmallestAmax);
  if constexpr (!kPow2) return __fdiv_rn(amax, static_cast<float>(kLargest));
  // amax / kLargest exceeds a power of two where its fraction exceeds kLargest's
  const int bits = __float_as_int(amax), most = __float_as_int(static_cast<float>(kLargest));
  const int up = (bits + 0x7FFFFF - (most & 0x7FFFFF)) & 0xFF800000;
  return __int_as_float(bits < 0x7F800000 ? up - (most & 0x7F800000) + 0x3F800000 : bits);  // Inf stays
}

template <bool kPow2>
__device__ __forceinline__ float inverse_of(float scale) {
  if constexpr (!kPow2) return __fdiv_rn(1.0f, scale);
  return __int_as_float(max(0x7F000000 - __float_as_int(scale), 0));  // 0 of Inf
}

}  // namespace scales

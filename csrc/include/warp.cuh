// What kernels of a warp a row share: element types, vectors, reductions over a warp, moments of a row.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace xclip_fast {

inline constexpr int kWarp = 32;

__device__ inline float to_float(float value) { return value; }
__device__ inline float to_float(__half value) { return __half2float(value); }
__device__ inline float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T rounded(float value);
template <>
__device__ inline __half rounded<__half>(float value) {
  return __float2half_rn(value);
}
template <>
__device__ inline __nv_bfloat16 rounded<__nv_bfloat16>(float value) {
  return __float2bfloat16_rn(value);
}

// The larger one; a NaN if one is a NaN, where fmaxf would hide it.
__device__ inline float nan_max(float a, float b) { return a != a ? a : b > a || b != b ? b : a; }

// Over a warp, in all its lanes.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}
__device__ inline float warp_max(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value = nan_max(value, __shfl_xor_sync(0xffffffffu, value, distance));
  }
  return value;
}

// V elements that are loaded at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

// A row's mean and M2 = sum (x - mean)^2.
struct Moments {
  float mean;
  float m2;
};

// Of the row at x, d elements in whole vectors of four, by a warp.
__device__ inline Moments row_moments(float const* x, int d) {
  auto const* vectors = reinterpret_cast<Vector<float, 4> const*>(x);
  int const lane = threadIdx.x % kWarp;
  float sum = 0.0f;
  for (int at = lane; at < d / 4; at += kWarp) {
    for (float const value : vectors[at].values) {
      sum += value;
    }
  }
  float const mean = warp_sum(sum) / d;
  float m2 = 0.0f;
  for (int at = lane; at < d / 4; at += kWarp) {  // the row comes from the cache now
    for (float const value : vectors[at].values) {
      m2 += (value - mean) * (value - mean);
    }
  }
  return {mean, warp_sum(m2)};
}

}  // namespace xclip_fast

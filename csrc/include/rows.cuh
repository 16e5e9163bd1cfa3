// Row statistics of a LayerNorm, its folding into the next weight, its result in 8 bits, and what is left of the
// reductions that products did in their epilogues: a warp a row, ordinary instructions.
#pragma once

#include <cuda_fp8.h>

#include "warp.cuh"

namespace xclip_fast {

inline constexpr int kWarps = 4;  // of a block

template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps) row_statistics_kernel(T const* x,  // (M, D), rows x_row apart
                                                                       int64_t x_row, float eps,
                                                                       float* mean,  // (M,)
                                                                       float* rstd,  // (M,)
                                                                       int64_t m, int d) {
  int64_t const row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  if (row >= m) {
    return;  // a whole warp
  }
  Moments const found = row_moments<T, V>(x + row * x_row, d);
  if (threadIdx.x % kWarp == 0) {
    mean[row] = found.mean;
    rstd[row] = 1.0f / sqrtf(found.m2 / d + eps);
  }
}

inline constexpr float kMostE4m3 = 448.0f;

template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps) layer_norm_fp8_kernel(T const* x,  // (M, D), rows x_row apart
                                                                       int64_t x_row,
                                                                       float const* gamma,  // (D,)
                                                                       float const* beta,   // (D,)
                                                                       float eps,
                                                                       __nv_fp8_e4m3* y,  // (M, D)
                                                                       float* scale,      // (M,)
                                                                       int64_t m, int d) {
  int64_t const row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int const lane = threadIdx.x % kWarp;
  if (row >= m) {
    return;  // a whole warp
  }
  T const* const x_D = x + row * x_row;
  Moments const found = row_moments<T, V>(x_D, d);
  float const rstd = 1.0f / sqrtf(found.m2 / d + eps);
  auto const normed = [&](Vector<T, V> const& vector, int at, int i) {
    return (to_float(vector.values[i]) - found.mean) * rstd * gamma[at * V + i] + beta[at * V + i];
  };
  auto const* vectors = reinterpret_cast<Vector<T, V> const*>(x_D);
  float largest = 0.0f;
  for (int at = lane; at < d / V; at += kWarp) {
    Vector<T, V> const vector = vectors[at];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      largest = nan_max(largest, fabsf(normed(vector, at, i)));
    }
  }
  largest = warp_max(largest);
  float const step = largest == 0.0f ? 1.0f : largest / kMostE4m3;
  auto* const out = reinterpret_cast<Vector<__nv_fp8_e4m3, V>*>(y + row * d);
  for (int at = lane; at < d / V; at += kWarp) {
    Vector<T, V> const vector = vectors[at];
    Vector<__nv_fp8_e4m3, V> rounded;
#pragma unroll
    for (int i = 0; i < V; ++i) {
      rounded.values[i] = __nv_fp8_e4m3(normed(vector, at, i) / step);  // saturates
    }
    out[at] = rounded;
  }
  if (lane == 0) {
    scale[row] = step;
  }
}

// Chan's rule over the tiles of a row: (count, mean, M2) of two parts to those of both.
static __global__ void __launch_bounds__(kWarp* kWarps)
    merge_statistics_kernel(float const* sums,     // (tiles, padded)
                            float const* squares,  // (tiles, padded)
                            float eps,
                            float* mean,  // (M,)
                            float* rstd,  // (M,)
                            int64_t m, int64_t padded, int n, int tile_columns) {
  int64_t const row = int64_t(blockIdx.x) * (kWarp * kWarps) + threadIdx.x;
  if (row >= m) {
    return;
  }
  float total_mean = 0.0f, total_m2 = 0.0f;
  for (int start = 0; start < n; start += tile_columns) {
    int64_t const at = start / tile_columns * padded + row;
    float const count = min(tile_columns, n - start), before = start, both = before + count;
    float const part_mean = sums[at] / count;
    float const part_m2 = fmaxf(squares[at] - sums[at] * part_mean, 0.0f);
    float const apart = part_mean - total_mean;
    total_m2 += part_m2 + apart * apart * (before * count / both);
    total_mean += apart * (count / both);
  }
  mean[row] = total_mean;
  rstd[row] = 1.0f / sqrtf(total_m2 / n + eps);
}

inline constexpr int kManyWarps = 32;

// The sum over the parts of each column, in a fixed order: a block takes kWarp columns, a warp every 32nd part.
static __global__ void __launch_bounds__(kWarp* kManyWarps)
    merge_column_sums_kernel(float const* partials,  // (parts, padded)
                             float* column_sums,     // (N,)
                             int64_t parts, int64_t padded, int64_t n) {
  __shared__ float of_warps[kManyWarps][kWarp + 1];
  int const lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  int64_t const column = int64_t(blockIdx.x) * kWarp + lane;
  float sum = 0.0f;
  for (int64_t part = warp; part < parts; part += kManyWarps) {
    sum += partials[part * padded + column];
  }
  of_warps[warp][lane] = sum;
  __syncthreads();
  // a warp a column now
  int64_t const own = int64_t(blockIdx.x) * kWarp + warp;
  sum = warp_sum(of_warps[lane][warp]);
  if (lane == 0 && own < n) {
    column_sums[own] = sum;
  }
}

template <class T, class P>
__global__ void __launch_bounds__(kWarp* kWarps) fold_kernel(T const* w,  // (N, K), strides w_row, w_column
                                                             int64_t w_row, int64_t w_column,
                                                             P const* gamma,  // (K,)
                                                             P const* beta,   // (K,)
                                                             P const* bias,   // (N,) or null
                                                             T* folded,       // (N, K)
                                                             float* sums,     // (N,)
                                                             float* shift,    // (N,)
                                                             int64_t n, int64_t k) {
  int64_t const row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int const lane = threadIdx.x % kWarp;
  if (row >= n) {
    return;  // a whole warp
  }
  float sum = 0.0f, shifted = 0.0f;
  for (int64_t at = lane; at < k; at += kWarp) {
    float const weight = to_float(w[row * w_row + at * w_column]);
    T const product = rounded<T>(weight * to_float(gamma[at]));
    folded[row * k + at] = product;
    sum += to_float(product);
    shifted += weight * to_float(beta[at]);
  }
  sum = warp_sum(sum);
  shifted = warp_sum(shifted);
  if (lane == 0) {
    sums[row] = sum;
    shift[row] = shifted + (bias == nullptr ? 0.0f : to_float(bias[row]));
  }
}

}  // namespace xclip_fast

// The statistics of a row from those that a product's epilogue left of its tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace xclip_fast {

inline constexpr int kMergeThreads = 128;  // of a block, a row each

// From the sum and the sum of squares of each row of each tile, n_i wide: mean = sum n_i mean_i / N, and M2 = sum M2_i +
// n_i (mean_i - mean)^2. The sums are read twice, the second time from the cache, so that no load waits for another.
static __global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(float const* __restrict__ sums,     // (tiles, padded)
                            float const* __restrict__ squares,  // (tiles, padded)
                            float eps,
                            float* __restrict__ mean,  // (M,)
                            float* __restrict__ rstd,  // (M,)
                            int m, int64_t padded, int n, int tile_columns) {
  int const row = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
  if (row >= m) {
    return;
  }
  int const tiles = (n + tile_columns - 1) / tile_columns;
  float const columns = float(n), full = float(tile_columns), last = float(n - (tiles - 1) * tile_columns);
  float const of_full = 1.0f / full, of_last = 1.0f / last;
  float total = 0.0f;
#pragma unroll 8
  for (int tile = 0; tile < tiles; ++tile) {
    total += sums[tile * padded + row];
  }
  float const row_mean = total / columns;
  float m2 = 0.0f;
#pragma unroll 8
  for (int tile = 0; tile < tiles; ++tile) {
    bool const is_last = tile == tiles - 1;
    float const sum = sums[tile * padded + row], tile_mean = sum * (is_last ? of_last : of_full);
    float const apart = tile_mean - row_mean;
    m2 += fmaxf(squares[tile * padded + row] - sum * tile_mean, 0.0f) + apart * apart * (is_last ? last : full);
  }
  mean[row] = row_mean;
  rstd[row] = 1.0f / sqrtf(m2 / columns + eps);
}

}  // namespace xclip_fast

// The statistics of a row from those that a product's epilogue left of its tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace xclip_fast {

inline constexpr int kMergeThreads = 128;  // of a block, a row each

// Chan's rule over the tiles of a row: (count, mean, M2) of two parts to those of both.
static __global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(float const* sums,     // (tiles, padded)
                            float const* squares,  // (tiles, padded)
                            float eps,
                            float* mean,  // (M,)
                            float* rstd,  // (M,)
                            int64_t m, int64_t padded, int n, int tile_columns) {
  int64_t const row = int64_t(blockIdx.x) * kMergeThreads + threadIdx.x;
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

}  // namespace xclip_fast

// The statistics of a row from those that a product's epilogue left of its tiles.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace xclip_fast {

inline constexpr int kMergeThreads = 128;  // of a block, a row each
inline constexpr int kMergeTiles = 8;      // whose sums a thread asks for before it waits for any

// From the sum and the sum of squares of each row of each tile, n_i wide: mean = sum n_i mean_i / N, and M2 = sum M2_i +
// n_i (mean_i - mean)^2. The last tile, which may be narrower, is apart from the others. The sums of the others are read
// twice, the second time from the cache.
static __global__ void __launch_bounds__(kMergeThreads)
    merge_statistics_kernel(float const* sums,     // (tiles, padded)
                            float const* squares,  // (tiles, padded)
                            float eps,
                            float* mean,  // (M,)
                            float* rstd,  // (M,)
                            int m, int64_t padded, int n, int tile_columns) {
  // The next kernel's blocks start now and wait for this kernel; this kernel waits for the product. No pointer is
  // __restrict__: the product may still be writing the sums, which the compiler could then read before the wait.
  cudaTriggerProgrammaticLaunchCompletion();
  cudaGridDependencySynchronize();
  int const row = int(blockIdx.x) * kMergeThreads + int(threadIdx.x);
  if (row >= m) {
    return;
  }
  int const full = (n - 1) / tile_columns;  // tiles before the last
  float const columns = float(n), full_columns = float(tile_columns), last_columns = float(n - full * tile_columns);
  float const of_full = 1.0f / full_columns, of_last = 1.0f / last_columns;
  auto const load = [&](float (&values)[kMergeTiles], float const* from, int tile) {
    from += tile * padded + row;
#pragma unroll
    for (int i = 0; i < kMergeTiles; ++i, from += padded) {
      values[i] = tile + i < full ? *from : 0.0f;
    }
  };
  float sum[kMergeTiles], square[kMergeTiles];
  float const last_sum = sums[full * padded + row], last_square = squares[full * padded + row];
  float total = last_sum;
#pragma unroll 1
  for (int tile = 0; tile < full; tile += kMergeTiles) {
    load(sum, sums, tile);
#pragma unroll
    for (int i = 0; i < kMergeTiles; ++i) {
      total += sum[i];
    }
  }
  float const row_mean = total / columns;
  auto const squared = [&](float sum, float square, float columns, float of_columns) {
    float const tile_mean = sum * of_columns, apart = tile_mean - row_mean;
    return fmaxf(square - sum * tile_mean, 0.0f) + apart * apart * columns;
  };
  float m2 = squared(last_sum, last_square, last_columns, of_last);
#pragma unroll 1
  for (int tile = 0; tile < full; tile += kMergeTiles) {
    load(sum, sums, tile);
    load(square, squares, tile);
#pragma unroll
    for (int i = 0; i < kMergeTiles; ++i) {
      m2 += tile + i < full ? squared(sum[i], square[i], full_columns, of_full) : 0.0f;
    }
  }
  mean[row] = row_mean;
  rstd[row] = 1.0f / sqrtf(m2 / columns + eps);
}

}  // namespace xclip_fast

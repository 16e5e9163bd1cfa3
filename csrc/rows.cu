// Row statistics of a LayerNorm and its folding into the next weight: a warp a row, ordinary instructions.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include "checks.cuh"
#include "xclip_fast.h"

namespace xclip_fast {
namespace {

constexpr int kWarp = 32;
constexpr int kWarps = 4;  // of a block

__device__ float to_float(float value) { return value; }
__device__ float to_float(__half value) { return __half2float(value); }
__device__ float to_float(__nv_bfloat16 value) { return __bfloat162float(value); }

template <class T>
__device__ T rounded(float value);
template <>
__device__ __half rounded<__half>(float value) { return __float2half_rn(value); }
template <>
__device__ __nv_bfloat16 rounded<__nv_bfloat16>(float value) { return __float2bfloat16_rn(value); }

// The sum over a warp, in all its lanes.
__device__ float warp_sum(float value) {
#pragma unroll
  for (int distance = kWarp / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, distance);
  }
  return value;
}

// V elements that are loaded at once.
template <class T, int V>
struct alignas(sizeof(T) * V) Vector {
  T values[V];
};

template <class T, int V>
__global__ void __launch_bounds__(kWarp* kWarps) row_statistics_kernel(T const* x,  // (M, D), rows x_row apart
                                                                       int64_t x_row, float eps,
                                                                       float* mean,  // (M,)
                                                                       float* rstd,  // (M,)
                                                                       int64_t m, int d) {
  int64_t const row = int64_t(blockIdx.x) * kWarps + threadIdx.x / kWarp;
  int const lane = threadIdx.x % kWarp;
  if (row >= m) {
    return;  // a whole warp
  }
  auto const* vectors = reinterpret_cast<Vector<T, V> const*>(x + row * x_row);
  float sum = 0.0f;
  for (int at = lane; at < d / V; at += kWarp) {
    Vector<T, V> const vector = vectors[at];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      sum += to_float(vector.values[i]);
    }
  }
  float const center = warp_sum(sum) / d;
  // the row comes from the cache now: M2 = sum (x - mean)^2
  float m2 = 0.0f;
  for (int at = lane; at < d / V; at += kWarp) {
    Vector<T, V> const vector = vectors[at];
#pragma unroll
    for (int i = 0; i < V; ++i) {
      float const off = to_float(vector.values[i]) - center;
      m2 += off * off;
    }
  }
  m2 = warp_sum(m2);
  if (lane == 0) {
    mean[row] = center;
    rstd[row] = 1.0f / sqrtf(m2 / d + eps);
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

int blocks(int64_t rows) { return static_cast<int>((rows + kWarps - 1) / kWarps); }

int launched() { return cudaPeekAtLastError() == cudaSuccess ? XCLIP_FAST_OK : failure(); }

template <class T>
int row_statistics(void const* x, int64_t x_row, float eps, float* mean, float* rstd, int64_t m, int64_t d,
                   cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  auto const* rows = static_cast<T const*>(x);
  if (whole_16_bytes(x) && x_row % V == 0 && d % V == 0) {
    row_statistics_kernel<T, V><<<blocks(m), kWarp * kWarps, 0, stream>>>(rows, x_row, eps, mean, rstd, m, int(d));
  } else {
    row_statistics_kernel<T, 1><<<blocks(m), kWarp * kWarps, 0, stream>>>(rows, x_row, eps, mean, rstd, m, int(d));
  }
  return launched();
}

template <class T, class P>
int fold(void const* w, int64_t w_row, int64_t w_column, void const* gamma, void const* beta, void const* bias,
         void* folded, float* sums, float* shift, int64_t n, int64_t k, cudaStream_t stream) {
  fold_kernel<T, P><<<blocks(n), kWarp * kWarps, 0, stream>>>(
      static_cast<T const*>(w), w_row, w_column, static_cast<P const*>(gamma), static_cast<P const*>(beta),
      static_cast<P const*>(bias), static_cast<T*>(folded), sums, shift, n, k);
  return launched();
}

}  // namespace
}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

int xclip_fast_row_statistics(int dtype, const void* x, int64_t x_row, float eps, float* mean, float* rstd, int64_t m,
                              int64_t d, int device, void* stream) {
  if (dtype < XCLIP_FAST_BF16 || dtype > XCLIP_FAST_FP32) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (!is_size(m) || !is_size(d) || d == 0 || x_row < d) {
    return XCLIP_FAST_BAD_SIZE;
  }
  if (m == 0) {
    return XCLIP_FAST_OK;
  }
  if (x == nullptr || mean == nullptr || rstd == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  auto const on = static_cast<cudaStream_t>(stream);
  switch (dtype) {
    case XCLIP_FAST_BF16:
      return row_statistics<__nv_bfloat16>(x, x_row, eps, mean, rstd, m, d, on);
    case XCLIP_FAST_FP16:
      return row_statistics<__half>(x, x_row, eps, mean, rstd, m, d, on);
    default:
      return row_statistics<float>(x, x_row, eps, mean, rstd, m, d, on);
  }
}

int xclip_fast_fold(int dtype, int parameter_dtype, const void* w, int64_t w_row, int64_t w_column, const void* gamma,
                    const void* beta, const void* bias, void* folded, float* sums, float* shift, int64_t n, int64_t k,
                    int device, void* stream) {
  if (dtype != XCLIP_FAST_BF16 && dtype != XCLIP_FAST_FP16) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (!is_size(n) || !is_size(k) || k == 0) {
    return XCLIP_FAST_BAD_SIZE;
  }
  if (n == 0) {
    return XCLIP_FAST_OK;
  }
  if (w == nullptr || gamma == nullptr || beta == nullptr || folded == nullptr || sums == nullptr || shift == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  auto const run = [&](auto call) {
    return call(w, w_row, w_column, gamma, beta, bias, folded, sums, shift, n, k, static_cast<cudaStream_t>(stream));
  };
  bool const bf16 = dtype == XCLIP_FAST_BF16;
  switch (parameter_dtype) {
    case XCLIP_FAST_BF16:
      return run(bf16 ? fold<__nv_bfloat16, __nv_bfloat16> : fold<__half, __nv_bfloat16>);
    case XCLIP_FAST_FP16:
      return run(bf16 ? fold<__nv_bfloat16, __half> : fold<__half, __half>);
    case XCLIP_FAST_FP32:
      return run(bf16 ? fold<__nv_bfloat16, float> : fold<__half, float>);
    default:
      return XCLIP_FAST_BAD_DTYPE;
  }
}

}  // extern "C"

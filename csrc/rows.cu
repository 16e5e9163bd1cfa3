// Checks and launches of the row kernels.
#include "checks.cuh"
#include "products.cuh"
#include "rows.cuh"
#include "xclip_fast.h"

namespace xclip_fast {
namespace {

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

template <class T>
int layer_norm_fp8(void const* x, int64_t x_row, float const* gamma, float const* beta, float eps, void* y,
                   float* scale, int64_t m, int64_t d, cudaStream_t stream) {
  constexpr int V = 16 / sizeof(T);
  auto const* rows = static_cast<T const*>(x);
  auto* const out = static_cast<__nv_fp8_e4m3*>(y);
  auto const run = [&](auto kernel) {
    kernel<<<blocks(m), kWarp * kWarps, 0, stream>>>(rows, x_row, gamma, beta, eps, out, scale, m, int(d));
    return launched();
  };
  bool const whole = whole_16_bytes(x) && whole_16_bytes(y) && x_row % V == 0 && d % V == 0;
  return whole ? run(layer_norm_fp8_kernel<T, V>) : run(layer_norm_fp8_kernel<T, 1>);
}

template <class T, class P>
int fold(void const* w, int64_t w_row, int64_t w_column, void const* gamma, void const* beta, void const* bias,
         void* folded, float* sums, float* shift, int64_t n, int64_t k, cudaStream_t stream) {
  fold_kernel<T, P><<<blocks(n), kWarp * kWarps, 0, stream>>>(
      static_cast<T const*>(w), w_row, w_column, static_cast<P const*>(gamma), static_cast<P const*>(beta),
      static_cast<P const*>(bias), static_cast<T*>(folded), sums, shift, n, k);
  return launched();
}

int64_t tiles(int64_t size, int tile) { return (size + tile - 1) / tile; }

// Checks what row kernels share, calls `run` on the device with the element type of `dtype`.
template <class Run>
int on_rows(int dtype, int64_t m, int64_t d, int64_t x_row, bool pointers, int device, Run&& run) {
  if (dtype < XCLIP_FAST_BF16 || dtype > XCLIP_FAST_FP32) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (!is_size(m) || !is_size(d) || d == 0 || x_row < d) {
    return XCLIP_FAST_BAD_SIZE;
  }
  if (m == 0) {
    return XCLIP_FAST_OK;
  }
  if (!pointers) {
    return XCLIP_FAST_BAD_POINTER;
  }
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  return dtype == XCLIP_FAST_BF16 ? run(__nv_bfloat16{}) : dtype == XCLIP_FAST_FP16 ? run(__half{}) : run(float{});
}

}  // namespace

int merge_statistics(Operands const& given, StatisticsArguments const& extra, int tile_rows, int tile_columns) {
  int64_t const padded = tiles(given.m, tile_rows) * tile_rows, threads = kWarp * kWarps;
  merge_statistics_kernel<<<int((given.m + threads - 1) / threads), threads, 0,
                            static_cast<cudaStream_t>(given.stream)>>>(
      extra.sums, extra.squares, extra.eps, extra.mean, extra.rstd, given.m, padded, int(given.n), tile_columns);
  return launched();
}

int merge_column_sums(Operands const& given, SlopeArguments const& extra, int tile_rows, int rows_of_tile,
                      int tile_columns) {
  int64_t const padded = tiles(given.n, tile_columns) * tile_columns, parts = tiles(given.m, tile_rows) * rows_of_tile;
  merge_column_sums_kernel<<<int(padded / kWarp), kWarp * kManyWarps, 0, static_cast<cudaStream_t>(given.stream)>>>(
      extra.partials, extra.column_sums, parts, padded, given.n);
  return launched();
}

}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

int xclip_fast_row_statistics(int dtype, const void* x, int64_t x_row, float eps, float* mean, float* rstd, int64_t m,
                              int64_t d, int device, void* stream) {
  bool const pointers = x != nullptr && mean != nullptr && rstd != nullptr;
  return on_rows(dtype, m, d, x_row, pointers, device, [&](auto element) {
    return row_statistics<decltype(element)>(x, x_row, eps, mean, rstd, m, d, static_cast<cudaStream_t>(stream));
  });
}

int xclip_fast_layer_norm_fp8(int dtype, const void* x, int64_t x_row, const float* gamma, const float* beta, float eps,
                              void* y, float* scale, int64_t m, int64_t d, int device, void* stream) {
  bool const pointers = x != nullptr && gamma != nullptr && beta != nullptr && y != nullptr && scale != nullptr;
  return on_rows(dtype, m, d, x_row, pointers, device, [&](auto element) {
    return layer_norm_fp8<decltype(element)>(x, x_row, gamma, beta, eps, y, scale, m, d,
                                             static_cast<cudaStream_t>(stream));
  });
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

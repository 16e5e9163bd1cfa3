/* The C interface of xclip-fast's CUDA library: plain pointers, sizes in elements, a stream, an error code.
 *
 * Matrices are row-major; a row stride is the distance of two rows in elements, at least the row's length. Pointers are
 * device memory of `device`. Nothing is allocated, nothing waits: a call only puts kernels on `stream`, so it works on
 * any stream and, once a kernel has been loaded by its first call, while a CUDA graph is captured. Every call may come
 * from any thread.
 *
 * What each product computes is derived in docs/kernels.md; M rows, N columns, K summed.
 */
#ifndef XCLIP_FAST_H
#define XCLIP_FAST_H

#include <stdint.h>

#if defined(__GNUC__)
#define XCLIP_FAST_API __attribute__((visibility("default")))
#else
#define XCLIP_FAST_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

/* Changes with every change of a signature or a constant below; kernels/cuda_library.py asks for exactly this one. */
#define XCLIP_FAST_ABI 8

/* Element types. */
#define XCLIP_FAST_BF16 0
#define XCLIP_FAST_FP16 1

/* Tiles of a product: let the library's table choose, or one of those of csrc/include/tiles.cuh. */
#define XCLIP_FAST_TILE_AUTO (-1)
#define XCLIP_FAST_TILE_SQUARE 0
#define XCLIP_FAST_TILE_WIDE 1

/* Error codes; 0 is success. From XCLIP_FAST_CUDA_ERROR on: a cudaError_t above it. */
#define XCLIP_FAST_OK 0
#define XCLIP_FAST_BAD_SIZE 1      /* a negative or too large size, or a row stride below the row's length */
#define XCLIP_FAST_BAD_ALIGNMENT 2 /* a matrix's base or row, or a size, is not in the whole units that TMA wants */
#define XCLIP_FAST_BAD_DTYPE 3     /* not one of the element types that the call takes */
#define XCLIP_FAST_BAD_DEVICE 4    /* the device is not of compute capability 9.0 */
#define XCLIP_FAST_BAD_TILE 5      /* the tile was not built for this product */
#define XCLIP_FAST_BAD_POINTER 6   /* a pointer that may not be null is null */
#define XCLIP_FAST_REFUSED 7       /* CUTLASS refused the arguments */
#define XCLIP_FAST_FAILED 8        /* CUTLASS failed to launch, and kept CUDA's reason to itself */
#define XCLIP_FAST_CUDA_ERROR 1000

/* XCLIP_FAST_ABI of the library. */
XCLIP_FAST_API int xclip_fast_abi(void);

/* The meaning of an error code in words; never null, never to be freed. */
XCLIP_FAST_API const char* xclip_fast_error(int code);

/* 0 if the products run on this device, else why not. */
XCLIP_FAST_API int xclip_fast_check_device(int device);

/* y = act(rstd (x W^T - mean w_sums) + bias): the LayerNorm of x whose weight is folded into W.
 *
 * x (M, K) and w (N, K) in dtype (BF16, FP16); mean, rstd (M) float32, or both null: 0 and 1; w_sums (N) float32, the
 * sums of w's rows, null with mean; bias (N) float32 or null; act: quick_gelu if activation is not 0. u (M, N)
 * in BF16 or null: what the activation is applied to, only with activation. y (M, N) in dtype. u and y are contiguous. */
XCLIP_FAST_API int xclip_fast_norm_linear(int dtype, int tile, const void* x, int64_t x_row, const void* w,
                                          int64_t w_row, const float* mean, const float* rstd, const float* w_sums,
                                          const float* bias, int activation, void* u, void* y, int64_t m,
                                          int64_t n, int64_t k, int device, void* stream);

/* y = (x W) quick_gelu'(u), h = quick_gelu(u), and the sums of y's columns before they are rounded: the backward pass of
 * quick_gelu(u) V^T, where x is the gradient of the result and W = V.
 *
 * x (M, K), w (K, N), u (M, N), h and y (M, N) contiguous, in dtype (BF16). partials (4 ceil(M / 128), N) float32: sums
 * over parts of the rows. y and h may not overlap the others. */
XCLIP_FAST_API int xclip_fast_slope(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                                    const void* u, int64_t u_row, void* h, float* partials, void* y, int64_t m,
                                    int64_t n, int64_t k, int device, void* stream);

/* y = residual + scale (x W^T + bias), and, if wanted, the row statistics that the next LayerNorm wants.
 *
 * x (M, K), w (N, K), residual (M, N) and y (M, N) contiguous in dtype (BF16, FP16). bias (N) float32 or null; scale (M)
 * float32, each row's drop path factor, or null: 1. y may not overlap the others. mean (M) and rstd (M) = 1 /
 * sqrt(variance + eps) of y's rows before they are rounded, float32, merged from the mean and M2 of each tile, with
 * partials: room for xclip_fast_statistics_floats(M, N) floats; or all three null. */
XCLIP_FAST_API int xclip_fast_linear_residual(int dtype, int tile, const void* x, int64_t x_row, const void* w,
                                              int64_t w_row, const float* bias, const float* scale,
                                              const void* residual, int64_t residual_row, float eps, float* partials,
                                              float* mean, float* rstd, void* y, int64_t m, int64_t n, int64_t k,
                                              int device, void* stream);

/* Floats of the partial results of those statistics, on whatever tile. */
XCLIP_FAST_API int64_t xclip_fast_statistics_floats(int64_t m, int64_t n);

#ifdef __cplusplus
}
#endif

#endif /* XCLIP_FAST_H */

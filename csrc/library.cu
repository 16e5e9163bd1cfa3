// The C interface: checks the arguments of a product and hands it to the file of its element type.
#include <cuda_runtime_api.h>

#include <atomic>

#include "products.cuh"
#include "xclip_fast.h"

namespace xclip_fast {
namespace {

constexpr int kMostDevices = 64;

// Multiprocessors of a device of compute capability 9.0; 0 if it has another; or minus an error code.
int processors(int device) {
  static std::atomic<int> known[kMostDevices];  // 1 + the answer, 0 before it is asked
  if (device < 0 || device >= kMostDevices) {
    return 0;
  }
  int answer = known[device].load(std::memory_order_relaxed);
  if (answer == 0) {
    int major = 0, minor = 0, count = 0;
    if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
        cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
      return -failure();
    }
    answer = 1 + (major == 9 && minor == 0 ? count : 0);
    known[device].store(answer, std::memory_order_relaxed);
  }
  return answer - 1;
}

// A matrix that TMA reads or writes: rows of `columns` half-precision elements.
int check_matrix(void const* matrix, int64_t rows, int64_t columns, int64_t row) {
  if (rows > 0 && columns > 0 && matrix == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  if (row < columns || row > (int64_t(1) << 38)) {
    return XCLIP_FAST_BAD_SIZE;
  }
  return whole_16_bytes(matrix) && columns % 8 == 0 && row % 8 == 0 ? XCLIP_FAST_OK : XCLIP_FAST_BAD_ALIGNMENT;
}

// Checks what all products share and notes the device's processors.
int check(int dtype, Operands& given) {
  if (dtype != XCLIP_FAST_BF16 && dtype != XCLIP_FAST_FP16) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (!is_size(given.m) || !is_size(given.n) || !is_size(given.k) || given.k == 0) {
    return XCLIP_FAST_BAD_SIZE;
  }
  int code = check_matrix(given.x, given.m, given.k, given.x_row);
  code = code ? code : check_matrix(given.w, given.n, given.k, given.w_row);
  code = code ? code : check_matrix(given.y, given.m, given.n, given.n);
  if (code) {
    return code;
  }
  given.processors = processors(given.device);
  return given.processors > 0 ? XCLIP_FAST_OK : given.processors < 0 ? -given.processors : XCLIP_FAST_BAD_DEVICE;
}

template <class Call>
int launch(int dtype, Operands& given, Call&& call) {
  if (int const code = check(dtype, given)) {
    return code;
  }
  if (given.m == 0 || given.n == 0) {
    return XCLIP_FAST_OK;
  }
  OnDevice const current(given.device);
  return current.code() ? current.code() : call();
}

}  // namespace
}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

int xclip_fast_abi(void) { return XCLIP_FAST_ABI; }

const char* xclip_fast_error(int code) {
  switch (code) {
    case XCLIP_FAST_OK:
      return "success";
    case XCLIP_FAST_BAD_SIZE:
      return "a size is negative, zero where it may not be, or too large, or a row stride is below the row's length";
    case XCLIP_FAST_BAD_ALIGNMENT:
      return "the base or the rows of a matrix, or K or N, are not in whole 16 bytes";
    case XCLIP_FAST_BAD_DTYPE:
      return "this call does not take this element type";
    case XCLIP_FAST_BAD_DEVICE:
      return "the device is not of compute capability 9.0";
    case XCLIP_FAST_BAD_TILE:
      return "this product was not built with this tile";
    case XCLIP_FAST_BAD_POINTER:
      return "a pointer that may not be null is null";
    case XCLIP_FAST_REFUSED:
      return "CUTLASS refused the arguments";
    case XCLIP_FAST_FAILED:
      return "CUTLASS failed to launch, and CUDA gave no reason";
    default:
      return code > XCLIP_FAST_CUDA_ERROR ? cudaGetErrorString(static_cast<cudaError_t>(code - XCLIP_FAST_CUDA_ERROR))
                                          : "no such error code";
  }
}

int xclip_fast_check_device(int device) {
  int const count = processors(device);
  return count > 0 ? XCLIP_FAST_OK : count < 0 ? -count : XCLIP_FAST_BAD_DEVICE;
}

int xclip_fast_norm_linear(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                           const float* mean, const float* rstd, const float* w_sums, const float* bias, int activation,
                           void* u, void* y, int64_t m, int64_t n, int64_t k, int device, void* stream) {
  Operands given{x, x_row, w, w_row, nullptr, n, y, m, n, k, device, 0, stream};
  NormArguments const extra{mean, rstd, w_sums, bias, u};
  bool const normed = mean != nullptr, half_normed = normed != (rstd != nullptr) || normed != (w_sums != nullptr);
  if (m > 0 && n > 0 && (half_normed || (u != nullptr && !activation))) {
    return XCLIP_FAST_BAD_POINTER;
  }
  if (!whole_16_bytes(u)) {
    return XCLIP_FAST_BAD_ALIGNMENT;
  }
  return launch(dtype, given, [&] {
    if (dtype == XCLIP_FAST_BF16) {
      return activation ? norm_gelu<XCLIP_FAST_BF16>(tile, given, extra) : norm<XCLIP_FAST_BF16>(tile, given, extra);
    }
    return activation ? norm_gelu<XCLIP_FAST_FP16>(tile, given, extra) : norm<XCLIP_FAST_FP16>(tile, given, extra);
  });
}

int xclip_fast_linear_residual(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                               const float* bias, const float* scale, const void* residual, int64_t residual_row,
                               void* y, int64_t m, int64_t n, int64_t k, int device, void* stream) {
  Operands given{x, x_row, w, w_row, residual, residual_row, y, m, n, k, device, 0, stream};
  if (int const code = check_matrix(residual, m, n, residual_row)) {
    return code;
  }
  ResidualArguments const extra{bias, scale};
  return launch(dtype, given, [&] {
    return dtype == XCLIP_FAST_BF16 ? xclip_fast::residual<XCLIP_FAST_BF16>(tile, given, extra)
                                    : xclip_fast::residual<XCLIP_FAST_FP16>(tile, given, extra);
  });
}

int xclip_fast_linear_slope(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                            const void* u, int64_t u_row, void* y, int64_t m, int64_t n, int64_t k, int device,
                            void* stream) {
  Operands given{x, x_row, w, w_row, u, u_row, y, m, n, k, device, 0, stream};
  if (int const code = check_matrix(u, m, n, u_row)) {
    return code;
  }
  return launch(dtype, given, [&] {
    return dtype == XCLIP_FAST_BF16 ? slope<XCLIP_FAST_BF16>(tile, given, {}) : slope<XCLIP_FAST_FP16>(tile, given, {});
  });
}

}  // extern "C"

// The C interface: checks the arguments of a product and hands it to the file of its element type.
#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <mutex>
#include <optional>

#include "overlap.cuh"
#include "products.cuh"
#include "statistics.cuh"
#include "xclip_fast.h"

namespace xclip_fast {
namespace {

// What a launch asks of a device: 0 or why nothing runs there, and its multiprocessors.
struct Facts {
  int code, processors;
};

Facts ask(int device) {
  int major = 0, minor = 0;
  Facts found{XCLIP_FAST_OK, 0};
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess) {
    found.code = failure();
  } else if (major != 9 || minor != 0) {
    found.code = XCLIP_FAST_BAD_DEVICE;
  }
  return found;
}

// What `ask` finds, asked once a device.
Facts facts(int device) {
  constexpr int kMostDevices = 64;
  static std::mutex mutex;
  static std::optional<Facts> known[kMostDevices];
  if (device < 0 || device >= kMostDevices) {
    return {XCLIP_FAST_BAD_DEVICE, 0};
  }
  std::lock_guard const lock(mutex);
  if (!known[device]) {
    known[device] = ask(device);
  }
  return *known[device];
}

// A matrix that TMA reads or writes: rows of `columns` elements, 8 of which are 16 bytes.
int check_matrix(void const* matrix, int64_t rows, int64_t columns, int64_t row) {
  if (rows > 0 && columns > 0 && matrix == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  if (row < columns || row > (int64_t(1) << 38)) {
    return XCLIP_FAST_BAD_SIZE;
  }
  return whole_16_bytes(matrix) && columns % 8 == 0 && row % 8 == 0 ? XCLIP_FAST_OK : XCLIP_FAST_BAD_ALIGNMENT;
}

// Checks what all products share, and calls `call` on the device, whose processors it notes. w is (N, K), or (K, N).
template <class Call>
int launch(Operands& given, Call&& call, bool w_is_kn = false) {
  if (!is_size(given.m) || !is_size(given.n) || !is_size(given.k) || given.k == 0) {
    return XCLIP_FAST_BAD_SIZE;
  }
  int code = check_matrix(given.x, given.m, given.k, given.x_row);
  code = code ? code : check_matrix(given.w, w_is_kn ? given.k : given.n, w_is_kn ? given.n : given.k, given.w_row);
  code = code ? code : check_matrix(given.y, given.m, given.n, given.n);
  if (code) {
    return code;
  }
  Facts const found = facts(given.device);
  if (found.code) {
    return found.code;
  }
  given.processors = found.processors;
  if (given.m == 0 || given.n == 0) {
    return XCLIP_FAST_OK;
  }
  OnDevice const current(given.device);
  return current.code() ? current.code() : call();
}

bool any(Operands const& given) { return given.m > 0 && given.n > 0; }

}  // namespace

int merge_statistics(Operands const& given, ResidualArguments const& extra, int tile_rows, int tile_columns) {
  int64_t const padded = (given.m + tile_rows - 1) / tile_rows * tile_rows;
  cudaLaunchAttribute early = start_early();
  cudaLaunchConfig_t config = {};
  config.gridDim = int((given.m + kMergeThreads - 1) / kMergeThreads);
  config.blockDim = kMergeThreads;
  config.stream = static_cast<cudaStream_t>(given.stream);
  config.attrs = &early;
  config.numAttrs = 1;
  float const *sums = extra.sums, *squares = extra.squares;
  cudaError_t const error =
      cudaLaunchKernelEx(&config, merge_statistics_kernel, sums, squares, extra.eps, extra.mean, extra.rstd,
                         int(given.m), padded, int(given.n), tile_columns);
  return error == cudaSuccess ? XCLIP_FAST_OK : failure();
}

}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

// CUTLASS calls this driver function for each tensor map, three or four a product. It is found once, while the library
// runs: libcuda is not there where the library is built. This definition is hidden, so it takes no other library's place.
CUresult CUDAAPI cuTensorMapEncodeTiled(CUtensorMap* map, CUtensorMapDataType type, cuuint32_t rank, void* address,
                                        cuuint64_t const* sizes, cuuint64_t const* strides, cuuint32_t const* box,
                                        cuuint32_t const* steps, CUtensorMapInterleave interleave,
                                        CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                                        CUtensorMapFloatOOBfill fill) {
  static auto const encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 13000
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault, &result);
#else
    cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result);
#endif
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  return encode == nullptr ? CUDA_ERROR_NOT_FOUND
                           : encode(map, type, rank, address, sizes, strides, box, steps, interleave, swizzle, promotion,
                                    fill);
}

int xclip_fast_abi(void) { return XCLIP_FAST_ABI; }

const char* xclip_fast_error(int code) {
  switch (code) {
    case XCLIP_FAST_OK:
      return "success";
    case XCLIP_FAST_BAD_SIZE:
      return "a size is negative, zero where it may not be, or too large, or a row stride is below the row's "
             "length";
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
      return "CUTLASS failed to launch, and kept CUDA's reason to itself";
    default:
      return code > XCLIP_FAST_CUDA_ERROR ? cudaGetErrorString(static_cast<cudaError_t>(code - XCLIP_FAST_CUDA_ERROR))
                                          : "no such error code";
  }
}

int xclip_fast_check_device(int device) { return facts(device).code; }

int xclip_fast_norm_linear(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                           const float* mean, const float* rstd, const float* w_sums, const float* bias, int activation,
                           void* u, void* y, int64_t m, int64_t n, int64_t k, int device, void* stream) {
  Operands given{x, x_row, w, w_row, nullptr, n, y, m, n, k, device, 0, stream};
  NormArguments const extra{mean, rstd, w_sums, bias, u, n};
  if (!is_half(dtype) || (u != nullptr && dtype != XCLIP_FAST_BF16)) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  bool const normed = mean != nullptr, half_normed = normed != (rstd != nullptr) || normed != (w_sums != nullptr);
  if (any(given) && (half_normed || (u != nullptr && !activation))) {
    return XCLIP_FAST_BAD_POINTER;
  }
  if (!whole_16_bytes(u)) {
    return XCLIP_FAST_BAD_ALIGNMENT;
  }
  return launch(given, [&] {
    return u != nullptr ? norm_gelu_kept(tile, given, extra)
           : activation ? norm_gelu(dtype, tile, given, extra)
                        : norm(dtype, tile, given, extra);
  });
}

int xclip_fast_slope(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row, const void* u,
                     int64_t u_row, void* h, float* partials, void* y, int64_t m, int64_t n, int64_t k, int device,
                     void* stream) {
  Operands given{x, x_row, w, w_row, u, u_row, y, m, n, k, device, 0, stream};
  if (dtype != XCLIP_FAST_BF16) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  int code = check_matrix(u, m, n, u_row);
  code = code ? code : check_matrix(h, m, n, n);
  if (code) {
    return code;
  }
  if (any(given) && partials == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  return launch(given, [&] { return slope(tile, given, {h, partials, n}); }, /*w_is_kn=*/true);
}

int64_t xclip_fast_statistics_floats(int64_t m, int64_t n) {
  // two for each row, rounded up to the tile's 128, and column of tiles, which are 128 wide or wider
  return 2 * ((m + 127) / 128 * 128) * ((n + 127) / 128);
}

int xclip_fast_linear_residual(int dtype, int tile, const void* x, int64_t x_row, const void* w, int64_t w_row,
                               const float* bias, const float* scale, const void* residual, int64_t residual_row,
                               float eps, float* partials, float* mean, float* rstd, void* y, int64_t m, int64_t n,
                               int64_t k, int device, void* stream) {
  Operands given{x, x_row, w, w_row, residual, residual_row, y, m, n, k, device, 0, stream};
  bool const wanted = mean != nullptr;
  if (!is_half(dtype)) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (int const code = check_matrix(residual, m, n, residual_row)) {
    return code;
  }
  if (any(given) && (wanted != (partials != nullptr) || wanted != (rstd != nullptr))) {
    return XCLIP_FAST_BAD_POINTER;
  }
  if (!whole_16_bytes(partials)) {
    return XCLIP_FAST_BAD_ALIGNMENT;
  }
  float* const squares = partials + xclip_fast_statistics_floats(m, n) / 2;
  ResidualArguments const extra{bias, scale, partials, squares, mean, rstd, eps};
  return launch(given, [&] {
    return wanted ? residual_statistics(dtype, tile, given, extra) : residual_add(dtype, tile, given, extra);
  });
}

}  // extern "C"

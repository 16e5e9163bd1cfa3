// What every entry point checks before it launches.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "xclip_fast.h"

namespace xclip_fast {

// The last CUDA error as an error code of the library. It is cleared: it has been told.
inline int failure() {
  cudaError_t const error = cudaGetLastError();
  return error == cudaSuccess ? XCLIP_FAST_FAILED : XCLIP_FAST_CUDA_ERROR + static_cast<int>(error);
}

// Makes a device current for as long as it lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    cudaError_t error = cudaGetDevice(&before_);
    if (error == cudaSuccess && before_ != device) {
      error = cudaSetDevice(device);
      restore_ = error == cudaSuccess;
    }
    code_ = error == cudaSuccess ? XCLIP_FAST_OK : failure();
  }
  ~OnDevice() {
    if (restore_) {
      cudaSetDevice(before_);
    }
  }
  OnDevice(OnDevice const&) = delete;
  OnDevice& operator=(OnDevice const&) = delete;

  int code() const { return code_; }

 private:
  int before_ = 0;
  bool restore_ = false;
  int code_ = XCLIP_FAST_OK;
};

inline bool is_half(int dtype) { return dtype == XCLIP_FAST_BF16 || dtype == XCLIP_FAST_FP16; }

inline bool whole_16_bytes(void const* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

// Far enough from the end of an int that loops may step past it.
inline bool is_size(int64_t size) { return size >= 0 && size <= (1 << 30); }

}  // namespace xclip_fast

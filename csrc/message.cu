// Checks and launches the message path.
#include "checks.cuh"
#include "message.cuh"
#include "xclip_fast.h"

namespace xclip_fast {
namespace {

template <class T, class P>
__global__ void __launch_bounds__(kMessageThreads, 1) message_kernel(MessageArguments<T, P> const given) {
  extern __shared__ __align__(16) unsigned char shared[];
  MessagePath<T, P>(given, shared).run();
}

// `device` is current.
Facts ask(int device) {
  int major = 0, cooperative = 0;
  Facts found{XCLIP_FAST_OK, 0, 0};
  cudaFuncAttributes compiled;
  auto* const kernel = message_kernel<__nv_bfloat16, __nv_bfloat16>;
  if (cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&cooperative, cudaDevAttrCooperativeLaunch, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.processors, cudaDevAttrMultiProcessorCount, device) != cudaSuccess ||
      cudaDeviceGetAttribute(&found.room, cudaDevAttrMaxSharedMemoryPerBlockOptin, device) != cudaSuccess) {
    found.code = failure();
  } else if (major < 8 || cooperative != 1) {
    found.code = XCLIP_FAST_BAD_DEVICE;
  } else if (cudaFuncGetAttributes(&compiled, kernel) != cudaSuccess) {
    found.code = failure();  // it was not compiled for this device
  }
  return found;
}

// The number of blocks for a width: the least of at least half the processors with which the weights fit, because fewer
// blocks wait less at the barriers; 0 if they fit into no number.
int choose_blocks(int width, Facts const& found) {
  for (int blocks = (found.processors + 1) / 2; blocks <= found.processors; ++blocks) {
    if (MessageLayout{width, blocks}.bytes() <= size_t(found.room)) {
      return blocks;
    }
  }
  return 0;
}

template <class T, class P>
int launch_message(MessageArguments<T, P> const& given, int blocks, int room, cudaStream_t stream) {
  auto* const kernel = message_kernel<T, P>;
  // always the most there is: what one thread sets here, another may set at the same time
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, room) != cudaSuccess) {
    return failure();
  }
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kMessageThreads);
  config.dynamicSmemBytes = MessageLayout{given.width, blocks}.bytes();
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, given) == cudaSuccess ? XCLIP_FAST_OK : failure();
}

}  // namespace
}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

int xclip_fast_check_message(int64_t width, int device) {
  if (width < kHead || width % kHead || width > 4096) {
    return XCLIP_FAST_BAD_SIZE;
  }
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  Facts const found = facts<ask>(device);
  return found.code ? found.code : choose_blocks(int(width), found) ? XCLIP_FAST_OK : XCLIP_FAST_REFUSED;
}

int64_t xclip_fast_message_floats(int64_t rows, int64_t width) {
  return rows * width * 5;  // m, qkv and, of half the size, mixed: whole floats
}

int xclip_fast_message_kv(int dtype, int parameter_dtype, int blocks, const void* x, int64_t x_row,
                          const void* const* weights, const void* const* biases, const void* const* norms, float eps,
                          int64_t rows, int64_t frames, int64_t width, float* workspace, void* key_value, int device,
                          void* stream) {
  if (!is_half(dtype) || (parameter_dtype != dtype && parameter_dtype != XCLIP_FAST_FP32)) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (!is_size(rows) || frames < 1 || frames > kMostFrames || rows % frames || width < kHead || width % kHead ||
      width > 4096 || x_row < width || blocks < 0) {
    return XCLIP_FAST_BAD_SIZE;
  }
  if (rows == 0) {
    return XCLIP_FAST_OK;
  }
  if (x == nullptr || weights == nullptr || biases == nullptr || norms == nullptr || workspace == nullptr ||
      key_value == nullptr) {
    return XCLIP_FAST_BAD_POINTER;
  }
  bool whole = whole_16_bytes(x) && x_row % 8 == 0 && whole_16_bytes(workspace);
  for (int i = 0; i < 4; ++i) {
    if (weights[i] == nullptr || biases[i] == nullptr || norms[i] == nullptr) {
      return XCLIP_FAST_BAD_POINTER;
    }
    whole = whole && whole_16_bytes(weights[i]);
  }
  if (!whole) {
    return XCLIP_FAST_BAD_ALIGNMENT;
  }
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  Facts const found = facts<ask>(device);
  if (found.code) {
    return found.code;
  }
  blocks = blocks ? blocks : choose_blocks(int(width), found);
  if (blocks == 0 || blocks > found.processors || MessageLayout{int(width), blocks}.bytes() > size_t(found.room)) {
    return XCLIP_FAST_REFUSED;
  }
  auto const run = [&](auto element, auto parameter) {
    using T = decltype(element);
    using P = decltype(parameter);
    MessageArguments<T, P> given;
    given.x = static_cast<T const*>(x);
    given.x_row = x_row;
    for (int i = 0; i < 4; ++i) {
      given.weights[i] = static_cast<T const*>(weights[i]);
      given.biases[i] = static_cast<P const*>(biases[i]);
      (i < 2 ? given.norm_m : given.norm_1)[i % 2] = static_cast<P const*>(norms[i]);
    }
    given.eps = eps;
    given.rows = int(rows);
    given.frames = int(frames);
    given.width = int(width);
    given.m = workspace;
    given.qkv = workspace + rows * width;
    given.mixed = reinterpret_cast<T*>(workspace + rows * width * 4);
    given.key_value = static_cast<T*>(key_value);
    return launch_message(given, blocks, found.room, static_cast<cudaStream_t>(stream));
  };
  bool const wide = parameter_dtype == XCLIP_FAST_FP32;
  if (dtype == XCLIP_FAST_BF16) {
    return wide ? run(__nv_bfloat16{}, float{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
  }
  return wide ? run(__half{}, float{}) : run(__half{}, __half{});
}

}  // extern "C"

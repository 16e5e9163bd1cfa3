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

int attribute(int device, cudaDeviceAttr which) {
  int value = 0;
  return cudaDeviceGetAttribute(&value, which, device) == cudaSuccess ? value : -1;
}

// The number of blocks for a width: half the processors, which leaves the others to what runs beside, if the weights
// fit into their shared memory, else all. 0 if they do not fit there either.
int choose_blocks(int width, int processors, int room) {
  for (int blocks : {processors / 2, processors}) {
    if (blocks > 0 && MessageLayout{width, blocks}.bytes() <= size_t(room)) {
      return blocks;
    }
  }
  return 0;
}

template <class T, class P>
int launch_message(MessageArguments<T, P> const& given, int blocks, int room, cudaStream_t stream) {
  size_t const bytes = MessageLayout{given.width, blocks}.bytes();
  if (bytes > size_t(room)) {
    return XCLIP_FAST_REFUSED;
  }
  auto* const kernel = message_kernel<T, P>;
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(bytes)) != cudaSuccess) {
    return failure();
  }
  cudaLaunchAttribute together;
  together.id = cudaLaunchAttributeCooperative;
  together.val.cooperative = 1;
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(blocks);
  config.blockDim = dim3(kMessageThreads);
  config.dynamicSmemBytes = bytes;
  config.stream = stream;
  config.attrs = &together;
  config.numAttrs = 1;
  return cudaLaunchKernelEx(&config, kernel, given) == cudaSuccess ? XCLIP_FAST_OK : failure();
}

}  // namespace
}  // namespace xclip_fast

using namespace xclip_fast;

extern "C" {

int xclip_fast_check_message(int device) {
  OnDevice const current(device);
  if (int const code = current.code()) {
    return code;
  }
  if (attribute(device, cudaDevAttrComputeCapabilityMajor) < 8 ||
      attribute(device, cudaDevAttrCooperativeLaunch) != 1) {
    return XCLIP_FAST_BAD_DEVICE;
  }
  cudaFuncAttributes found;
  auto* const kernel = message_kernel<__nv_bfloat16, __nv_bfloat16>;
  return cudaFuncGetAttributes(&found, kernel) == cudaSuccess ? XCLIP_FAST_OK : failure();
}

int64_t xclip_fast_message_floats(int64_t rows, int64_t width) {
  return rows * width * 5;  // m, qkv and, of half the size, mixed: whole floats
}

int xclip_fast_message_kv(int dtype, int parameter_dtype, int blocks, const void* x, int64_t x_row,
                          const void* const* weights, const void* const* biases, const void* const* norms, float eps,
                          int64_t rows, int64_t frames, int64_t width, float* workspace, void* key_value, int device,
                          void* stream) {
  if (dtype != XCLIP_FAST_BF16 && dtype != XCLIP_FAST_FP16) {
    return XCLIP_FAST_BAD_DTYPE;
  }
  if (parameter_dtype != dtype && parameter_dtype != XCLIP_FAST_FP32) {
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
  if (int const code = xclip_fast_check_message(device)) {
    return code;
  }
  OnDevice const current(device);
  int const processors = attribute(device, cudaDevAttrMultiProcessorCount);
  int const room = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
  if (current.code() || processors < 1 || room < 1) {
    return current.code() ? current.code() : failure();
  }
  blocks = blocks ? blocks : choose_blocks(int(width), processors, room);
  if (blocks == 0 || blocks > processors) {
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
    return launch_message(given, blocks, room, static_cast<cudaStream_t>(stream));
  };
  bool const wide = parameter_dtype == XCLIP_FAST_FP32;
  if (dtype == XCLIP_FAST_BF16) {
    return wide ? run(__nv_bfloat16{}, float{}) : run(__nv_bfloat16{}, __nv_bfloat16{});
  }
  return wide ? run(__half{}, float{}) : run(__half{}, __half{});
}

}  // extern "C"

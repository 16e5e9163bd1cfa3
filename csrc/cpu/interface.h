// What kernels/cpu/library.py calls, once for each instruction set.

#pragma once

#include <cstdint>
#include <cstdlib>

#include "vector.h"

#define XCLIP_FAST_JOIN(a, b) a##b
#define XCLIP_FAST_NAME(function, set) XCLIP_FAST_JOIN(function, set)
// A function that the library exports; its name ends in the instruction set.
#define EXPORT(name) __attribute__((visibility("default"))) XCLIP_FAST_NAME(name##_, XCLIP_FAST_SET)

constexpr int32_t kAbi = 6;

extern "C" {

// Row m is at data + (m / length) * frame_stride + (m % length) * row_stride; null data: none.
struct Rows {
  Element* data;
  int64_t length, frame_stride, row_stride;
};

struct Product {
  int64_t rows, outputs, summed;         // M, N, K
  Rows x;                                // null: the panels hold x already
  const Element* last;                   // (frames, K): takes the place of the last row of each frame of x; or null
  int64_t last_stride;
  const Element *ln_weight, *ln_bias;    // (K,), or null: no LayerNorm
  float eps;
  int32_t dtype;                         // of W: kFloat32, kBfloat16, kFloat16
  Word* panels;                          // (M up to the next multiple of kVector, K / kPair, kKinds): x, rewritten
  const void* weight;                    // (N, K)
  const Element* bias;                   // (N,)
  int64_t threads;
  Word* y_panels;                        // quick_gelu of the result as such panels, or null:
  Rows y, residual;                      // the result as rows, with a residual or without
};

// Frames of pixels, to rows of patches in the order of a convolution's weight: channel, row, column.
struct Patches {
  const uint8_t* frames;                 // (count, height, width, 3)
  int64_t count, height, width, patch;   // height and width are multiples of patch
  const float* values;                   // (3, 256): of each level of a channel
  float* y;                              // (count * patches of a frame, 3 * patch^2)
  int64_t threads;
};

struct Parameters {
  const void* weight;
  const Element* bias;
};

struct Norm {
  const Element *weight, *bias;
};

// A residual block (equations 7 to 9), with quick_gelu.
struct Block {
  int64_t frames, length, heads, width, hidden;  // length: rows of a frame of x
  int64_t of_video;                              // frames whose messages attend to each other; 0: no messages
  int64_t part;                                  // frames that are computed at a time
  int64_t queries;                               // the first rows of a frame, which alone leave the block; 0: all
  // with messages, the last row of a frame of x is theirs: it is not read, and becomes 0 where all rows leave
  Rows x, y;
  float eps;
  int32_t dtype, threads, reserved;
  Parameters message_fc, message_in, message_out, in, out, fc, projection;
  Norm message_ln, ln_1, ln_2;
};
}

namespace {

// The words of a row in panels.
inline int64_t words_of(int64_t width) { return width / kPair * kKinds; }

struct Attention {
  int64_t frames, keys, queries, heads, channels;  // the first `queries` of the `keys` rows of a frame ask
  const Element* qkv;                              // (frames, keys, 3, heads, channels)
  Element* y;                                      // (frames, queries, heads, channels)
};

enum Dtype { kFloat32, kBfloat16, kFloat16 };

inline int64_t bytes_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

// N, K, and channels of a head are multiples of it.
constexpr int kUnit = kVector * kPair;

template <class Number>
inline Number least(Number a, Number b) {
  return a < b ? a : b;
}

inline int64_t parts(int64_t count, int64_t size) { return (count + size - 1) / size; }

// Memory of one thread, which serves its next call.
class Scratch {
 public:
  ~Scratch() { free(data_); }

  template <class Number>
  Number* take(int64_t numbers) {
    const int64_t bytes = parts(numbers * sizeof(Number), kPage) * kPage;
    if (bytes > size_) {
      free(data_);
      data_ = aligned_alloc(kPage, bytes);
      if (!data_) abort();
      size_ = bytes;
    }
    return static_cast<Number*>(data_);
  }

 private:
  static constexpr int64_t kPage = 4096;
  void* data_ = nullptr;
  int64_t size_ = 0;
};

}  // namespace

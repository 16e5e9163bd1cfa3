// The inner loops: a weight (N, K) times a panel, which holds rows of x side by side.

#pragma once

#include "vector.h"

namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

// What is fetched into the caches meanwhile: `lines` of each of the next weights, and the next panel.
struct Ahead {
  const char* weight = nullptr;
  int64_t stride = 0, step = 0, lines = 0;  // bytes from a weight to the next one, and from a line to the next one
  const char* panel = nullptr;
  int64_t panel_lines = 0;  // for each call of fetch()

  void fetch(int outputs) {
    for (int i = 0; i < outputs; ++i, weight += stride)
      for (int64_t j = 0; j < lines; ++j) _mm_prefetch(weight + j * step, _MM_HINT_T1);
    for (int64_t j = 0; j < panel_lines; ++j, panel += kLine) _mm_prefetch(panel, _MM_HINT_T0);
  }
};

#ifdef __AMX_BF16__

constexpr int kPanelVectors = 2;  // of rows in a full panel
constexpr int kOutputs = 32;      // of an inner loop: 4 tiles of sums
constexpr int kChunk = 192;       // outputs of a task
constexpr int kMostPanels = 13;   // of a task
constexpr int kDepth = kKinds == 1 ? 128 : 192;  // words of K; of one kind, a part of a panel is 16 KiB of L1

// Until it ends, this thread's tiles are 16 rows of 64 bytes.
class Tiles {
 public:
  Tiles() {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    } config;
    _tile_loadconfig(&config);
  }
  ~Tiles() { _tile_release(); }
};

constexpr int kStep = kBlock;  // words of K of a tile

// `outputs` x (16 Vectors) sums over `depth` words, written to `out` or added to it. `outputs` is a multiple of
// kOutputs, and depth one of kStep. side.step() is called between tiles, whose unit leaves the others idle.
template <int Vectors, class Side>
__attribute__((noinline)) void multiply(const Word* weight, int64_t stride, int outputs, const Word* panel, int depth,
                                        bool add, float* out, Ahead ahead, Side& side) {
  constexpr int64_t width = Vectors * kVector, row = width * sizeof(float);
  asm volatile("" ::: "memory");  // the compiler does not see that tiles are loaded from memory
  // sums of split numbers start anew in each part of K: a tile rounds them six times for each pair
  alignas(64) float part[kKinds == 1 ? 1 : kOutputs * width];
  for (int n = 0; n < outputs; n += kOutputs, weight += kOutputs * stride, out += kOutputs * width) {
    float* sums = kKinds > 1 && add ? part : out;
    if (kKinds == 1 && add) {
      _tile_loadd(0, out, row);
      _tile_loadd(2, out + 16 * width, row);
      if constexpr (Vectors == 2) {
        _tile_loadd(1, out + 16, row);
        _tile_loadd(3, out + 16 * width + 16, row);
      }
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    const Word *w = weight, *x = panel;
    for (int k = 0; k < depth; k += kStep, w += kKinds * kStep, x += kKinds * kStep * width) {
      ahead.fetch(kOutputs * kStep / depth);
      side.step();
#pragma GCC unroll 3
      for (int kind = 0; kind < kKinds; ++kind) {
        _tile_loadd(4, w + kind * kStep, stride * sizeof(Word));
        _tile_loadd(5, w + 16 * stride + kind * kStep, stride * sizeof(Word));
#pragma GCC unroll 3
        for (int other = 0; other < kKinds - kind; ++other) {
          _tile_loadd(6, x + other * kStep * width, row);
          _tile_dpbf16ps(0, 4, 6);
          _tile_dpbf16ps(2, 5, 6);
          if constexpr (Vectors == 2) {
            _tile_loadd(7, x + other * kStep * width + 16, row);
            _tile_dpbf16ps(1, 4, 7);
            _tile_dpbf16ps(3, 5, 7);
          }
        }
      }
    }
    _tile_stored(0, sums, row);
    _tile_stored(2, sums + 16 * width, row);
    if constexpr (Vectors == 2) {
      _tile_stored(1, sums + 16, row);
      _tile_stored(3, sums + 16 * width + 16, row);
    }
    if (sums == out) continue;
    for (int i = 0; i < kOutputs * width; i += kVector) store(out + i, load(out + i) + load(part + i));
  }
}

#else

struct Tiles {
  Tiles() {}
};

constexpr int kPanelVectors = 3;  // of rows in a full panel
#ifdef __AVX512F__
constexpr int kOutputs = 8;     // of an inner loop: 8 x 3 registers of sums
constexpr int kDepth = 128;     // words of K: a part of a panel is 24 KiB of L1
constexpr int kChunk = 192;     // outputs of a task
constexpr int kMostPanels = 9;  // of a task
#else
constexpr int kOutputs = 4;  // 4 x 3 registers of sums
constexpr int kDepth = 192;  // a part of a panel is 18 KiB of L1
constexpr int kChunk = 96;
constexpr int kMostPanels = 9;
#endif

inline Vector multiply_add(Vector a, Vector b, Vector c) {
#ifdef __AVX512BF16__
  return _mm512_dpbf16_ps(c, (__m512bh)a, (__m512bh)b);
#else
  return SIMD(fmadd_ps)(a, b, c);
#endif
}

constexpr int kStep = kDepth;  // one step for all of K

// `outputs` x (kVector Vectors) sums over `depth` words, written to `out` or added to it. `outputs` is a multiple of
// 8. side.step() is called between them.
template <int Vectors, class Side>
__attribute__((noinline)) void multiply(const Word* weight, int64_t stride, int outputs, const Word* panel, int depth,
                                        bool add, float* out, Ahead ahead, Side& side) {
  constexpr int Outputs = Vectors == 1 ? 8 : kOutputs;
  for (int n = 0; n < outputs; n += Outputs, weight += Outputs * stride) {
    ahead.fetch(Outputs);
    side.step();
    Vector sums[Outputs][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[i][v] = all(0.0f);
    const Word *w = weight, *row = panel;
#pragma GCC unroll 4
    for (int k = 0; k < depth; ++k, ++w, row += Vectors * kVector) {
      Vector x[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) x[v] = load(row + v * kVector);
#pragma GCC unroll 8
      for (int i = 0; i < Outputs; ++i) {
        const Vector factor = all(w[i * stride]);
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sums[i][v] = multiply_add(factor, x[v], sums[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v, out += kVector) store(out, add ? load(out) + sums[i][v] : sums[i][v]);
  }
}

#endif

constexpr int kPanel = kPanelVectors * kVector;  // rows of a full panel

inline int vectors_of_panel(int64_t rows, int64_t first) {
  const int64_t left = rows - first;
  return static_cast<int>(((left < kPanel ? left : kPanel) + kVector - 1) / kVector);
}

// Nothing to do beside a product.
struct Nothing {
  void step() {}
};

// multiply<vectors>.
template <class Side>
void multiply(int vectors, const Word* weight, int64_t stride, int outputs, const Word* panel, int depth, bool add,
              float* out, Ahead ahead, Side& side) {
  (vectors == 1   ? multiply<1, Side>
   : vectors == 2 ? multiply<2, Side>
                  : multiply<kPanelVectors, Side>)(weight, stride, outputs, panel, depth, add, out, ahead, side);
}

}  // namespace

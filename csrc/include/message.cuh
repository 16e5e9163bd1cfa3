// The message path of one block (equation 7 and the message's share of equation 8) as one cooperative kernel, for few
// rows:
//
//   m = x Wm + bm;  m = m + CFA(LN_m(m));  [k_m, v_m] = LN_1(m) [Wk, Wv] + b
//
// With few rows the time is that of streaming 7 D^2 weights once. None of them depends on x, and all of them fit into
// the shared memory of the whole GPU: so each block starts by copying its share of all four matrices, and the five
// steps that follow, a barrier of the grid between each two, find theirs already there.
//
// F rows, the frames of all videos; T frames of a video; D width; heads of 64 channels.
#pragma once

#ifndef XCLIP_FAST_EMULATED
#include "instructions.cuh"
#endif
#include "warp.cuh"

namespace xclip_fast {

inline constexpr int kMessageWarps = 8, kMessageThreads = kWarp * kMessageWarps;
inline constexpr int kHead = 64;        // channels
inline constexpr int kMostFrames = 64;  // of a video: two scores a lane
inline constexpr int kUnit = 8;         // columns of a product that a block takes at once, mma's n
inline constexpr int kTileRows = 16;    // mma's m
inline constexpr int kUnitsAtOnce = 4;  // units in registers
inline constexpr int kStep = 32;        // of K: a lane loads 16 bytes, 8 elements, for two multiplications

template <class T, class P>
struct MessageArguments {
  T const* x;  // (F, D), rows x_row apart
  int64_t x_row;
  T const* weights[4];  // Wm (D, D), CFA's QKV (3D, D) and output (D, D), [Wk, Wv] (2D, D)
  P const* biases[4];   // (D), (3D), (D), (2D)
  P const* norm_m[2];   // LN_m's weight and bias (D)
  P const* norm_1[2];   // LN_1's
  float eps;
  int rows, frames, width;
  float* m;      // (F, D)
  float* qkv;    // (F, 3D)
  T* mixed;      // (F, D)
  T* key_value;  // (F, 2D)
};

// What a block keeps in shared memory: its units of the four weights, one tile of rows, the warps' partial products.
// The units of all products are numbered through, and block b has b, b + blocks, ...: its slots, which are those of one
// product after those of the other. Rows are 64 bytes longer than D elements, which spreads the 16-byte loads of a warp
// over all banks.
struct MessageLayout {
  int width, blocks;

  __host__ __device__ int row() const { return width + 32; }  // elements
  // Units before those of a product; of the product past the last, all.
  __host__ __device__ int units_before(int product) const {
    constexpr int kSquares[] = {0, 1, 4, 5, 7};  // matrices (D, D) before it
    return kSquares[product] * (width / kUnit);
  }
  __host__ __device__ int first_slot(int product, int block) const {
    int const before = units_before(product) - block;
    return before > 0 ? (before + blocks - 1) / blocks : 0;
  }
  // Of its product, the first column of a block's slot.
  __host__ __device__ int column(int product, int block, int slot) const {
    return (block + slot * blocks - units_before(product)) * kUnit;
  }
  __host__ __device__ int slots() const { return (units_before(4) + blocks - 1) / blocks; }  // of the block with most
  __host__ __device__ int tile() const { return slots() * kUnit * row(); }                   // elements from the start
  __host__ __device__ int partials() const { return tile() + kTileRows * row(); }
  __host__ __device__ size_t bytes() const {
    return size_t(partials()) * 2 + sizeof(float) * kMessageWarps * kUnitsAtOnce * kTileRows * kUnit;
  }
};

template <class T>
struct alignas(16) Eight {
  uint32_t pairs[4];
};

template <class T, class P>
struct MessagePath {
  MessageArguments<T, P> const& given;
  MessageLayout const layout;
  T* const shared;
  int const block, warp, lane;

  __device__ MessagePath(MessageArguments<T, P> const& given, unsigned char* shared)
      : given(given),
        layout{given.width, int(gridDim.x)},
        shared(reinterpret_cast<T*>(shared)),
        block(blockIdx.x),
        warp(threadIdx.x / kWarp),
        lane(threadIdx.x % kWarp) {}

  __device__ T* tile() const { return shared + layout.tile(); }

  __device__ void copy_weights(int product) const {
    int const vectors = given.width / 8;  // of a row
    int const first = layout.first_slot(product, block);
    int const count = (layout.first_slot(product + 1, block) - first) * kUnit * vectors;
    for (int at = threadIdx.x; at < count; at += kMessageThreads) {
      int const row = at / vectors, slot = first + row / kUnit, k = at % vectors * 8;
      int64_t const column = layout.column(product, block, slot) + row % kUnit;
      copy_async(shared + (slot * kUnit + row % kUnit) * layout.row() + k,
                 given.weights[product] + column * given.width + k);
    }
    end_copies();
  }

  // One product of all rows with this block's columns. `load(first)` puts rows first, first + 1, ... into the tile,
  // `store(row, column, value)` takes each element of the result.
  template <int kProduct, class Load, class Store>
  __device__ void multiply_rows(Load&& load, Store&& store) const {
    int const first_slot = layout.first_slot(kProduct, block), slots = layout.first_slot(kProduct + 1, block);
    wait_for_copies<3 - kProduct>();
    if (first_slot == slots) {
      return;  // the whole block
    }
    auto* const partials = reinterpret_cast<float*>(shared + layout.partials());
    constexpr int kPartial = kUnitsAtOnce * kTileRows * kUnit;  // of a warp
    int const g = lane / 4, t = lane % 4;
    for (int first = 0; first < given.rows; first += kTileRows) {
      load(first);
      __syncthreads();
      for (int slot = first_slot; slot < slots; slot += kUnitsAtOnce) {
        int const now = min(kUnitsAtOnce, slots - slot);
        float sums[kUnitsAtOnce][4] = {};
        // the warps share K; the order of K within a step is the same for both operands, so it does not matter
        for (int k = warp * kStep + t * 8; k < given.width; k += kMessageWarps * kStep) {
          auto const low = *reinterpret_cast<Eight<T> const*>(tile() + g * layout.row() + k);
          auto const high = *reinterpret_cast<Eight<T> const*>(tile() + (g + 8) * layout.row() + k);
#pragma unroll
          for (int i = 0; i < kUnitsAtOnce; ++i) {
            if (i < now) {
              int const row = (slot + i) * kUnit + g;
              auto const w = *reinterpret_cast<Eight<T> const*>(shared + row * layout.row() + k);
              multiply<T>(sums[i], {low.pairs[0], high.pairs[0], low.pairs[1], high.pairs[1]},
                          {w.pairs[0], w.pairs[1]});
              multiply<T>(sums[i], {low.pairs[2], high.pairs[2], low.pairs[3], high.pairs[3]},
                          {w.pairs[2], w.pairs[3]});
            }
          }
        }
#pragma unroll
        for (int i = 0; i < kUnitsAtOnce; ++i) {
#pragma unroll
          for (int part = 0; part < 4; ++part) {
            int const row = g + part / 2 * 8, column = 2 * t + part % 2;
            partials[warp * kPartial + (i * kTileRows + row) * kUnit + column] = sums[i][part];
          }
        }
        __syncthreads();
        for (int at = threadIdx.x; at < now * kTileRows * kUnit; at += kMessageThreads) {
          int const row = first + at / kUnit % kTileRows;
          if (row < given.rows) {
            float sum = 0.0f;
#pragma unroll
            for (int other = 0; other < kMessageWarps; ++other) {
              sum += partials[other * kPartial + at];
            }
            int const column = layout.column(kProduct, block, slot + at / (kTileRows * kUnit)) + at % kUnit;
            store(row, column, sum + to_float(given.biases[kProduct][column]));
          }
        }
        __syncthreads();  // before partials or tile are written again
      }
    }
  }

  // Rows of x (F, D), rows x_row apart, as they are.
  __device__ void load_rows(T const* x, int64_t x_row, int first) const {
    int const vectors = given.width / 8, rows = min(kTileRows, given.rows - first);
    for (int at = threadIdx.x; at < rows * vectors; at += kMessageThreads) {
      int const row = at / vectors, column = at % vectors * 8;
      *reinterpret_cast<Eight<T>*>(tile() + row * layout.row() + column) =
          *reinterpret_cast<Eight<T> const*>(x + (first + row) * x_row + column);
    }
  }

  // LN(m), a warp a row.
  __device__ void load_normed(P const* const (&norm)[2], int first) const {
    for (int row = warp; row < min(kTileRows, given.rows - first); row += kMessageWarps) {
      float const* const m_D = given.m + int64_t(first + row) * given.width;
      Moments const found = row_moments(m_D, given.width);
      float const rstd = 1.0f / sqrtf(found.m2 / given.width + given.eps);
      for (int at = lane * 4; at < given.width; at += kWarp * 4) {
        auto const values = *reinterpret_cast<Vector<float, 4> const*>(m_D + at);
        Vector<T, 4> normed;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          normed.values[i] = rounded<T>((values.values[i] - found.mean) * rstd * to_float(norm[0][at + i]) +
                                        to_float(norm[1][at + i]));
        }
        *reinterpret_cast<Vector<T, 4>*>(tile() + row * layout.row() + at) = normed;
      }
    }
  }

  // softmax(q k^T / 8) v over the frames of a video: a warp a query, two channels a lane.
  __device__ void attend() const {
    int const heads = given.width / kHead;
    int64_t const step = 3 * int64_t(given.width);
    for (int task = warp * layout.blocks + block; task < given.rows * heads; task += kMessageWarps * layout.blocks) {
      int const row = task / heads, channel = task % heads * kHead + 2 * lane;
      float const* const query = given.qkv + row * step + channel;
      float const* const keys = given.qkv + row / given.frames * given.frames * step + given.width + channel;
      float const* const values = keys + given.width;
      float const q0 = query[0] * 0.125f, q1 = query[1] * 0.125f;
      float scores[kMostFrames / kWarp];
#pragma unroll
      for (int part = 0; part < kMostFrames / kWarp; ++part) {
        scores[part] = -INFINITY;
#pragma unroll 4
        for (int frame = part * kWarp; frame < min(given.frames, (part + 1) * kWarp); ++frame) {
          float const score = warp_sum(q0 * keys[frame * step] + q1 * keys[frame * step + 1]);
          if (lane == frame % kWarp) {
            scores[part] = score;
          }
        }
      }
      float const largest = warp_max(nan_max(scores[0], scores[1]));
      float weights[kMostFrames / kWarp], sum = 0.0f;
#pragma unroll
      for (int part = 0; part < kMostFrames / kWarp; ++part) {
        weights[part] = __expf(scores[part] - largest);
        sum += weights[part];
      }
      float const inverse = 1.0f / warp_sum(sum);
      float mixed[2] = {0.0f, 0.0f};
#pragma unroll
      for (int part = 0; part < kMostFrames / kWarp; ++part) {
#pragma unroll 4
        for (int frame = part * kWarp; frame < min(given.frames, (part + 1) * kWarp); ++frame) {
          float const weight = __shfl_sync(0xffffffffu, weights[part], frame % kWarp) * inverse;
          mixed[0] += weight * values[frame * step];
          mixed[1] += weight * values[frame * step + 1];
        }
      }
      T* const out = given.mixed + int64_t(row) * given.width + channel;
      out[0] = rounded<T>(mixed[0]);
      out[1] = rounded<T>(mixed[1]);
    }
  }

  __device__ void run() const {
    int64_t const width = given.width;
    for (int product = 0; product < 4; ++product) {
      copy_weights(product);
    }
    // m = x Wm + bm
    multiply_rows<0>([&](int first) { load_rows(given.x, given.x_row, first); },
                     [&](int row, int column, float value) { given.m[row * width + column] = value; });
    wait_for_grid();
    // q, k, v = LN_m(m) W + b
    multiply_rows<1>([&](int first) { load_normed(given.norm_m, first); },
                     [&](int row, int column, float value) { given.qkv[row * 3 * width + column] = value; });
    wait_for_grid();
    attend();
    wait_for_grid();
    // m = m + mixed W + b
    multiply_rows<2>([&](int first) { load_rows(given.mixed, width, first); },
                     [&](int row, int column, float value) { given.m[row * width + column] += value; });
    wait_for_grid();
    // [k_m, v_m] = LN_1(m) [Wk, Wv] + b
    multiply_rows<3>(
        [&](int first) { load_normed(given.norm_1, first); },
        [&](int row, int column, float value) { given.key_value[row * 2 * width + column] = rounded<T>(value); });
  }
};

}  // namespace xclip_fast

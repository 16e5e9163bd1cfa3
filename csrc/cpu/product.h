// Products y = act(LN(x) W^T + b) + residual of inference, for kernels/cpu.
//
// W is read where it lies: an element of it (or a pair of elements, or a tile) is multiplied with many rows of x at a
// time. So nothing of W is packed, and every change of a weight counts at once. x is rewritten into panels of kPanel
// rows, whose words lie as (K, kPanel), which takes one pass, and LayerNorm is part of that pass. The last panel has
// fewer vectors of rows where they are enough.
//
// A task multiplies some outputs with some panels, over one part of K after another. A panel's part stays in the L1
// cache while the outputs pass, and the outputs' part of W stays in L2 while the panels pass. What comes next is
// fetched into L2 meanwhile.
//
// M rows of x, N outputs, K summed.

#pragma once

#include "interface.h"
#include "multiply.h"

namespace {

constexpr int kChunk = 96;  // outputs of a task
constexpr int kTasks = 3;   // for each thread, where there are so many panels
constexpr int kMostPanels = kPanel == 32 ? 13 : 9;  // of a task

inline Element* row(const Rows& rows, int64_t m) {
  return rows.data + m / rows.length * rows.frame_stride + m % rows.length * rows.row_stride;
}

inline Word* words(Element* panels) { return reinterpret_cast<Word*>(panels); }

// Rewrites kVector rows of x, from row m on, to columns of a panel `width` wide; past the end the last row counts.
void pack(const Product& p, int64_t m, Word* panel, int width) {
  const Element* rows[kVector];
  Vector mean[kVector], scale[kVector];
  const int64_t depth = p.summed;
  for (int i = 0; i < kVector; ++i) {
    const int64_t at = least(m + i, p.rows - 1);
    const bool is_last = p.last.data && at % p.x.length == p.x.length - 1;
    rows[i] = is_last ? p.last.data + at / p.x.length * p.last.frame_stride : row(p.x, at);
    if (!p.ln_weight) continue;
    Vector total = all(0.0f), squares = all(0.0f);
    for (int64_t k = 0; k < depth; k += kVector) total += load(rows[i] + k);
    mean[i] = all(sum(total) / depth);
    for (int64_t k = 0; k < depth; k += kVector) {
      const Vector centered = load(rows[i] + k) - mean[i];
      squares = SIMD(fmadd_ps)(centered, centered, squares);
    }
    scale[i] = all(1 / __builtin_sqrtf(sum(squares) / depth + p.eps));
  }
  const auto normed = [&](int i, int64_t k) {
    return SIMD(fmadd_ps)((load(rows[i] + k) - mean[i]) * scale[i], load(p.ln_weight + k), load(p.ln_bias + k));
  };
  for (int64_t k = 0; k < depth; k += kUnit) {
    Vector v[kVector];
    for (int i = 0; i < kVector; ++i) {
      if (!p.ln_weight) v[i] = load(reinterpret_cast<const Word*>(rows[i] + k));
#ifdef __AVX512BF16__
      else v[i] = join(normed(i, k), normed(i, k + kVector));
#else
      else v[i] = normed(i, k);
#endif
    }
    transpose(v);
    for (int i = 0; i < kVector; ++i) store(panel + (k / kPack + i) * width, v[i]);
  }
}

// Writes outputs n0 to n1 of the panel of rows from m on, whose products are columns `width` wide, to y or y_panels.
void finish(const Product& p, int64_t m, int width, int64_t n0, int64_t n1, const float* sums) {
  if (p.y_panels) {
    Word* y = words(p.y_panels + m * p.outputs) + n0 / kPack * width;
    const auto result = [&](int64_t n, const float* at) {
      const Vector value = load(at) + all(wide(p.bias[n]));
      return p.quick_gelu ? quick_gelu(value) : value;
    };
    for (int64_t n = n0; n < n1; n += kPack, sums += kPack * width)
      for (int i = 0; i < width; i += kVector, y += kVector) {
#ifdef __AVX512BF16__
        store(y, pair(narrow(result(n, sums + i)), narrow(result(n + 1, sums + width + i))));
#else
        store(y, result(n, sums + i));
#endif
      }
    return;
  }
  for (const int64_t end = least(m + width, p.rows); m < end; m += kVector, sums += kVector) {
    const int count = static_cast<int>(least<int64_t>(kVector, end - m));
    Element* y[kVector];
    const Element* residual[kVector];
    for (int i = 0; i < count; ++i) {
      y[i] = row(p.y, m + i);
      residual[i] = p.residual.data ? row(p.residual, m + i) : nullptr;
    }
#ifdef __AVX512BF16__
    if (!p.residual.data) {  // rounded before rows and columns change places: half as much to move
      for (int64_t n = n0; n < n1; n += kUnit) {
        Vector v[kVector];
        const auto result = [&](int64_t i) { return narrow(load(sums + (n - n0 + i) * width) + all(wide(p.bias[n + i]))); };
        for (int i = 0; i < kVector; ++i) v[i] = pair(result(2 * i), result(2 * i + 1));
        transpose(v);
        for (int i = 0; i < count; ++i) store(reinterpret_cast<Word*>(y[i] + n), v[i]);
      }
      continue;
    }
#endif
    for (int64_t n = n0; n < n1; n += kVector) {
      const Vector bias = load(p.bias + n);
      Vector v[kVector];
      for (int i = 0; i < kVector; ++i) v[i] = load(sums + (n - n0 + i) * width);
      transpose(v);
      for (int i = 0; i < count; ++i) {
        v[i] += bias;
        if (p.residual.data) v[i] += load(residual[i] + n);
        store(y[i] + n, v[i]);
      }
    }
  }
}

#ifndef __AVX512BF16__
// Rewrites `depth` columns from k on, of the weights of outputs n0 to n1, to float32.
void widen(const Product& p, int64_t n0, int64_t n1, int64_t k, int depth, float* out) {
  for (int64_t n = n0; n < n1; ++n, out += depth) {
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + n * p.summed + k;
    for (int j = 0; j < depth; j += kVector)
      store(out + j, p.dtype == kFloat16 ? SIMD(cvtph_ps)(load_halves(weight + j))
                                         : load(reinterpret_cast<const Bfloat16*>(weight + j)));
  }
}
#endif

// Outputs n0 to n1 of the panels of rows m0 to m1. The products of a panel are (n1 - n0, its rows). From n2 on are
// probably the next outputs of this thread. `sums` has kChunk floats for each row, and then `widened` weights.
void task(const Product& p, int64_t n0, int64_t n1, int64_t n2, int64_t m0, int64_t m1, float* sums,
          [[maybe_unused]] float* widened) {
  const int64_t depth_of_all = p.summed / kPack, most_units = parts(parts(depth_of_all, parts(depth_of_all, kDepth)), 16);
  const int64_t most = most_units * 16;
  const int outputs = static_cast<int>(n1 - n0);
  const int64_t panels = parts(m1 - m0, kPanel), size = p.dtype == kFloat32 ? 4 : 2;
  const int64_t word = size * kPack;  // bytes of a weight's word
  const bool fetches = panels > 1;    // one panel takes its weights from memory as fast as it can
  for (int64_t k = 0; k < depth_of_all; k += most) {
    const int depth = static_cast<int>(least(most, depth_of_all - k));
    const bool is_last = k + depth == depth_of_all;
    const char* address = static_cast<const char*>(p.weight) + (n0 * depth_of_all + k) * word;
    const Word* weight = reinterpret_cast<const Word*>(address);
    int64_t stride = depth_of_all;
#ifndef __AVX512BF16__
    if (p.dtype != kFloat32) widen(p, n0, n1, k, depth, widened), weight = widened, stride = depth;
#endif
    Ahead ahead;
    ahead.stride = depth_of_all * word, ahead.step = panels * kLine;
    const char* next = is_last ? static_cast<const char*>(p.weight) + n2 * ahead.stride : address + depth * word;
    const int64_t lines = fetches && !(is_last && n2 + outputs > p.outputs) ? most * word / kLine : 0;
    for (int64_t m = m0, at = 0; m < m1; m += kPanel, ++at) {
      const int vectors = vectors_of_panel(p.rows, m), width = vectors * kVector;
      float* out = sums + (m - m0) * kChunk;
      ahead.weight = next + at * kLine;
      ahead.lines = (lines - at + panels - 1) / panels;
      ahead.panel_lines = fetches ? 10 : 0;
      const bool wraps = m + kPanel >= m1;
      const int64_t m_next = wraps ? m0 : m + kPanel, k_next = !wraps ? k : is_last ? 0 : k + depth;
      ahead.panel = reinterpret_cast<const char*>(words(p.panels + m_next * p.summed) +
                                                  k_next * vectors_of_panel(p.rows, m_next) * kVector);
      multiply(vectors, weight, stride, outputs, words(p.panels + m * p.summed) + k * width, depth, k > 0, out, ahead);
      if (is_last) finish(p, m, width, n0, n1, out);
    }
  }
}

// The whole product, by all threads of a team together.
void multiply_rows(const Product& p) {
  const int64_t panels = parts(p.rows, kPanel), chunks = parts(p.outputs, kChunk);
  const int64_t wanted = panels * chunks / (kTasks * p.threads);
  const int64_t most = wanted < 1 ? 1 : least<int64_t>(wanted, kMostPanels);
  const int64_t blocks = parts(panels, most);
  const int64_t rows_of_task = parts(panels, blocks) * kPanel;
  if (p.x.data) {
#pragma omp for schedule(dynamic)
    for (int64_t m = 0; m < p.rows; m += kVector) {
      const int64_t first = m / kPanel * kPanel;
      pack(p, m, words(p.panels + first * p.summed) + m - first, vectors_of_panel(p.rows, first) * kVector);
    }
  }
  static thread_local Scratch scratch;
  float* sums = scratch.take(kChunk * (kPanel * kMostPanels + kDepth));
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < chunks * blocks; ++i) {
    const int64_t n = i / blocks * kChunk, m = i % blocks * rows_of_task;
    task(p, n, least(n + kChunk, p.outputs), (i + p.threads) / blocks * kChunk, m, least(m + rows_of_task, p.rows),
         sums, sums + kChunk * kPanel * kMostPanels);
  }
}

}  // namespace

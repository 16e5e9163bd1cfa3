// Products y = LN(x) W^T + b + residual, or quick_gelu(LN(x) W^T + b).
//
// W is read where it lies: an element of it (or a pair of elements, or a tile) is multiplied with many rows of x at a
// time. So no packed W is kept, and every change of a weight counts at once. x is rewritten into panels of kPanel rows,
// whose words lie as (K, kPanel), which takes one pass, and LayerNorm is part of that pass. The last panel has fewer
// vectors of rows where they are enough. Split numbers have kBlock words of each kind in turn.
//
// A task multiplies some outputs with some panels, over one part of K after another. A panel's part stays in the L1
// cache while the outputs pass, and the outputs' part of W stays in L2 while the panels pass. What comes next is
// fetched meanwhile, and the results of the panel before are written.
//
// M rows of x, N outputs, K summed.

#pragma once

#include "interface.h"
#include "multiply.h"

namespace {

constexpr int kTasks = 3;  // for each thread, where there are so many panels

inline Element* row(const Rows& rows, int64_t m) {
  return rows.data + m / rows.length * rows.frame_stride + m % rows.length * rows.row_stride;
}

// Rewrites kVector rows of x, from row m on, to columns of a panel `width` wide; past the end the last row counts.
void pack(const Product& p, int64_t m, Word* panel, int width) {
  const Element* rows[kVector];
  Vector mean[kVector], scale[kVector];
  const int64_t depth = p.summed;
  for (int i = 0; i < kVector; ++i) {
    const int64_t at = least(m + i, p.rows - 1);
    const bool is_last = p.last && at % p.x.length == p.x.length - 1;
    rows[i] = is_last ? p.last + at / p.x.length * p.last_stride : row(p.x, at);
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
  for (int64_t k = 0; k < depth; k += kUnit, panel += kVector * kKinds * width) {
    Vector v[kKinds][kVector];
    for (int i = 0; i < kVector; ++i) {
      const auto number = [&](int64_t at) { return p.ln_weight ? normed(i, at) : load(rows[i] + at); };
#ifdef __AVX512BF16__
      Vector first = number(k), second = number(k + kVector);
      for (int kind = 0; kind < kKinds; ++kind) {
        const Halves half = split(first);
        v[kind][i] = join(half, split(second));
      }
#else
      v[0][i] = number(k);
#endif
    }
    for (int kind = 0; kind < kKinds; ++kind) {
      transpose(v[kind]);
      for (int i = 0; i < kVector; ++i) store(panel + (kind * kVector + i) * width, v[kind][i]);
    }
  }
}

// Writes outputs n0 to n1 of the panel of rows from m on, whose products are columns `width` wide, to y or y_panels: a
// block of it at a time, so that it goes on between the tiles of the next panel.
class Finish {
 public:
  Finish() = default;

  // `steps`: calls of step() after which all is done.
  Finish(const Product& p, int64_t m, int width, int64_t n0, int64_t n1, const float* sums, int steps)
      : p_(&p), sums_(sums), m_(m), n0_(n0), width_(width), vectors_(width / kVector) {
    across_ = p.y_panels ? kPair : p.residual.data ? kVector : kVector * kPack;  // outputs of a block
    blocks_ = static_cast<int>((n1 - n0) / across_) * vectors_;
    each_ = (blocks_ + steps - 1) / steps;
  }

  void step() {
    for (int i = 0; i < each_ && next_ < blocks_; ++i) block(next_++);
  }

  void rest() {
    while (next_ < blocks_) block(next_++);
  }

 private:
  void block(int i) {
    if (p_->y_panels) return panels(i / vectors_ * across_, i % vectors_ * kVector);
    const int blocks_of_row = blocks_ / vectors_, vector = i / blocks_of_row;
    if (i % blocks_of_row == 0) {  // addresses are found once for all blocks of a row
      const int64_t m = m_ + vector * kVector;
      count_ = static_cast<int>(least<int64_t>(kVector, p_->rows - m));
      for (int j = 0; j < count_; ++j) {
        y_[j] = row(p_->y, m + j) + n0_;
        residual_[j] = p_->residual.data ? row(p_->residual, m + j) + n0_ : nullptr;
      }
    }
    rows(i % blocks_of_row * across_, sums_ + vector * kVector);
  }

  Vector result(int64_t n, const float* sums) const { return load(sums + n * width_) + all(wide(p_->bias[n0_ + n])); }

  void panels(int64_t n, int column) const {
    const int64_t word = (n0_ + n) / kPair;
    Word* y = p_->y_panels + m_ * words_of(p_->outputs) +
              (word / kBlock * kKinds * kBlock + word % kBlock) * width_ + column;
    const auto hidden = [&](int64_t i) { return quick_gelu(result(n + i, sums_ + column)); };
#ifdef __AVX512BF16__
    Vector first = hidden(0), second = hidden(1);
    for (int kind = 0; kind < kKinds; ++kind, y += kBlock * width_) {
      const Halves half = split(first);
      store(y, pair(half, split(second)));
    }
#else
    store(y, hidden(0));
#endif
  }

  void rows(int64_t n, const float* sums) const {
    Vector v[kVector];
#if defined(__AVX512BF16__) && !defined(XCLIP_FAST_SPLIT)
    if (!p_->residual.data) {  // rounded before rows and columns change places: half as much to move
      for (int i = 0; i < kVector; ++i)
        v[i] = pair(narrow(result(n + 2 * i, sums)), narrow(result(n + 2 * i + 1, sums)));
      transpose(v);
      for (int i = 0; i < count_; ++i) store(reinterpret_cast<Word*>(y_[i] + n), v[i]);
      return;
    }
#endif
    for (int i = 0; i < kVector; ++i) v[i] = load(sums + (n + i) * width_);
    transpose(v);
    const Vector bias = load(p_->bias + n0_ + n);
    for (int i = 0; i < count_; ++i) {
      v[i] += bias;
      if (p_->residual.data) v[i] += load(residual_[i] + n);
      store(y_[i] + n, v[i]);
    }
  }

  const Product* p_ = nullptr;
  const float* sums_ = nullptr;
  int64_t m_ = 0, n0_ = 0;
  int width_ = 0, vectors_ = 1, across_ = 1, blocks_ = 0, each_ = 0, next_ = 0, count_ = 0;
  Element* y_[kVector];
  const Element* residual_[kVector];
};

// Whether weights are rewritten to words of this set.
inline bool rewrites(const Product& p) {
  return kKinds > 1 || (kPair == 1 && p.dtype != kFloat32);
}

// Rewrites `depth` words from word k on, of the weights of outputs n0 to n1, to float32, or to words of all kinds.
void rewrite(const Product& p, int64_t n0, int64_t n1, int64_t k, int depth, Word* out) {
  const int64_t size = bytes_of(p.dtype);
  for (int64_t n = n0; n < n1; ++n) {
    const int64_t at = n * p.summed + k * kPair;
    const auto number = [&](int64_t i) {
      const char* weight = static_cast<const char*>(p.weight);
      if (p.dtype == kFloat32) return load(reinterpret_cast<const float*>(weight) + at + i);
      weight += size * (at + i);
      if (p.dtype == kFloat16) return SIMD(cvtph_ps)(load_halves(weight));
      return load(reinterpret_cast<const Bfloat16*>(weight));
    };
    for (int64_t i = 0; i < depth * kPair; i += kUnit, out += kVector * kKinds) {
#ifdef XCLIP_FAST_SPLIT
      const char* later = static_cast<const char*>(p.weight) + size * (at + 4 * p.summed + i);  // four outputs on
      for (int64_t byte = 0; byte < size * kUnit; byte += kLine) _mm_prefetch(later + byte, _MM_HINT_T0);
      Vector first = number(i), second = number(i + kVector);
      for (int kind = 0; kind < kKinds; ++kind) {
        const Halves half = split(first);
        store(out + kind * kBlock, join(half, split(second)));
      }
#else
      store(out, number(i));
#endif
    }
  }
}

// Outputs n0 to n1 of the panels of rows m0 to m1. The products of a panel are (n1 - n0, its rows). From n2 on are
// probably the next outputs of this thread. `sums` has kChunk floats for each row, and `rewritten` has room for a
// part of the weights.
void task(const Product& p, int64_t n0, int64_t n1, int64_t n2, int64_t m0, int64_t m1, float* sums, Word* rewritten) {
  const int64_t whole = p.summed / kPair, most = parts(parts(whole, parts(whole, kDepth)), kBlock) * kBlock;
  const int64_t of_panel = words_of(p.summed);
  const int64_t panels = parts(m1 - m0, kPanel);
  const int outputs = static_cast<int>(n1 - n0);
  const int64_t word = bytes_of(p.dtype) * kPair, stride = whole * word;  // bytes
  const char* weights = static_cast<const char*>(p.weight);
  Finish finish;
  for (int64_t k = 0; k < whole; k += most) {
    const int depth = static_cast<int>(least(most, whole - k));
    const bool is_last = k + depth == whole;
    const char* address = weights + n0 * stride + k * word;
    const Word* weight = reinterpret_cast<const Word*>(address);
    int64_t row = whole;  // words from a weight to the next one
    if (rewrites(p)) {
      rewrite(p, n0, n1, k, depth, rewritten);
      weight = rewritten, row = depth * kKinds;
    }
    const int64_t k_after = is_last ? 0 : k + depth;
    const char* next = weights + (is_last ? n2 : n0) * stride + k_after * word;
    const int64_t lines = kKinds > 1 || (is_last && n2 + outputs > p.outputs) ? 0 : most * word / kLine;
    for (int64_t m = m0, i = 0; m < m1; m += kPanel, ++i) {
      const int vectors = vectors_of_panel(p.rows, m), width = vectors * kVector;
      const bool wraps = m + kPanel >= m1;
      const int64_t m_next = wraps ? m0 : m + kPanel, k_next = wraps ? k_after : k;
      const Word* panel = p.panels + m_next * of_panel + k_next * kKinds * vectors_of_panel(p.rows, m_next) * kVector;
      const int64_t steps = outputs / kOutputs * parts(depth, kStep);  // of a call of multiply()
      Ahead ahead{next + i * kLine, stride, panels * kLine, (lines - i + panels - 1) / panels};
      ahead.panel = reinterpret_cast<const char*>(panel);
      ahead.panel_lines = panels > 1 ? depth * kKinds * width * 4 / kLine / steps : 0;
      const Word* x = p.panels + m * of_panel + k * kKinds * width;
      float* out = sums + (m - m0) * kChunk;
      multiply(vectors, weight, row, outputs, x, depth, k > 0, out, ahead, finish);
      if (!is_last) continue;
      finish.rest();
      finish = Finish(p, m, width, n0, n1, out, static_cast<int>(steps));
    }
  }
  finish.rest();
}

// The whole product, by all threads of a team together.
void multiply_rows(const Product& p) {
  if (p.rows == 0) return;  // of frames that have a spare row alone
  const int64_t panels = parts(p.rows, kPanel), chunks = parts(p.outputs, kChunk);
  const int64_t wanted = panels * chunks / (kTasks * p.threads);
  const int64_t most = wanted < 1 ? 1 : least<int64_t>(wanted, kMostPanels);
  const int64_t blocks = parts(panels, most);
  const int64_t rows_of_task = parts(panels, blocks) * kPanel;
  if (p.x.data) {
#pragma omp for schedule(dynamic)
    for (int64_t m = 0; m < p.rows; m += kVector) {
      const int64_t first = m / kPanel * kPanel;
      Word* panel = p.panels + first * words_of(p.summed);
      pack(p, m, panel + m - first, vectors_of_panel(p.rows, first) * kVector);
    }
  }
  static thread_local Scratch scratch;
  const Tiles tiles;
  float* sums = scratch.take<float>(kChunk * (kPanel * kMostPanels + kKinds * kDepth));
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < chunks * blocks; ++i) {
    const int64_t n = i / blocks * kChunk, m = i % blocks * rows_of_task;
    task(p, n, least(n + kChunk, p.outputs), (i + p.threads) / blocks * kChunk, m, least(m + rows_of_task, p.rows),
         sums, sums + kChunk * kPanel * kMostPanels);
  }
}

}  // namespace

// Attention of inference, softmax(q k^T / sqrt(C)) v, for kernels/cpu: keys, and values that are transposed, take the
// place of the weight of a product, and the queries that of x.

#pragma once

#include "interface.h"
#include "multiply.h"

namespace {

// Rewrites kVector rows of `depth` elements, of which `count` exist, to columns of a panel `width` wide.
void pack_rows(const Element* rows, int64_t stride, int64_t count, int64_t depth, Word* out, int64_t width) {
  for (int64_t k = 0; k < depth; k += kUnit) {
    Vector v[kVector];
    for (int64_t i = 0; i < kVector; ++i)
      v[i] = load(reinterpret_cast<const Word*>(rows + least(i, count - 1) * stride + k));
    transpose(v);
    for (int i = 0; i < kVector; ++i) store(out + (k / kPair + i) * width, v[i]);
  }
}

// Rewrites kUnit rows of `depth` elements, of which `count` exist and the others are 0, to (depth, kVector words):
// columns of a matrix `width` words wide.
void transpose_rows(const Element* rows, int64_t stride, int64_t count, int64_t depth, Word* out, int64_t width) {
  for (int64_t c = 0; c < depth; c += kVector) {
    Vector v[kVector];
    for (int i = 0; i < kVector; ++i) {
      const Element* at = rows + i * kPair * stride + c;
#ifdef __AVX512BF16__
      const Halves none = _mm256_setzero_si256();
      v[i] = pair(2 * i < count ? load_halves(at) : none, 2 * i + 1 < count ? load_halves(at + stride) : none);
#else
      v[i] = i < count ? load(at) : all(0.0f);
#endif
    }
    transpose(v);
    for (int i = 0; i < kVector; ++i) store(out + (c + i) * width, v[i]);
  }
}

// One head of a frame. Its memory, in floats: values (channels, padded words of keys), the last keys (kUnit, channels),
// scores (padded keys, kPanel), queries and the result (channels, kPanel).
struct Head {
  const Attention& a;
  const Element *query, *key;  // (keys, channels), `stride` apart
  Element* y;                  // (queries, channels)
  int64_t stride, padded;      // of keys: the next multiple of kUnit
  Word *values, *last_keys;
  float *scores, *mixed;
  Word* panel;
  float scale = 1 / __builtin_sqrtf(static_cast<float>(a.channels));

  // The kVector `vectors` queries from `first` on: scores, softmax and values with the queries side by side.
  void answer(int64_t first, int vectors) {
    const int64_t width = vectors * kVector, whole = a.keys / kUnit * kUnit;
    const int channels = static_cast<int>(a.channels), depth = channels / kPair;
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = first + v * kVector;
      pack_rows(query + at * stride, stride, a.queries - at, channels, panel + v * kVector, width);
    }
    const Word* weight = reinterpret_cast<const Word*>(key);
    Nothing nothing;
    multiply(vectors, weight, stride / kPair, static_cast<int>(whole), panel, depth, false, scores, {}, nothing);
    if (whole < a.keys)
      multiply(vectors, last_keys, depth, kUnit, panel, depth, false, scores + whole * width, {}, nothing);
    for (int v = 0; v < vectors; ++v) softmax(scores + v * kVector, width, v * kVector);
    const int words = static_cast<int>(padded / kPair);
    for (int k = 0; k < words; k += kDepth)
      multiply(vectors, values + k, words, channels, scores + k * width, least<int>(kDepth, words - k), k > 0, mixed, {},
               nothing);
    for (int v = 0; v < vectors; ++v) {
      const int64_t at = first + v * kVector;
      const Vector inverse = load(panel + v * kVector);
      for (int64_t c = 0; c < channels; c += kVector) {
        Vector rows[kVector];
        for (int i = 0; i < kVector; ++i) rows[i] = load(mixed + (c + i) * width + v * kVector) * inverse;
        transpose(rows);
        for (int64_t i = 0; i < least<int64_t>(kVector, a.queries - at); ++i)
          store(y + (at + i) * a.heads * channels + c, rows[i]);
      }
    }
  }

  // Rewrites a column of scores to words of e^(scale (score - largest)), and 0 past the keys. The queries' place takes
  // the inverse of the sum.
  void softmax(float* column, int64_t width, int64_t at) {
    Vector most = load(column), total = all(0.0f), part = all(0.0f);
    for (int64_t k = 1; k < a.keys; ++k) most = SIMD(max_ps)(most, load(column + k * width));
    const auto weight = [&](int64_t k) {
      if (k >= a.keys) return all(0.0f);
      const Vector e = exponential((load(column + k * width) - most) * all(scale));
      part += e;
      return e;
    };
    for (int64_t k = 0; k < padded; k += kPair) {
      if (k % 64 == 0) total += part, part = all(0.0f);
      const Vector e = weight(k);
#ifdef __AVX512BF16__
      store(column + k / 2 * width, pair(narrow(e), narrow(weight(k + 1))));
#else
      store(column + k * width, e);
#endif
    }
    store(panel + at, all(1.0f) / (total + part));
  }
};

// Attention of all frames and heads, by all threads of a team together.
void attend(const Attention& a) {
  const int64_t width = a.heads * a.channels, stride = 3 * width, padded = parts(a.keys, kUnit) * kUnit;
  const int64_t whole = a.keys / kUnit * kUnit;
  static thread_local Scratch scratch;
  const Tiles tiles;
  float* values = scratch.take<float>(a.channels * (padded + kUnit + 2 * kPanel) + padded * kPanel);
  float* last_keys = values + a.channels * padded;
  float* scores = last_keys + a.channels * kUnit;
  float* panel = scores + padded * kPanel;
#pragma omp for schedule(dynamic)
  for (int64_t i = 0; i < a.frames * a.heads; ++i) {
    const int64_t frame = i / a.heads, at = i % a.heads * a.channels;
    const Element* query = a.qkv + frame * a.keys * stride + at;
    Head head{a,         query,  query + width, a.y + frame * a.queries * width + at, stride, padded, values,
              last_keys, scores, panel + a.channels * kPanel, panel};
    const Element* value = head.key + width;
    for (int64_t k = 0; k < a.keys; k += kUnit)
      transpose_rows(value + k * stride, stride, a.keys - k, a.channels, values + k / kPair, padded / kPair);
    for (int64_t k = whole; k < padded && whole < a.keys; ++k)
      for (int64_t c = 0; c < a.channels; c += kUnit) {
        const Word* key = reinterpret_cast<const Word*>(head.key + k * stride + c);
        store(last_keys + ((k - whole) * a.channels + c) / kPair, k < a.keys ? load(key) : all(0.0f));
      }
    for (int64_t first = 0; first < a.queries; first += kPanel) head.answer(first, vectors_of_panel(a.queries, first));
  }
}

}  // namespace

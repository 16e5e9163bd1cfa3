// Inference on a CPU with AVX2, for kernels/cpu: products y = act(LN(x) W^T + b) + residual, and attention.
//
// W is read where it lies: each of its elements is broadcast and multiplied with 24 rows of x at a time. So nothing of
// W is packed, and every change of a weight counts at once. x is rewritten into panels of 24 rows, (K, 24) each, which
// takes one pass, and LayerNorm is part of that pass. The last panel has 8 or 16 rows where that is enough. Attention
// does the same with keys, and with values that it transposes, in place of W.
//
// A task multiplies some outputs with some panels, over one part of K after another. A panel's part stays in the L1
// cache while the outputs pass, and the outputs' part of W stays in L2 while the panels pass. What comes next is
// fetched into L2 meanwhile.
//
// M rows of x, N outputs, K summed.

#include <immintrin.h>
#include <omp.h>

#include <algorithm>
#include <cstdint>

namespace {

constexpr int kVector = 8;           // floats of a register
constexpr int kPanel = 3 * kVector;  // rows of a full panel: 4 outputs x 24 rows are 12 registers of sums
constexpr int kUnit = 8;             // N and K are multiples of it
constexpr int kChunk = 96;           // outputs of a task
constexpr int kMostPanels = 9;       // of a task
constexpr int kDepth = 192;          // of K: a part of a panel is 18 KiB of L1
constexpr int64_t kLine = 64;        // bytes of a cache line
constexpr int kTasks = 3;            // for each thread, where there are so many panels

enum Dtype { kFloat32, kBfloat16, kFloat16 };

}  // namespace

extern "C" {

// Rows of float32: row m is at data + (m / length) * frame_stride + (m % length) * row_stride; null data: none.
struct Rows {
  float* data;
  int64_t length, frame_stride, row_stride;
};

struct Product {
  int64_t rows, outputs, summed;       // M, N, K
  Rows x;                              // null: the panels hold x already
  Rows last;                           // (frames, K): takes the place of the last row of each frame of x; or null
  const float *ln_weight, *ln_bias;    // (K,), or null: no LayerNorm
  float eps;
  int32_t dtype;                       // of W
  float* panels;                       // (M up to the next multiple of 8, K): x, rewritten
  const void* weight;                  // (N, K)
  const float* bias;                   // (N,)
  int32_t quick_gelu, threads;
  float* y_panels;                     // (M up to the next multiple of 8, N): the result as panels, or null:
  Rows y, residual;                    // the result as rows, with a residual or without
};

struct Attention {
  int64_t frames, keys, queries, heads, channels;  // the first `queries` of the `keys` rows of a frame ask
  const float* qkv;                                // (frames, keys, 3, heads, channels)
  float* y;                                        // (frames, queries, heads, channels)
  float* scratch;  // for each thread (channels + 24) (keys up to the next multiple of 8) + 48 channels
  float scale;
  int32_t threads;
};
}

namespace {

float* row(const Rows& rows, int64_t m) {
  return rows.data + m / rows.length * rows.frame_stride + m % rows.length * rows.row_stride;
}

int vectors_of_panel(int64_t rows, int64_t first) {
  return static_cast<int>((std::min<int64_t>(rows - first, kPanel) + kVector - 1) / kVector);
}

float sum(__m256 v) {
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
}

void transpose(__m256 v[8]) {
  __m256 t[8];
  for (int i = 0; i < 8; i += 4) {
    const __m256 low_01 = _mm256_unpacklo_ps(v[i], v[i + 1]), high_01 = _mm256_unpackhi_ps(v[i], v[i + 1]);
    const __m256 low_23 = _mm256_unpacklo_ps(v[i + 2], v[i + 3]), high_23 = _mm256_unpackhi_ps(v[i + 2], v[i + 3]);
    t[i] = _mm256_shuffle_ps(low_01, low_23, 0x44);
    t[i + 1] = _mm256_shuffle_ps(low_01, low_23, 0xEE);
    t[i + 2] = _mm256_shuffle_ps(high_01, high_23, 0x44);
    t[i + 3] = _mm256_shuffle_ps(high_01, high_23, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
  }
}

// Rewrites 8 rows of x, from row m on, to columns of a panel `width` wide; past the end the last row counts.
void pack(const Product& p, int64_t m, float* panel, int width) {
  const float* rows[kVector];
  __m256 mean[kVector], scale[kVector];
  const int64_t depth = p.summed;
  for (int i = 0; i < kVector; ++i) {
    const int64_t at = std::min(m + i, p.rows - 1);
    const bool is_last = p.last.data && at % p.x.length == p.x.length - 1;
    rows[i] = is_last ? p.last.data + at / p.x.length * p.last.frame_stride : row(p.x, at);
    mean[i] = scale[i] = _mm256_setzero_ps();
  }
  if (p.ln_weight) {
    for (int64_t k = 0; k < depth; k += kVector)
      for (int i = 0; i < kVector; ++i) mean[i] = _mm256_add_ps(mean[i], _mm256_loadu_ps(rows[i] + k));
    for (int i = 0; i < kVector; ++i) mean[i] = _mm256_set1_ps(sum(mean[i]) / depth);
    for (int64_t k = 0; k < depth; k += kVector)
      for (int i = 0; i < kVector; ++i) {
        const __m256 centered = _mm256_sub_ps(_mm256_loadu_ps(rows[i] + k), mean[i]);
        scale[i] = _mm256_fmadd_ps(centered, centered, scale[i]);
      }
    for (int i = 0; i < kVector; ++i) scale[i] = _mm256_set1_ps(1 / __builtin_sqrtf(sum(scale[i]) / depth + p.eps));
  }
  for (int64_t k = 0; k < depth; k += kVector) {
    __m256 v[kVector];
    for (int i = 0; i < kVector; ++i) v[i] = _mm256_loadu_ps(rows[i] + k);
    if (p.ln_weight) {
      const __m256 weight = _mm256_loadu_ps(p.ln_weight + k), bias = _mm256_loadu_ps(p.ln_bias + k);
      for (int i = 0; i < kVector; ++i)
        v[i] = _mm256_fmadd_ps(_mm256_mul_ps(_mm256_sub_ps(v[i], mean[i]), scale[i]), weight, bias);
    }
    transpose(v);
    for (int i = 0; i < kVector; ++i) _mm256_store_ps(panel + (k + i) * width, v[i]);
  }
}

// Lines that are fetched into L2: `lines` of each weight, and `panel_lines` for each few outputs.
struct Ahead {
  const char* weight = nullptr;
  int64_t stride = 0, step = 0, lines = 0;  // bytes from a weight to the next one, and from a line to the next one
  const char* panel = nullptr;
  int64_t panel_lines = 0;
};

// `outputs` x (8 Vectors) sums over `depth`, written to `out` or added to it. `outputs` is a multiple of Outputs.
template <int Outputs, int Vectors>
__attribute__((noinline)) void multiply(const float* weight, int64_t stride, int outputs, const float* panel, int depth,
                                        bool add, float* out, Ahead ahead) {
  for (int n = 0; n < outputs; n += Outputs, weight += Outputs * stride) {
    for (int i = 0; i < Outputs; ++i, ahead.weight += ahead.stride)
      for (int64_t j = 0; j < ahead.lines; ++j) _mm_prefetch(ahead.weight + j * ahead.step, _MM_HINT_T1);
    for (int64_t j = 0; j < ahead.panel_lines; ++j, ahead.panel += kLine) _mm_prefetch(ahead.panel, _MM_HINT_T1);
    __m256 sums[Outputs][Vectors];
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm256_setzero_ps();
    const float *w = weight, *row = panel;
#pragma GCC unroll 4
    for (int k = 0; k < depth; ++k, ++w, row += Vectors * kVector) {
      __m256 x[Vectors];
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v) x[v] = _mm256_load_ps(row + v * kVector);
#pragma GCC unroll 8
      for (int i = 0; i < Outputs; ++i) {
        const __m256 factor = _mm256_broadcast_ss(w + i * stride);
#pragma GCC unroll 3
        for (int v = 0; v < Vectors; ++v) sums[i][v] = _mm256_fmadd_ps(factor, x[v], sums[i][v]);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < Outputs; ++i)
#pragma GCC unroll 3
      for (int v = 0; v < Vectors; ++v, out += kVector)
        _mm256_store_ps(out, add ? _mm256_add_ps(_mm256_load_ps(out), sums[i][v]) : sums[i][v]);
  }
}

// e^x within 3 units in the last place; x in [-87, 88] after clamping.
__m256 exponential(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), _mm256_min_ps(_mm256_set1_ps(88.0f), x));
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)), _MM_FROUND_TO_NEAREST_INT);
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693145752f), x);       // ln 2, its leading bits
  x = _mm256_fnmadd_ps(n, _mm256_set1_ps(1.42860677e-6f), x);     // and the rest
  __m256 y = _mm256_set1_ps(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm256_fmadd_ps(y, x, _mm256_set1_ps(factor));
  const __m256i exponent = _mm256_slli_epi32(_mm256_cvtps_epi32(n), 23);
  return _mm256_castsi256_ps(_mm256_add_epi32(_mm256_castps_si256(y), exponent));
}

__m256 quick_gelu(__m256 u) {
  const __m256 e = exponential(_mm256_mul_ps(u, _mm256_set1_ps(-1.702f)));
  return _mm256_div_ps(u, _mm256_add_ps(_mm256_set1_ps(1.0f), e));
}

// Writes outputs n0 to n1 of the panel of rows from m on, whose products are columns `width` wide, to y or y_panels.
void finish(const Product& p, int64_t m, int width, int64_t n0, int64_t n1, const float* sums) {
  if (p.y_panels) {
    float* y = p.y_panels + m * p.outputs + n0 * width;
    for (int64_t n = n0; n < n1; ++n)
      for (int i = 0; i < width; i += kVector, sums += kVector, y += kVector) {
        const __m256 value = _mm256_add_ps(_mm256_load_ps(sums), _mm256_broadcast_ss(p.bias + n));
        _mm256_store_ps(y, p.quick_gelu ? quick_gelu(value) : value);
      }
    return;
  }
  for (const int64_t end = std::min(m + width, p.rows); m < end; m += kVector, sums += kVector) {
    const int count = static_cast<int>(std::min<int64_t>(kVector, end - m));
    float* y[kVector];
    const float* residual[kVector];
    for (int i = 0; i < count; ++i) {
      y[i] = row(p.y, m + i);
      residual[i] = p.residual.data ? row(p.residual, m + i) : nullptr;
    }
    for (int64_t n = n0; n < n1; n += kVector) {
      const __m256 bias = _mm256_loadu_ps(p.bias + n);
      __m256 v[kVector];
      for (int i = 0; i < kVector; ++i) v[i] = _mm256_load_ps(sums + (n - n0 + i) * width);
      transpose(v);
      for (int i = 0; i < count; ++i) {
        v[i] = _mm256_add_ps(v[i], bias);
        if (p.residual.data) v[i] = _mm256_add_ps(v[i], _mm256_loadu_ps(residual[i] + n));
        _mm256_storeu_ps(y[i] + n, v[i]);
      }
    }
  }
}

// Rewrites `depth` columns from k on, of the weights of outputs n0 to n1, to float32.
void widen(const Product& p, int64_t n0, int64_t n1, int64_t k, int depth, float* out) {
  for (int64_t n = n0; n < n1; ++n, out += depth) {
    const uint16_t* weight = static_cast<const uint16_t*>(p.weight) + n * p.summed + k;
    for (int j = 0; j < depth; j += kVector) {
      const __m128i half = _mm_loadu_si128(reinterpret_cast<const __m128i*>(weight + j));
      const __m256 wide = p.dtype == kFloat16
                              ? _mm256_cvtph_ps(half)
                              : _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(half), 16));
      _mm256_store_ps(out + j, wide);
    }
  }
}

// Outputs n0 to n1 of the panels of rows m0 to m1. The products of a panel are (n1 - n0, its rows). From n2 on are
// probably the next outputs of this thread.
void task(const Product& p, int64_t n0, int64_t n1, int64_t n2, int64_t m0, int64_t m1, float* sums, float* wide) {
  const int64_t parts = (p.summed + kDepth - 1) / kDepth;
  const int64_t most = ((p.summed + parts - 1) / parts + kUnit - 1) / kUnit * kUnit;
  const int outputs = static_cast<int>(n1 - n0);
  const int64_t panels = (m1 - m0 + kPanel - 1) / kPanel, size = p.dtype == kFloat32 ? 4 : 2;
  const bool fetches = panels > 1;  // one panel takes its weights from memory as fast as it can
  for (int64_t k = 0; k < p.summed; k += most) {
    const int depth = static_cast<int>(std::min(most, p.summed - k));
    const bool is_last = k + depth == p.summed;
    const char* address = static_cast<const char*>(p.weight) + (n0 * p.summed + k) * size;
    const float* weight = reinterpret_cast<const float*>(address);
    if (p.dtype != kFloat32) widen(p, n0, n1, k, depth, wide), weight = wide;
    Ahead ahead;
    ahead.stride = p.summed * size, ahead.step = panels * kLine;
    const char* next = is_last ? static_cast<const char*>(p.weight) + n2 * ahead.stride : address + depth * size;
    const int64_t lines = fetches && !(is_last && n2 + outputs > p.outputs) ? most * size / kLine : 0;
    for (int64_t m = m0, at = 0; m < m1; m += kPanel, ++at) {
      const int vectors = vectors_of_panel(p.rows, m), width = vectors * kVector;
      float* out = sums + (m - m0) * kChunk;
      ahead.weight = next + at * kLine;
      ahead.lines = (lines - at + panels - 1) / panels;
      ahead.panel_lines = fetches ? depth * width * 16 / outputs / kLine : 0;
      const bool wraps = m + kPanel >= m1;
      const int64_t m_next = wraps ? m0 : m + kPanel, k_next = !wraps ? k : is_last ? 0 : k + depth;
      ahead.panel = reinterpret_cast<const char*>(p.panels + m_next * p.summed +
                                                  k_next * vectors_of_panel(p.rows, m_next) * kVector);
      (vectors == 3   ? multiply<4, 3>
       : vectors == 2 ? multiply<4, 2>
                      : multiply<8, 1>)(weight, p.dtype == kFloat32 ? p.summed : depth, outputs,
                                        p.panels + m * p.summed + k * width, depth, k > 0, out, ahead);
      if (is_last) finish(p, m, width, n0, n1, out);
    }
  }
}

// Rewrites 8 rows of `depth` floats, of which `count` exist, to columns of a matrix `width` wide.
void transpose_rows(const float* rows, int64_t stride, int64_t count, int64_t depth, float scale, float* out,
                    int64_t width) {
  for (int64_t k = 0; k < depth; k += kVector) {
    __m256 v[kVector];
    for (int64_t i = 0; i < kVector; ++i)
      v[i] = _mm256_mul_ps(_mm256_loadu_ps(rows + std::min(i, count - 1) * stride + k), _mm256_set1_ps(scale));
    transpose(v);
    for (int i = 0; i < kVector; ++i) _mm256_store_ps(out + (k + i) * width, v[i]);
  }
}

// The 8 Vectors queries from `first` on, of one head: scores, softmax and values with the queries side by side.
template <int Vectors>
void attend(const Attention& a, const float* query, int64_t first, const float* key, const float* values,
            int64_t padded, float* scores, float* y) {
  constexpr int width = Vectors * kVector;
  const int64_t row = 3 * a.heads * a.channels;
  float* panel = scores + kPanel * padded;       // (channels, width): the queries
  float* mixed = panel + kPanel * a.channels;    // (channels, width): the result
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = first + v * kVector;
    transpose_rows(query + at * row, row, a.queries - at, a.channels, a.scale, panel + v * kVector, width);
  }
  const int channels = static_cast<int>(a.channels), keys = static_cast<int>(a.keys);
  multiply<4, Vectors>(key, row, keys / 4 * 4, panel, channels, false, scores, {});
  const int64_t last = a.keys - 4;  // the last four keys may overlap the four before
  multiply<4, Vectors>(key + last * row, row, 4, panel, channels, false, scores + last * width, {});
  __m256 inverse[Vectors];
  for (int v = 0; v < Vectors; ++v) {
    float* column = scores + v * kVector;
    __m256 most = _mm256_load_ps(column), total = _mm256_setzero_ps();
    for (int64_t k = 1; k < a.keys; ++k) most = _mm256_max_ps(most, _mm256_load_ps(column + k * width));
    for (int64_t k = 0; k < a.keys; ++k) {
      const __m256 e = exponential(_mm256_sub_ps(_mm256_load_ps(column + k * width), most));
      _mm256_store_ps(column + k * width, e);
      total = _mm256_add_ps(total, e);
    }
    inverse[v] = _mm256_div_ps(_mm256_set1_ps(1.0f), total);
  }
  multiply<4, Vectors>(values, padded, channels, scores, keys, false, mixed, {});
  for (int v = 0; v < Vectors; ++v) {
    const int64_t at = first + v * kVector;
    for (int64_t c = 0; c < a.channels; c += kVector) {
      __m256 rows[kVector];
      for (int i = 0; i < kVector; ++i)
        rows[i] = _mm256_mul_ps(_mm256_load_ps(mixed + (c + i) * width + v * kVector), inverse[v]);
      transpose(rows);
      for (int64_t i = 0; i < std::min<int64_t>(kVector, a.queries - at); ++i)
        _mm256_storeu_ps(y + (at + i) * a.heads * a.channels + c, rows[i]);
    }
  }
}

}  // namespace

extern "C" {

__attribute__((visibility("default"))) int32_t xclip_fast_cpu_abi() { return 2; }

__attribute__((visibility("default"))) void xclip_fast_cpu_product(const Product* product) {
  const Product& p = *product;
  if (!p.rows) return;
  const int64_t panels = (p.rows + kPanel - 1) / kPanel, chunks = (p.outputs + kChunk - 1) / kChunk;
  const int64_t most = std::clamp<int64_t>(panels * chunks / (kTasks * p.threads), 1, kMostPanels);
  const int64_t blocks = (panels + most - 1) / most;
  const int64_t rows_of_task = (panels + blocks - 1) / blocks * kPanel;
#pragma omp parallel num_threads(p.threads)
  {
    if (p.x.data) {
#pragma omp for schedule(dynamic)
      for (int64_t m = 0; m < (p.rows + kVector - 1) / kVector * kVector; m += kVector) {
        const int64_t first = m / kPanel * kPanel;
        pack(p, m, p.panels + first * p.summed + m - first, vectors_of_panel(p.rows, first) * kVector);
      }
    }
    alignas(64) static thread_local float sums[kChunk * kPanel * kMostPanels], wide[kChunk * kDepth];
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < chunks * blocks; ++i) {
      const int64_t n = i / blocks * kChunk, m = i % blocks * rows_of_task;
      task(p, n, std::min(n + kChunk, p.outputs), (i + p.threads) / blocks * kChunk, m,
           std::min(m + rows_of_task, p.rows), sums, wide);
    }
  }
}

__attribute__((visibility("default"))) void xclip_fast_cpu_attention(const Attention* attention) {
  const Attention& a = *attention;
  const int64_t width = a.heads * a.channels, padded = (a.keys + kVector - 1) / kVector * kVector;
  const int64_t scratch = (a.channels + kPanel) * padded + 2 * kPanel * a.channels;
#pragma omp parallel num_threads(a.threads)
  {
    float* values = a.scratch + omp_get_thread_num() * scratch;  // (channels, padded)
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < a.frames * a.heads; ++i) {
      const int64_t frame = i / a.heads, head = i % a.heads * a.channels;
      const float* query = a.qkv + frame * a.keys * 3 * width + head;
      const float *key = query + width, *value = key + width;
      for (int64_t k = 0; k < a.keys; k += kVector)
        transpose_rows(value + k * 3 * width, 3 * width, a.keys - k, a.channels, 1.0f, values + k, padded);
      for (int64_t first = 0; first < a.queries; first += kPanel) {
        const int vectors = vectors_of_panel(a.queries, first);
        (vectors == 3 ? attend<3> : vectors == 2 ? attend<2> : attend<1>)(
            a, query, first, key, values, padded, values + a.channels * padded, a.y + frame * a.queries * width + head);
      }
    }
  }
}
}

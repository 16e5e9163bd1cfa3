// Inference on a CPU for kernels/cpu: products, and whole residual blocks.

#include <omp.h>

#ifndef XCLIP_FAST_SPLIT
#include "attention.h"
#endif
#include "interface.h"
#include "multiply.h"
#include "product.h"

namespace {

Rows rows_of(Element* data, int64_t count, int64_t width) { return {data, count, 0, width}; }

int64_t panels_of(int64_t rows, int64_t width) { return parts(rows, kVector) * kVector * words_of(width); }

// What lies between the steps of a block.
struct Memory {
  Element *message, *message_qkv, *message_mixed, *qkv, *mixed, *stream;
  Word *panels, *inner;  // inner and qkv share their memory

  explicit Memory(const Block& b) {
    const int64_t messages = b.of_video ? b.frames : 0, rows = b.part * b.length;
    const int64_t wide = rows * 3 * b.width / kPack, hidden = panels_of(rows, b.hidden);
    const int64_t words[] = {messages * b.width, messages * 3 * b.width, messages * b.width, rows * b.width,
                             rows * b.width,     panels_of(rows > messages ? rows : messages, b.width),
                             wide > hidden ? wide : hidden};
    Word* pieces[7];
    int64_t size = 0;
    for (const int64_t each : words) size += parts(each, kBlock) * kBlock;
    static thread_local Scratch scratch;
    Word* next = scratch.take<Word>(size);
    for (int i = 0; i < 7; ++i) pieces[i] = next, next += parts(words[i], kBlock) * kBlock;
    const auto elements = [](Word* piece) { return reinterpret_cast<Element*>(piece); };
    message = elements(pieces[0]), message_qkv = elements(pieces[1]), message_mixed = elements(pieces[2]);
    mixed = elements(pieces[3]), stream = elements(pieces[4]), panels = pieces[5], inner = pieces[6];
    qkv = elements(inner);
  }
};

}  // namespace

// Those of the plain set serve the one of split numbers, too.
extern "C" void xclip_fast_cpu_messages_avx512(const Block* block, const Memory* memory);
extern "C" void xclip_fast_cpu_attend_avx512(const Attention* attention);

namespace {

Product product(const Block& b, Word* panels, int64_t rows, Rows x, Norm norm, const Parameters& by, int64_t outputs,
                int64_t summed) {
  Product p{};
  p.rows = rows, p.outputs = outputs, p.summed = summed;
  p.x = x, p.ln_weight = norm.weight, p.ln_bias = norm.bias, p.eps = b.eps;
  p.dtype = b.dtype, p.panels = panels, p.weight = by.weight, p.bias = by.bias, p.threads = b.threads;
  return p;
}

#ifdef XCLIP_FAST_SPLIT
// Few rows do not pay for splitting the weights.
void messages(const Block& b, const Memory& memory) { xclip_fast_cpu_messages_avx512(&b, &memory); }

void attend(const Attention& a) { xclip_fast_cpu_attend_avx512(&a); }
#else
// The messages of all frames (equation 7), by all threads of a team together.
void messages(const Block& b, const Memory& memory) {
  const int64_t width = b.width;
  const Rows class_rows{b.x.data, 1, b.x.frame_stride, 0}, message = rows_of(memory.message, b.frames, width);
  Product p = product(b, memory.panels, b.frames, class_rows, {}, b.message_fc, width, width);
  p.y = message;
  multiply_rows(p);
  p = product(b, memory.panels, b.frames, message, b.message_ln, b.message_in, 3 * width, width);
  p.y = rows_of(memory.message_qkv, b.frames, 3 * width);
  multiply_rows(p);
  attend({b.frames / b.of_video, b.of_video, b.of_video, b.heads, width / b.heads, memory.message_qkv,
          memory.message_mixed});
  p = product(b, memory.panels, b.frames, rows_of(memory.message_mixed, b.frames, width), {}, b.message_out, width,
              width);
  p.y = p.residual = message;
  multiply_rows(p);
}
#endif

// The layer's outputs from the given one on.
Parameters behind(const Block& b, const Parameters& layer, int64_t output) {
  return {static_cast<const char*>(layer.weight) + output * b.width * bytes_of(b.dtype), layer.bias + output};
}

// The block, by all threads of a team together.
void run(const Block& b, const Memory& memory) {
  const int64_t width = b.width, tokens = b.of_video ? b.length - 1 : b.length, wide = 3 * width;
  const int64_t queries = b.queries ? b.queries : tokens;
  if (b.of_video) messages(b, memory);
  for (int64_t first = 0; first < b.frames; first += b.part) {
    const int64_t frames = least(b.part, b.frames - first), rows = frames * queries;
    Rows x = b.x, y = b.y, qkv{memory.qkv, b.length, b.length * wide, wide};
    x.data += first * x.frame_stride, x.length = b.length;
    y.data += first * y.frame_stride, y.length = queries;
    // queries of the rows that leave, keys and values of all
    const int64_t asked = queries < tokens ? width : 0;
    Product p = product(b, memory.panels, frames * b.length, x, b.ln_1, behind(b, b.in, asked), wide - asked, width);
    if (b.of_video) p.last = memory.message + first * width, p.last_stride = width;
    p.y = qkv, p.y.data += asked;
    multiply_rows(p);
    x.length = qkv.length = queries;
    if (asked) {
      p = product(b, memory.panels, rows, x, b.ln_1, b.in, width, width);
      p.y = qkv;
      multiply_rows(p);
    }
    attend({frames, b.length, queries, b.heads, width / b.heads, memory.qkv, memory.mixed});
    const Rows stream = rows_of(memory.stream, rows, width);
    p = product(b, memory.panels, rows, rows_of(memory.mixed, rows, width), {}, b.out, width, width);
    p.y = stream, p.residual = x;
    multiply_rows(p);
    p = product(b, memory.panels, rows, stream, b.ln_2, b.fc, b.hidden, width);
    p.y_panels = memory.inner;
    multiply_rows(p);
    p = product(b, memory.inner, rows, {}, {}, b.projection, width, b.hidden);
    p.y = y, p.residual = stream;
    multiply_rows(p);
    if (!b.of_video || b.queries) continue;
#pragma omp for schedule(static)
    for (int64_t frame = 0; frame < frames; ++frame)
      __builtin_memset(y.data + frame * y.frame_stride + tokens * y.row_stride, 0, width * sizeof(Element));
  }
}

}  // namespace

#ifndef XCLIP_FAST_SPLIT
extern "C" void XCLIP_FAST_NAME(xclip_fast_cpu_messages_, XCLIP_FAST_SET)(const Block* block, const Memory* memory) {
  messages(*block, *memory);
}

extern "C" void XCLIP_FAST_NAME(xclip_fast_cpu_attend_, XCLIP_FAST_SET)(const Attention* attention) {
  attend(*attention);
}
#endif

extern "C" {

int32_t EXPORT(xclip_fast_cpu_abi)() { return kAbi; }

void EXPORT(xclip_fast_cpu_product)(const Product* product) {
#pragma omp parallel num_threads(product->threads)
  multiply_rows(*product);
}

void EXPORT(xclip_fast_cpu_patches)(const Patches* patches) {
  const Patches& p = *patches;
  const int64_t down = p.height / p.patch, across = p.width / p.patch, summed = 3 * p.patch * p.patch;
#pragma omp parallel for num_threads(p.threads) schedule(dynamic)
  for (int64_t strip = 0; strip < p.count * down; ++strip)
    for (int64_t row = 0; row < p.patch; ++row) {
      const uint8_t* pixels = p.frames + (strip * p.patch + row) * p.width * 3;
      for (int64_t i = 0; i < across; ++i, pixels += 3 * p.patch)
        for (int64_t channel = 0; channel < 3; ++channel) {
          float* y = p.y + (strip * across + i) * summed + (channel * p.patch + row) * p.patch;
          const float* values = p.values + channel * 256;
          for (int64_t column = 0; column < p.patch; ++column) y[column] = values[pixels[3 * column + channel]];
        }
    }
}

void EXPORT(xclip_fast_cpu_block)(const Block* block) {
  const Memory memory(*block);
#pragma omp parallel num_threads(block->threads)
  run(*block, memory);
}
}

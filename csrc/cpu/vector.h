// Vectors of one instruction set, and the numbers that rows are made of. Every file is compiled for each set:
//
// | compiled with                             | vector    | element of rows | products               |
// |-------------------------------------------|-----------|-----------------|------------------------|
// | -mavx2 -mfma -mf16c                       | 8 floats  | float32         | multiply-adds          |
// | -mavx512f -mavx512bw ...                  | 16 floats | float32         | multiply-adds          |
// | -mavx512bf16, too                         | 16 floats | bfloat16        | dot products of pairs  |
// | -mamx-tile -mamx-bf16, too                | 16 floats | bfloat16        | tiles of 16 x 16 sums  |
// | -DXCLIP_FAST_SPLIT, too                   | 16 floats | float32         | 6 of such tiles        |
//
// Panels have the same elements, but for the last set: it has three bfloat16 for each.
// It splits a float32 into three bfloat16, whose sum it is: a = a0 + a1 + a2, each at most 2^-8 of the one
// before. Of the nine products of two numbers, the six that are not below 2^-24 of the whole are summed.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <initializer_list>

namespace {

#ifdef __AVX512F__
#define SIMD(name) _mm512_##name
using Vector = __m512;
using Integers = __m512i;
using Halves = __m256i;  // as many numbers of 16 bits
#else
#define SIMD(name) _mm256_##name
using Vector = __m256;
using Integers = __m256i;
using Halves = __m128i;
#endif

constexpr int kVector = sizeof(Vector) / sizeof(float);

// Panels and weights are made of words of 32 bits: a float32, or two neighbors of K in bfloat16.
using Word = float;

struct Bfloat16 {
  uint16_t bits;
};

#if defined(__AVX512BF16__) && !defined(XCLIP_FAST_SPLIT)
using Element = Bfloat16;
#else
using Element = float;
#endif

#ifdef XCLIP_FAST_SPLIT
constexpr int kKinds = 3;  // of words: those of a0, a1 and a2
#else
constexpr int kKinds = 1;
#endif

#ifdef __AVX512BF16__
constexpr int kPair = 2;  // numbers of a word
#else
constexpr int kPair = 1;
#endif

constexpr int kPack = sizeof(Word) / sizeof(Element);  // elements of 32 bits
constexpr int kBlock = 16;                             // words of K whose kinds lie together

inline Vector all(float x) { return SIMD(set1_ps)(x); }

inline float wide(float x) { return x; }

inline float wide(Bfloat16 x) {
  const uint32_t bits = uint32_t{x.bits} << 16;
  return __builtin_bit_cast(float, bits);
}

inline Halves load_halves(const void* p) {
#ifdef __AVX512F__
  return _mm256_loadu_si256(static_cast<const __m256i*>(p));
#else
  return _mm_loadu_si128(static_cast<const __m128i*>(p));
#endif
}

inline Vector load(const float* p) { return SIMD(loadu_ps)(p); }

inline Vector load(const Bfloat16* p) {
  return (Vector)SIMD(slli_epi32)(SIMD(cvtepu16_epi32)(load_halves(p)), 16);
}

inline void store(float* p, Vector v) { SIMD(storeu_ps)(p, v); }

#ifdef __AVX512BF16__
inline Halves narrow(Vector v) { return (Halves)_mm512_cvtneps_pbh(v); }

inline void store(Bfloat16* p, Vector v) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), narrow(v)); }

// Words of the numbers of two vectors, one behind the other.
inline Vector join(Halves first, Halves second) {
  return (Vector)_mm512_inserti64x4(_mm512_castsi256_si512(first), second, 1);
}

// Words of one number of each vector.
inline Vector pair(Halves first, Halves second) {
  const Integers high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(second), 16);
  return (Vector)_mm512_or_si512(_mm512_cvtepu16_epi32(first), high);
}

// The next kind of v, which becomes the rest.
inline Halves split(Vector& v) {
  const Halves kind = narrow(v);
  v -= (Vector)_mm512_slli_epi32(_mm512_cvtepu16_epi32(kind), 16);
  return kind;
}
#endif

inline float sum(Vector v) {
#ifdef __AVX512F__
  return _mm512_reduce_add_ps(v);
#else
  __m128 s = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  s = _mm_add_ps(s, _mm_movehl_ps(s, s));
  return _mm_cvtss_f32(_mm_add_ss(s, _mm_movehdup_ps(s)));
#endif
}

inline void transpose(Vector v[kVector]) {
  Vector t[kVector];
  for (int i = 0; i < kVector; i += 4) {  // within each 128 bits
    const Vector low_01 = SIMD(unpacklo_ps)(v[i], v[i + 1]), high_01 = SIMD(unpackhi_ps)(v[i], v[i + 1]);
    const Vector low_23 = SIMD(unpacklo_ps)(v[i + 2], v[i + 3]), high_23 = SIMD(unpackhi_ps)(v[i + 2], v[i + 3]);
    t[i] = SIMD(shuffle_ps)(low_01, low_23, 0x44);
    t[i + 1] = SIMD(shuffle_ps)(low_01, low_23, 0xEE);
    t[i + 2] = SIMD(shuffle_ps)(high_01, high_23, 0x44);
    t[i + 3] = SIMD(shuffle_ps)(high_01, high_23, 0xEE);
  }
  for (int i = 0; i < 4; ++i) {
#ifdef __AVX512F__
    const Vector low_01 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0x44);
    const Vector high_01 = _mm512_shuffle_f32x4(t[i], t[i + 4], 0xEE);
    const Vector low_23 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0x44);
    const Vector high_23 = _mm512_shuffle_f32x4(t[i + 8], t[i + 12], 0xEE);
    v[i] = _mm512_shuffle_f32x4(low_01, low_23, 0x88);
    v[i + 4] = _mm512_shuffle_f32x4(low_01, low_23, 0xDD);
    v[i + 8] = _mm512_shuffle_f32x4(high_01, high_23, 0x88);
    v[i + 12] = _mm512_shuffle_f32x4(high_01, high_23, 0xDD);
#else
    v[i] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x20);
    v[i + 4] = _mm256_permute2f128_ps(t[i], t[i + 4], 0x31);
#endif
  }
}

// e^x; x in [-87, 88] after clamping. Within 3 units in the last place, or within 2^-12 for bfloat16.
inline Vector exponential(Vector x) {
  x = SIMD(max_ps)(all(-87.0f), SIMD(min_ps)(all(88.0f), x));
  const Integers exponent = SIMD(cvtps_epi32)(x * all(1.44269504f));  // the nearest integer
  const Vector n = SIMD(cvtepi32_ps)(exponent);
  x = SIMD(fnmadd_ps)(n, all(0.693145752f), x);  // ln 2, its leading bits
#if defined(__AVX512BF16__) && !defined(XCLIP_FAST_SPLIT)
  Vector y = all(1.0f / 24);
  for (const float factor : {1.0f / 6, 0.5f, 1.0f, 1.0f}) y = SIMD(fmadd_ps)(y, x, all(factor));
#else
  x = SIMD(fnmadd_ps)(n, all(1.42860677e-6f), x);  // and the rest
  Vector y = all(1.0f / 720);
  for (const float factor : {1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = SIMD(fmadd_ps)(y, x, all(factor));
#endif
  return (Vector)SIMD(add_epi32)((Integers)y, SIMD(slli_epi32)(exponent, 23));
}

inline Vector quick_gelu(Vector u) {
  u = SIMD(max_ps)(all(-1e30f), u);  // e^x ends at 88: a lower one would not vanish
  const Vector divisor = all(1.0f) + exponential(u * all(-1.702f));
#if defined(__AVX512BF16__) && !defined(XCLIP_FAST_SPLIT)
  return u * _mm512_rcp14_ps(divisor);
#else
  return u / divisor;
#endif
}

}  // namespace

// What happens to the accumulator, elementwise in float32, as compute nodes of CUTLASS's epilogue visitor trees.
#pragma once

#include <cmath>

#include "cutlass/array.h"
#include "cutlass/cutlass.h"

namespace xclip_fast {

// quick_gelu(u) = u sigmoid(1.702 u). Where exp overflows the quotient is -0, its limit.
CUTLASS_HOST_DEVICE float quick_gelu(float u) {
#if defined(__CUDA_ARCH__)
  return __fdividef(u, 1.0f + __expf(-1.702f * u));
#else
  return u / (1.0f + std::exp(-1.702f * u));
#endif
}

// A node is a template over one type: the visitor names it with float and applies it to fragments of N floats.
template <class Scalar, class T>
struct Elementwise {};

template <class Scalar, int N>
struct Elementwise<Scalar, cutlass::Array<float, N>> {
  template <class... Fragments>
  CUTLASS_HOST_DEVICE cutlass::Array<float, N> operator()(Fragments const&... inputs) const {
    cutlass::Array<float, N> result;
    CUTLASS_PRAGMA_UNROLL
    for (int i = 0; i < N; ++i) {
      result[i] = Scalar::value(inputs[i]...);
    }
    return result;
  }
};

// LN(x) W + b = r (x W' - mu s) + b'
struct NormLinearValue {
  CUTLASS_HOST_DEVICE static float value(float acc, float mean, float rstd, float sum, float bias) {
    return rstd * (acc - mean * sum) + bias;
  }
};
template <class T>
struct NormLinear : Elementwise<NormLinearValue, T> {};

struct QuickGeluValue {
  CUTLASS_HOST_DEVICE static float value(float u) { return quick_gelu(u); }
};
template <class T>
struct QuickGelu : Elementwise<QuickGeluValue, T> {};

// residual + s (x W + b)
struct AddResidualValue {
  CUTLASS_HOST_DEVICE static float value(float acc, float bias, float scale, float residual) {
    return residual + scale * (acc + bias);
  }
};
template <class T>
struct AddResidual : Elementwise<AddResidualValue, T> {};

// s t (x W) + b of scaled 8-bit operands
struct ScaledValue {
  CUTLASS_HOST_DEVICE static float value(float acc, float row, float column, float bias) {
    return row * (column * acc) + bias;
  }
};
template <class T>
struct Scaled : Elementwise<ScaledValue, T> {};

struct ScaledGeluValue {
  CUTLASS_HOST_DEVICE static float value(float acc, float row, float column, float bias, float inverse) {
    return quick_gelu(row * (column * acc) + bias) * inverse;
  }
};
template <class T>
struct ScaledGelu : Elementwise<ScaledGeluValue, T> {};

struct ScaledResidualValue {
  CUTLASS_HOST_DEVICE static float value(float acc, float column, float bias, float residual) {
    return residual + (column * acc + bias);
  }
};
template <class T>
struct ScaledResidual : Elementwise<ScaledResidualValue, T> {};

}  // namespace xclip_fast

// What happens to the accumulator, elementwise in float32, as compute nodes of CUTLASS's epilogue visitor trees. A node is
// a template over one type: the visitor names it with float and applies it to arrays of N floats.
#pragma once

#include "cutlass/array.h"
#include "cutlass/cutlass.h"

namespace xclip_fast {

// MUFU's exponential and reciprocal; denormal numbers count as 0.
CUTLASS_DEVICE float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CUTLASS_DEVICE float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// sigmoid(1.702 u) = 1 / d with d = 1 + 2^(-1.702 log2(e) u). Four numbers share one reciprocal: 1 / d0 = d1 (d2 d3) /
// (d0 d1 d2 d3). The exponent ends at 31, so that the product of four stays finite: below u = -12.6 sigmoid is 2^-31 in
// place of less.
template <int N>
CUTLASS_DEVICE cutlass::Array<float, N> sigmoid_1702(cutlass::Array<float, N> const& u) {
  static_assert(N % 4 == 0);
  cutlass::Array<float, N> result;
  CUTLASS_PRAGMA_UNROLL
  for (int i = 0; i < N; i += 4) {
    float d[4];
    CUTLASS_PRAGMA_UNROLL
    for (int j = 0; j < 4; ++j) {
      d[j] = 1.0f + exp2_approx(fminf(-2.4554669595930156f * u[i + j], 31.0f));
    }
    float const low = d[0] * d[1], high = d[2] * d[3], inverse = reciprocal_approx(low * high);
    float const of_low = inverse * high, of_high = inverse * low;
    result[i] = of_low * d[1];
    result[i + 1] = of_low * d[0];
    result[i + 2] = of_high * d[3];
    result[i + 3] = of_high * d[2];
  }
  return result;
}

// quick_gelu(u) = u sigmoid(1.702 u)
template <class T>
struct QuickGelu {
  CUTLASS_DEVICE T operator()(T const& u) const { return u * sigmoid_1702(u); }
};

// acc d quick_gelu(u) / du = acc (s + 1.702 h (1 - s)) with s = sigmoid(1.702 u), h = u s. The compiler computes s once
// for this node and for the one that gives h.
template <class T>
struct TimesSlope {
  CUTLASS_DEVICE T operator()(T const& acc, T const& h, T const& u) const {
    T const s = sigmoid_1702(u);
    return acc * (s + 1.702f * h * (1.0f + -s));
  }
};

// LN(x) W + b = r (x W' - mu s) + b'
template <class T>
struct NormLinear {
  CUTLASS_DEVICE T operator()(T const& acc, T const& mean, T const& rstd, T const& sum, T const& bias) const {
    return rstd * (acc - mean * sum) + bias;
  }
};

// residual + s (x W + b)
template <class T>
struct AddResidual {
  CUTLASS_DEVICE T operator()(T const& acc, T const& bias, T const& scale, T const& residual) const {
    return residual + scale * (acc + bias);
  }
};

}  // namespace xclip_fast

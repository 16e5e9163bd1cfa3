// The products between the C interface and CUTLASS: plain types, so that only the files that instantiate kernels see
// CUTLASS's headers. Defined once per element type in the files product_*.cu.
#pragma once

#include "checks.cuh"

namespace xclip_fast {

// What every product takes, as the C interface got it and checked it.
struct Operands {
  void const* x;
  int64_t x_row;
  void const* w;
  int64_t w_row;
  void const* source;  // (M, N), read by the epilogue, or null
  int64_t source_row;
  void* y;
  int64_t m, n, k;
  int device;
  int processors;
  void* stream;
};

struct NormArguments {
  float const* mean;
  float const* rstd;
  float const* sums;
  float const* bias;
  void* u;
};

struct ResidualArguments {
  float const* bias;
  float const* scale;
};

struct SlopeArguments {};

template <int dtype>
int norm(int tile, Operands const& operands, NormArguments const& extra);
template <int dtype>
int norm_gelu(int tile, Operands const& operands, NormArguments const& extra);
template <int dtype>
int residual(int tile, Operands const& operands, ResidualArguments const& extra);
template <int dtype>
int slope(int tile, Operands const& operands, SlopeArguments const& extra);

}  // namespace xclip_fast

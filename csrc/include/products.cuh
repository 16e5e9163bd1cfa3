// The products between the C interface and CUTLASS: plain types, so that only the files that instantiate kernels see
// CUTLASS's headers. Defined in the files product_*.cu.
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
  void* u;    // (M, N), written, or null
  int64_t n;  // of u
};

struct SlopeArguments {
  void* h;          // (M, N), written
  float* partials;  // (4 of each 128 rows, N): sums of y's columns
  int64_t n;        // of h
};

// The last five are for row statistics of the result. The partial sums are m-major, a column of tiles after the other.
struct ResidualArguments {
  float const* bias;
  float const* scale;
  float* sums;
  float* squares;
  float* mean;
  float* rstd;
  float eps;
};

int norm(int dtype, int tile, Operands const& operands, NormArguments const& extra);
int norm_gelu(int dtype, int tile, Operands const& operands, NormArguments const& extra);
int norm_gelu_kept(int tile, Operands const& operands, NormArguments const& extra);
int slope(int tile, Operands const& operands, SlopeArguments const& extra);
int residual_add(int dtype, int tile, Operands const& operands, ResidualArguments const& extra);
int residual_statistics(int dtype, int tile, Operands const& operands, ResidualArguments const& extra);

// What follows a product with statistics: those of its tiles become those of the rows (library.cu).
int merge_statistics(Operands const& operands, ResidualArguments const& extra, int tile_rows, int tile_columns);

}  // namespace xclip_fast

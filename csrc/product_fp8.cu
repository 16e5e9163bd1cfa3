// Products of e4m3 matrices, accumulated in float32. The wide tile would spill where the residual is added.
#include "gemm.cuh"

namespace xclip_fast {

int fp8_linear(int tile, Operands const& operands, ScaledArguments const& extra) {
  return run_on_tile<cutlass::float_e4m3_t, Fp8, WideFp8, SquareFp8>(tile, operands, extra);
}

int fp8_linear_gelu(int tile, Operands const& operands, ScaledArguments const& extra) {
  return run_on_tile<cutlass::float_e4m3_t, Fp8Gelu, WideFp8, SquareFp8>(tile, operands, extra);
}

int fp8_linear_residual(int tile, Operands const& operands, ScaledArguments const& extra) {
  return run_on_tile<cutlass::float_e4m3_t, Fp8Residual, SquareFp8>(tile, operands, extra);
}

}  // namespace xclip_fast

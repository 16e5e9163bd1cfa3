// Products whose epilogue reads a matrix, the residual or the pre-activation, in float16.
#include "gemm.cuh"

namespace xclip_fast {

template <>
int residual<XCLIP_FAST_FP16>(int tile, Operands const& operands, ResidualArguments const& extra) {
  return run_on_tile<cutlass::half_t, Residual, Square>(tile, operands, extra);
}

template <>
int slope<XCLIP_FAST_FP16>(int tile, Operands const& operands, SlopeArguments const& extra) {
  return run_on_tile<cutlass::half_t, Slope, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

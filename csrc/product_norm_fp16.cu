// LayerNorm folded into a product, and quick_gelu, in float16.
#include "gemm.cuh"

namespace xclip_fast {

template <>
int norm<XCLIP_FAST_FP16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::half_t, Norm, Square>(tile, operands, extra);
}

template <>
int norm_gelu<XCLIP_FAST_FP16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::half_t, NormGelu, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

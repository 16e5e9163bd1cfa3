// LayerNorm folded into a product, and quick_gelu, in bfloat16.
#include "gemm.cuh"

namespace xclip_fast {

template <>
int norm<XCLIP_FAST_BF16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, Norm, Wide, Square, Small>(tile, operands, extra);
}

template <>
int norm_gelu<XCLIP_FAST_BF16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, NormGelu, Square, Small>(tile, operands, extra);
}

}  // namespace xclip_fast

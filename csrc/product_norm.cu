// LayerNorm folded into a product, and quick_gelu.
#include "gemm.cuh"

namespace xclip_fast {

int norm(int dtype, int tile, Operands const& operands, NormArguments const& extra) {
  return dtype == XCLIP_FAST_BF16 ? run_on_tile<cutlass::bfloat16_t, Norm, Wide, Square>(tile, operands, extra)
                                  : run_on_tile<cutlass::half_t, Norm, Square>(tile, operands, extra);
}

int norm_gelu(int dtype, int tile, Operands const& operands, NormArguments const& extra) {
  return dtype == XCLIP_FAST_BF16 ? run_on_tile<cutlass::bfloat16_t, NormGelu, Wide, Square>(tile, operands, extra)
                                  : run_on_tile<cutlass::half_t, NormGelu, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

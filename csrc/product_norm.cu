// LayerNorm folded into a product, and quick_gelu. The wide tile would spill where u is stored as well.
#include "gemm.cuh"

namespace xclip_fast {

int norm(int dtype, int tile, Operands const& operands, NormArguments const& extra) {
  return dtype == XCLIP_FAST_BF16 ? run_on_tile<cutlass::bfloat16_t, Norm, Wide, Square, Small>(tile, operands, extra)
                                  : run_on_tile<cutlass::half_t, Norm, Square>(tile, operands, extra);
}

int norm_gelu(int dtype, int tile, Operands const& operands, NormArguments const& extra) {
  if (dtype != XCLIP_FAST_BF16) {
    return run_on_tile<cutlass::half_t, NormGeluKept, Square>(tile, operands, extra);
  }
  return extra.u ? run_on_tile<cutlass::bfloat16_t, NormGeluKept, Square>(tile, operands, extra)
                 : run_on_tile<cutlass::bfloat16_t, NormGelu, Wide, Square, Small>(tile, operands, extra);
}

}  // namespace xclip_fast

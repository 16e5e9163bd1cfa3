// Products that are added to a residual.
#include "gemm.cuh"

namespace xclip_fast {

int residual_add(int dtype, int tile, Operands const& operands, ResidualArguments const& extra) {
  return dtype == XCLIP_FAST_BF16 ? run_on_tile<cutlass::bfloat16_t, Residual, Wide, Square>(tile, operands, extra)
                                  : run_on_tile<cutlass::half_t, Residual, Square>(tile, operands, extra);
}

int residual_statistics(int dtype, int tile, Operands const& operands, ResidualArguments const& extra) {
  return dtype == XCLIP_FAST_BF16
             ? run_on_tile<cutlass::bfloat16_t, ResidualStatistics, WideStatistics, Square>(tile, operands, extra)
             : run_on_tile<cutlass::half_t, ResidualStatistics, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

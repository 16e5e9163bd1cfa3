// Products that are added to a residual. The wide tile would spill where statistics are reduced.
#include "gemm.cuh"

namespace xclip_fast {

template <>
int residual_add<XCLIP_FAST_BF16>(int tile, Operands const& operands, ResidualArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, Residual, Wide, Square, Small>(tile, operands, extra);
}

template <>
int residual_add<XCLIP_FAST_FP16>(int tile, Operands const& operands, ResidualArguments const& extra) {
  return run_on_tile<cutlass::half_t, Residual, Square>(tile, operands, extra);
}

template <>
int residual_statistics<XCLIP_FAST_BF16>(int tile, Operands const& operands, StatisticsArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, ResidualStatistics, Square>(tile, operands, extra);
}

template <>
int residual_statistics<XCLIP_FAST_FP16>(int tile, Operands const& operands, StatisticsArguments const& extra) {
  return run_on_tile<cutlass::half_t, ResidualStatistics, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

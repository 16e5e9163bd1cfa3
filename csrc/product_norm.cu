// LayerNorm folded into a product, and quick_gelu. The wide tile would spill in the second epilogue.
#include "gemm.cuh"

namespace xclip_fast {

template <>
int norm<XCLIP_FAST_BF16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, Norm, Wide, Square, Small>(tile, operands, extra);
}

template <>
int norm<XCLIP_FAST_FP16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::half_t, Norm, Square>(tile, operands, extra);
}

template <>
int norm_gelu<XCLIP_FAST_BF16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, NormGelu, Square, Small>(tile, operands, extra);
}

template <>
int norm_gelu<XCLIP_FAST_FP16>(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::half_t, NormGelu, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

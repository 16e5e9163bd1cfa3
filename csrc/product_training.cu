// The products around quick_gelu in training: forward keeps what it is applied to, backward takes its slope there.
#include "gemm.cuh"

namespace xclip_fast {

int norm_gelu_kept(int tile, Operands const& operands, NormArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, NormGeluKept, Square>(tile, operands, extra);
}

int slope(int tile, Operands const& operands, SlopeArguments const& extra) {
  return run_on_tile<cutlass::bfloat16_t, Slope, Square>(tile, operands, extra);
}

}  // namespace xclip_fast

"""The bare GEMM of every reference, on the fastest exact route of the device at hand; that of a gradient."""

import torch
import torch.nn.functional as F
from torch import Tensor

# CPUs without bf16 or fp16 matrix instructions run half-precision GEMMs many times slower than float32 ones.
NATIVE_ON_CPU = {
    torch.bfloat16: bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
    torch.float16: bool(torch.ops.mkldnn._is_mkldnn_fp16_supported()),
}


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b as ``torch.nn.functional.linear``: x (..., I), weight (O, I), bias (O,) -> (..., O), in x's
    or autocast's dtype.

    Where the CPU has no instructions for a half-precision dtype, the product is computed in float32 and rounded
    once. A graph that is exported has the plain product: it runs elsewhere.
    """
    if x.device.type == "cpu" and not torch.compiler.is_exporting():
        autocast = torch.is_autocast_enabled("cpu")
        dtype = torch.get_autocast_dtype("cpu") if autocast else x.dtype
        if not NATIVE_ON_CPU.get(dtype, True) and (autocast or x.dtype == weight.dtype):
            with torch.autocast("cpu", enabled=False):
                wide = F.linear(x.to(dtype).float(), weight.to(dtype).float(), None if bias is None else bias.float())
            return wide.to(dtype)
    return F.linear(x, weight, bias)


def product(a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """a (M, K) times b (K, N), without a gradient, in ``dtype``, any floating dtype.

    cuBLAS writes float32 as it accumulated it. Elsewhere the product of half-precision factors is rounded before.
    """
    if a.is_cuda and a.dtype != dtype == torch.float32:  # torch refuses every other pair of dtypes
        return torch.mm(a, b, out_dtype=dtype)
    return torch.mm(a, b).to(dtype)

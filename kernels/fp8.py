"""What the ops on float8 share: rounding to e4m3, its products, and why a backend does not take them.

M rows, N columns, K summed. docs/kernels.md says what is quantised, and how.
"""

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cuda_library, dispatch
from .dispatch import FLOATS, forced_backend
from .example import FLOAT8, Maker
from .layer_norm import WIDEST_ROW
from .quick_gelu import quick_gelu

LARGEST = 448.0  # of e4m3
OPERANDS = (*FLOATS, FLOAT8)  # the dtypes among an op's arguments
STEP = 16  # widths are multiples of it where tensor cores read whole 16 bytes


def saturate(x: Tensor) -> Tensor:
    """x in e4m3, rounded to the nearest, what is too large to its largest."""
    return x.clamp(-LARGEST, LARGEST).to(FLOAT8)


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """x (..., K) float32 as e4m3 (..., K) and a scale for each row (...), float32, so that the row's largest is 448.

    A row of zeros has the scale 1.
    """
    largest = x.abs().amax(-1)
    scale = torch.where(largest == 0, 1.0, largest / LARGEST)
    return saturate(x / scale[..., None]), scale


def normed_rows(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``quantize_rows`` of LN(x), which is computed in float32 whatever the dtypes."""
    return quantize_rows(F.layer_norm(x.float(), (x.shape[-1],), ln_weight.float(), ln_bias.float(), eps))


def exact_product(x8: Tensor, weight8: Tensor) -> Tensor:
    """x8 W8^T in float32, in which products of two e4m3 numbers are exact: (..., K), (N, K) -> (..., N)."""
    return F.linear(x8.float(), weight8.float())


# ---- the passes around torch's products: one of Triton's each, or torch's own


def _triton(x: Tensor) -> Any:
    """The module of Triton's passes, or None where torch's own run: elsewhere than on a GPU, without Triton, and while
    torch.compile traces, which fuses torch's own."""
    if "triton" not in dispatch._INSTALLED or torch.compiler.is_compiling() or x.shape[-1] > WIDEST_ROW:
        return None
    if not x.is_cuda and (dispatch.INTERPRETED or not dispatch.off_gpu):
        return None
    return importlib.import_module(f"{__package__}.triton.quantize")


def library_normed_rows(x: Tensor, ln_weight: Tensor, ln_bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """``normed_rows`` of x (M, K)."""
    passes = _triton(x)
    if passes is None:
        return normed_rows(x, ln_weight, ln_bias, eps)
    quantized: tuple[Tensor, Tensor] = passes.layer_norm_fp8(x, ln_weight, ln_bias, eps)
    return quantized


def library_quick_gelu(x: Tensor, u: Tensor, scale: float) -> Tensor:
    """quick_gelu(u) / scale in e4m3: u (M, N) of the product of x (M, K)."""
    passes = _triton(x)
    if passes is None:
        return saturate(quick_gelu(u) / scale)
    hidden: Tensor = passes.quick_gelu_fp8(u, scale)
    return hidden


def library_product(
    x8: Tensor, x_scale: Tensor, weight8: Tensor, weight_scale: Tensor, bias: Tensor | None = None
) -> Tensor:
    """torch's: (M, K), (M,), (N, K), (N,), (N,) -> x_scale weight_scale (x8 W8^T) + bias, (M, N) bfloat16."""
    return torch._scaled_mm(
        x8,
        weight8.contiguous().t(),
        scale_a=x_scale[:, None],
        scale_b=weight_scale.float().contiguous()[None],
        bias=None if bias is None else bias.bfloat16(),
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )


def check_operands(x: Tensor, *weights: Tensor) -> None:
    """Raise TypeError unless x is floating and no float8, and the weights are e4m3."""
    if x.dtype not in FLOATS:
        raise TypeError(f"x of dtype {x.dtype} given; the residual stream wanted, as it is: the op quantises LN(x)")
    for weight in weights:
        if weight.dtype != FLOAT8:
            raise TypeError(f"a weight of dtype {weight.dtype} given; {FLOAT8} wanted, from kernels.quantize_weight")


def quantize_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """A weight for the ops on float8, with a scale for each output channel.

    Args:
        weight: (O, I), floating.

    Returns:
        the weight / scale in e4m3 (O, I), and the scale (O,), float32: the channel's largest value / 448.
    """
    return quantize_rows(weight.detach().float())


def example_linear(make: Maker, out: int, inner: int) -> tuple[Tensor, Tensor, Tensor]:
    """Weight in float8, its scales, and the bias of a linear layer."""
    weight, bias = make.linear(out, inner)
    if make.empty:
        return weight.to(FLOAT8), bias.float(), bias
    return *quantize_weight(weight), bias


# ---- what the backends refuse


def _refuse_operands(x: Tensor, weights: tuple[Tensor, ...]) -> str | None:
    if x.dtype != torch.bfloat16:
        return f"x of dtype {x.dtype} is not bfloat16"
    for weight in weights:
        if weight.shape[0] % STEP or weight.shape[1] % STEP:
            return f"weight {tuple(weight.shape)}: both sizes must be multiples of {STEP}"
    return None


def refuse_library(x: Tensor, *weights: Tensor) -> str | None:
    """Why ``torch._scaled_mm`` is not taken for x and these weights, or None."""
    if x.device.type == "cpu":
        if forced_backend() != "library":
            return "torch._scaled_mm is no faster than float32 on a CPU: taken only if asked for (backend('library'))"
    elif x.device.type != "cuda":
        return f"device {x.device.type} is not cuda or cpu"
    else:
        properties = torch.cuda.get_device_properties(x.device)
        if (properties.major, properties.minor) < (8, 9):
            return f"compute capability {properties.major}.{properties.minor} is below 8.9"
    return _refuse_operands(x, weights)


def refuse_cuda(x: Tensor, *weights: Tensor) -> str | None:
    """Why the CUDA library's products are not taken for x and these weights, or None."""
    return cuda_library.refuse_device(x.device.type, x.device.index) or _refuse_operands(x, weights)

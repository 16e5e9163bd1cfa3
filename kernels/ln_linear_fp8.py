"""LayerNorm and linear layer on float8: LN(x) is quantised row by row, the weight was channel by channel."""

import torch
from torch import Tensor

from . import cuda_library, fp8
from .dispatch import Backend, Op
from .parts import UNMEASURED


def ln_linear_fp8_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x8, x_scale = fp8.normed_rows(x, ln_weight, ln_bias, eps)
        y = fp8.exact_product(x8, weight8) * x_scale[..., None] * weight_scale.float()
    return (y if bias is None else y + bias.float()).to(x.dtype)


def _library(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float,
) -> Tensor:
    x8, x_scale = fp8.library_normed_rows(x.reshape(-1, x.shape[-1]), ln_weight, ln_bias, eps)
    return fp8.library_product(x8, x_scale, weight8, weight_scale, bias).view(*x.shape[:-1], weight8.shape[0])


def _forward(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    x8, x_scale = cuda_library.layer_norm_fp8(x.reshape(-1, x.shape[-1]), ln_weight, ln_bias, eps)
    y = cuda_library.fp8_linear(x8, x_scale, weight8, weight_scale.float(), bias)
    return (y.view(*x.shape[:-1], weight8.shape[0]),), ()


_op = Op(
    ln_linear_fp8_reference,
    Backend(
        "cuda",
        _forward,
        dtypes=fp8.OPERANDS,
        unasked=UNMEASURED,
        refuse=lambda x, _gamma, _beta, weight8, *_: fp8.refuse_cuda(x, weight8),
        partial=True,
    ),
    Backend(
        "library",
        _library,
        dtypes=fp8.OPERANDS,
        refuse=lambda x, _gamma, _beta, weight8, *_: fp8.refuse_library(x, weight8),
    ),
    example=lambda sizes, make: (
        make.normal(sizes.sequences, sizes.tokens, sizes.width),
        *make.norm(sizes.width),
        *fp8.example_linear(make, 3 * sizes.width, sizes.width),
        1e-5,
    ),
    dtypes=fp8.OPERANDS,
    differentiable=False,
)


def ln_linear_fp8(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight8: Tensor,
    weight_scale: Tensor,
    bias: Tensor | None,
    eps: float = 1e-5,
) -> Tensor:
    """LN(x) W^T + b with the product in float8 (e4m3), for inference: ``ln_linear`` of equation 8.

    LN(x), in float32, is quantised with the scale s_m = its row's largest value / 448, so the result is
    s_m weight_scale (x8 W8^T) + b.

    Args:
        x: (..., D), floating.
        ln_weight, ln_bias: (D,).
        weight8: (O, D), float8_e4m3fn; weight_scale: (O,), from ``quantize_weight``. bias: (O,) or None.
        eps: of the LayerNorm.

    Returns:
        (..., O) in x's dtype.

    Raises:
        TypeError: if the weight is not in e4m3, or x is in float8.
        RuntimeError: if a gradient is wanted.
    """
    fp8.check_operands(x, weight8)
    return _op(x, ln_weight, ln_bias, weight8, weight_scale, bias, eps)

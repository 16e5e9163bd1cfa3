"""The feed-forward residual branch with both products in float8."""

from typing import Any

import torch
from torch import Tensor

from . import cuda_library, fp8
from .dispatch import Backend, Op
from .example import Maker, Sizes
from .parts import UNMEASURED
from .quick_gelu import quick_gelu_reference


def mlp_fp8_reference(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float,
) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):
        x8, x_scale = fp8.normed_rows(x, ln_weight, ln_bias, eps)
        u = fp8.exact_product(x8, weight1_8) * x_scale[..., None] * weight1_scale.float() + bias1.float()
        hidden8 = fp8.saturate(quick_gelu_reference(u) / hidden_scale)
        y = x.float() + (fp8.exact_product(hidden8, weight2_8) * weight2_scale.float() + bias2.float())
    return y.to(x.dtype)


def _library(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float,
) -> Tensor:
    rows = x.reshape(-1, x.shape[-1])
    x8, x_scale = fp8.library_normed_rows(rows, ln_weight, ln_bias, eps)
    u = fp8.library_product(x8, x_scale, weight1_8, weight1_scale, bias1)
    hidden8 = fp8.library_quick_gelu(rows, u, hidden_scale)
    y = fp8.library_product(hidden8, torch.ones_like(x_scale), weight2_8, weight2_scale, bias2)
    return x + y.view(x.shape)


def _forward(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = x.reshape(-1, x.shape[-1])
    x8, x_scale = cuda_library.layer_norm_fp8(rows, ln_weight, ln_bias, eps)
    hidden8 = cuda_library.fp8_linear_gelu(x8, x_scale, weight1_8, weight1_scale.float(), bias1, hidden_scale)
    y = cuda_library.fp8_linear_residual(hidden8, weight2_8, weight2_scale.float(), bias2, rows)
    return (y.view(x.shape),), ()


def _weights(x: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return x, rest[2], rest[5]


def _example(sizes: Sizes, make: Maker) -> tuple[Any, ...]:
    width, scale = sizes.width, 8.0 / 448  # for quick_gelu up to 8
    weight, weight_scale, bias = fp8.example_linear(make, width, 4 * width)
    x = make.normal(sizes.sequences, sizes.tokens, width)
    return (
        *(x, *make.norm(width), *fp8.example_linear(make, 4 * width, width)),
        *(weight, weight_scale * scale, bias, scale, 1e-5),
    )


_op = Op(
    mlp_fp8_reference,
    Backend(
        "cuda",
        _forward,
        dtypes=fp8.OPERANDS,
        unasked=UNMEASURED,
        refuse=lambda *args: fp8.refuse_cuda(*_weights(*args)),
        partial=True,
    ),
    Backend(
        "library",
        _library,
        dtypes=fp8.OPERANDS,
        refuse=lambda *args: fp8.refuse_library(*_weights(*args)),
    ),
    example=_example,
    dtypes=fp8.OPERANDS,
    differentiable=False,
)


def mlp_fp8(
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1_8: Tensor,
    weight1_scale: Tensor,
    bias1: Tensor,
    weight2_8: Tensor,
    weight2_scale: Tensor,
    bias2: Tensor,
    hidden_scale: float,
    eps: float = 1e-5,
) -> Tensor:
    """x + W2 quick_gelu(W1 LN(x) + b1) + b2 with both products in float8 (e4m3), for inference: ``mlp`` of equation 9.

    LN(x), in float32, is quantised with the scale s_m = its row's largest value / 448, quick_gelu's output h with
    ``hidden_scale`` whatever its values: h8 = h / hidden_scale, and what is beyond 448 saturates.

    Args:
        x: (..., D), floating.
        ln_weight, ln_bias: (D,).
        weight1_8: (F, D), float8_e4m3fn; weight1_scale: (F,), from ``quantize_weight``. bias1: (F,).
        weight2_8: (D, F), float8_e4m3fn; weight2_scale: (D,), that of ``quantize_weight`` times hidden_scale, so that
            the second product is weight2_scale (h8 W8^T). bias2: (D,).
        hidden_scale: the largest |h| to represent / 448.
        eps: of the LayerNorm.

    Returns:
        (..., D) in x's dtype.

    Raises:
        TypeError: if a weight is not in e4m3, or x is in float8.
        RuntimeError: if a gradient is wanted.
    """
    fp8.check_operands(x, weight1_8, weight2_8)
    return _op(
        x,
        ln_weight,
        ln_bias,
        weight1_8,
        weight1_scale,
        bias1,
        weight2_8,
        weight2_scale,
        bias2,
        hidden_scale,
        eps,
    )

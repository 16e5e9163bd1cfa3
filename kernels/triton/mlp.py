"""x + s (W2 quick_gelu(W1 LN(x) + b1) + b2): the two GEMMs of ln_linear and linear_residual, one differentiable op.

Saved for backward: the row statistics of x and the pre-activation u. LN(x) and h = quick_gelu(u) are recomputed.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .gemm import gemm, rows_of
from .linear_residual import refuse_drop_gradient, scaled
from .ln_linear import linear_backward, project


def forward(
    save: bool,
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
    product: Callable[..., tuple[Tensor, ...]] = gemm,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    rows = rows_of(x)
    hidden, saved = project(rows, ln_weight, ln_bias, weight1, bias1, eps, True, save, product)
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    (y,) = product(hidden, weight2, bias=bias2.contiguous(), residual=rows, drop_scale=drop_scale)
    return (y.view(x.shape),), saved if save else ()


def backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    eps: float,
    drop_scale: Tensor | None,
    product: Callable[..., tuple[Tensor, ...]] = gemm,
) -> list[Tensor]:
    refuse_drop_gradient(needs[8])
    (mean, rstd, u), dy = saved, rows_of(grads[0])
    drop_scale = None if drop_scale is None else drop_scale.contiguous()
    dproduct, dbias2 = scaled(dy, weight2.dtype, drop_scale)
    # du = (s dy W2) quick_gelu'(u), and h = quick_gelu(u) for dW2 = (s dy)^T h
    du, *rest = product(dproduct, weight2.T, slope_at=u, keep=needs[5], sums=needs[4])
    dweight2 = torch.mm(dproduct.T, rest.pop(0)) if needs[5] else None
    result = linear_backward(du, rows_of(x), mean, rstd, ln_weight, ln_bias, weight1, eps, needs, past=dy)
    if needs[0]:
        result[0] = result[0].view(x.shape)
    if needs[4]:
        result.append(rest[0].to(bias1.dtype))
    if dweight2 is not None:
        result.append(dweight2)
    if needs[6]:
        result.append(dbias2.to(bias2.dtype))
    return result

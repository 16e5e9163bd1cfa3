"""LayerNorm of rows: a whole row in registers, statistics in float32 (mean, then the centred variance).

M rows of D channels. x may have any row stride; everything written is contiguous.
"""

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, next_power_of_2, processors, tile
from .gemm import rows_of


@triton.jit(do_not_specialize=["M"])
def _normalise_kernel(
    x_ptr,  # (M, D), rows x_row apart
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (M, D) or None: statistics alone
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    M,
    D,
    x_row,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D, a power of two
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    x = tl.load(x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
    mean = tl.sum(x, 1) / D
    off = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / D + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)
    if y_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        y = off * rstd[:, None] * weight + bias
        tl.store(y_ptr + rows[:, None].to(tl.int64) * D + columns[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M"])
def _backward_kernel(
    x_ptr,  # (M, D), rows x_row apart
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,) or None: with normed
    dy_ptr,  # (M, D), rows dy_row apart
    extra_ptr,  # (M, D), rows extra_row apart, or None: added to dx
    dx_ptr,  # (M, D)
    normed_ptr,  # (M, D) or None: the forward's result, recomputed
    part_dweight_ptr,  # (programs, D) float32
    part_dbias_ptr,  # (programs, D) float32
    M,
    D,
    x_row,
    dy_row,
    extra_row,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if normed_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & in_columns[None, :]
        wide = rows[:, None].to(tl.int64)
        mean = tl.load(mean_ptr + rows, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_ptr + rows, mask=rows < M, other=0.0)[:, None]
        x = tl.load(x_ptr + wide * x_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + wide * dy_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        x_hat = tl.where(inside, (x - mean) * rstd, 0.0)
        if normed_ptr is not None:
            normed = (x_hat * weight + bias).to(normed_ptr.dtype.element_ty)
            tl.store(normed_ptr + wide * D + columns[None, :], normed, mask=inside)
        # dgamma = sum dy x_hat, dbeta = sum dy
        dweight += tl.sum(dy * x_hat, 0)
        dbias += tl.sum(dy, 0)
        # dx = r (g - mean(g) - x_hat mean(g x_hat)), g = dy gamma
        g = dy * weight
        projection = tl.sum(g * x_hat, 1)[:, None] / D
        dx = rstd * (g - tl.sum(g, 1)[:, None] / D - x_hat * projection)
        if extra_ptr is not None:
            dx += tl.load(extra_ptr + wide * extra_row + columns[None, :], mask=inside, other=0.0).to(tl.float32)
        tl.store(dx_ptr + wide * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(part_dweight_ptr + at, dweight, mask=in_columns)
    tl.store(part_dbias_ptr + at, dbias, mask=in_columns)


def _normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None, statistics: bool
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    M, D = x.shape
    y = None if dtype is None else torch.empty(M, D, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) if statistics else None for _ in range(2))
    config = tile("layer_norm", x.device, d=D)
    grid = (cdiv(M, config["ROWS"]),)
    size = next_power_of_2(D)
    launch(_normalise_kernel, grid, x, weight, bias, y, mean, rstd, M, D, x.stride(0), eps, BLOCK_D=size, **config)
    return y, mean, rstd


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of x (M, D), any row stride: (M,) float32 each."""
    _, mean, rstd = _normalise(x, None, None, eps, None, True)
    assert mean is not None
    assert rstd is not None
    return mean, rstd


def normalise(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, statistics: bool = False
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """LN(x) of x (M, D), any row stride, in ``dtype``; with its mean and rstd if ``statistics``."""
    y, mean, rstd = _normalise(x, weight, bias, eps, dtype, statistics)
    assert y is not None
    return y, mean, rstd


def normalise_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    extra: Tensor | None = None,
    bias: Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """The gradients of LN(x) in one pass over dy and x (M, D), any row strides.

    Args:
        mean, rstd: of x's rows, as the forward saved them.
        extra: (M, D), added to dx: the gradient that reaches x past the LayerNorm.
        bias, normed_dtype: given, LN(x) is recomputed in that dtype on the way.

    Returns:
        dx (M, D) in x's dtype, dweight and dbias (D,) float32, LN(x) or None.
    """
    M, D = x.shape
    dx = torch.empty(M, D, dtype=x.dtype, device=x.device)
    normed = None if normed_dtype is None else torch.empty(M, D, dtype=normed_dtype, device=x.device)
    config = tile("layer_norm_backward", x.device, d=D)
    programs = min(cdiv(M, config["ROWS"]), config["OCCUPANCY"] * processors(x.device))
    parts = torch.empty(2, programs, D, dtype=torch.float32, device=x.device)
    launch(
        _backward_kernel,
        (programs,),
        x,
        mean,
        rstd,
        weight,
        None if normed is None else bias,
        dy,
        extra,
        dx,
        normed,
        parts[0],
        parts[1],
        M,
        D,
        x.stride(0),
        dy.stride(0),
        0 if extra is None else extra.stride(0),
        BLOCK_D=next_power_of_2(D),
        **{name: value for name, value in config.items() if name != "OCCUPANCY"},
    )
    dweight, dbias = parts.sum(1)
    return dx, dweight, dbias, normed


def forward(
    save: bool, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    y, mean, rstd = normalise(rows_of(x), weight.contiguous(), bias.contiguous(), eps, x.dtype, save)
    saved = () if mean is None or rstd is None else (mean, rstd)
    return (y.view(x.shape),), saved


def backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
) -> list[Tensor]:
    mean, rstd = saved
    dx, dweight, dbias, _ = normalise_backward(rows_of(grads[0]), rows_of(x), mean, rstd, weight.contiguous())
    result = (dx.view(x.shape), dweight.to(weight.dtype), dbias.to(bias.dtype))
    return [gradient for gradient, need in zip(result, needs, strict=False) if need]

"""LayerNorm of rows, with what a block has to do to its residual stream in the same pass: a branch, or positions, are
added before it. triton_backward.py has its gradients.

M rows of D channels, a whole row in registers, statistics in float32 (mean, then the centered variance). x may have any
row stride; everything written is contiguous.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launching import Prepared, cdiv, next_power_of_2, prepared, tile
from ..triton.rows import Spare, frames_of, layout_of, load_rows, rows_of, rows_of_sample, spare_arguments
from .triton_backward import normalize_backward


@triton.jit(do_not_specialize=["M", "sample_rows"])
def layer_norm_fwd_kernel(
    x_ptr,  # (M, D), rows x_row apart; with x_gap, that much more after every ``length`` rows
    product_ptr,  # (M, D) or None: x is x + s (product + product_bias), and written to z
    product_bias_ptr,  # (D,), with product
    drop_ptr,  # (M / sample_rows,) or None: s
    later_ptr,  # (D,) or None: added to what is written to z, and not to what is normalized
    z_ptr,  # (M, D), with product; or None, with position
    position_ptr,  # (positions, D) or None: added to x, row i in row i of every ``length`` rows; x is written to z
    first_ptr,  # (D,), with position: added in the first of every ``length`` rows
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (M, D) or None: no LayerNorm of it
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    spare_ptr,  # (M / length, D) or None: takes the place of x in the last of every ``length`` rows
    spare_mean_ptr,  # (M / length,) float32, with mean and spare
    spare_rstd_ptr,  # (M / length,) float32, with mean and spare
    M,
    D,
    x_row,
    x_gap,
    length,
    positions,
    sample_rows,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= D, a power of two
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < D)[None, :]
    x = load_rows(x_ptr, x_row, x_gap, spare_ptr, rows, columns, inside, D, length)
    at = rows[:, None].to(tl.int64) * D + columns[None, :]
    if product_ptr is not None:
        product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
        product += tl.load(product_bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        if drop_ptr is not None:
            product *= tl.load(drop_ptr + rows // sample_rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        x += product
    if position_ptr is not None:
        token = (rows % length)[:, None]
        position_at = position_ptr + token * D + columns[None, :]
        x += tl.load(position_at, mask=inside & (token < positions), other=0.0).to(tl.float32)
        first = tl.load(first_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        x += tl.where(token == 0, first, 0.0)
    if z_ptr is not None:
        z = x.to(z_ptr.dtype.element_ty)
        x = z.to(tl.float32)  # as stored
        if later_ptr is not None:
            later = tl.load(later_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
            z = (x + later).to(z_ptr.dtype.element_ty)
        tl.store(z_ptr + at, z, mask=inside)
    mean = tl.sum(x, 1) / D
    off = tl.where(inside, x - mean[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(off * off, 1) / D + eps)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, rstd, mask=rows < M)
        if spare_ptr is not None:
            is_spare = (rows < M) & (rows % length == length - 1)
            tl.store(spare_mean_ptr + rows // length, mean, mask=is_spare)
            tl.store(spare_rstd_ptr + rows // length, rstd, mask=is_spare)
    if y_ptr is not None:
        weight = tl.load(weight_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        bias = tl.load(bias_ptr + columns, mask=columns < D, other=0.0).to(tl.float32)[None, :]
        y = off * rstd[:, None] * weight + bias
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


class Branch(NamedTuple):
    """What is added to the residual stream: s (product + bias)."""

    product: Tensor  # (M, D), contiguous
    bias: Tensor  # (D,)
    drop_scale: Tensor | None = None  # (B,), M a multiple of B: s of each sample
    later: Tensor | None = None  # (D,): added to the result behind the LayerNorm


_NO_BRANCH = (None,) * 4


class Positions(NamedTuple):
    """What is added to each of the sequences of equal length that x holds."""

    rows: Tensor  # (L, D), contiguous: row i is added to row i of every sequence
    first: Tensor  # (D,): added to row 0 of every sequence
    length: int  # rows of a sequence, L or more


@prepared
def _forward(
    device: torch.device,
    size: int,
    M: int,
    D: int,
    x_row: int,
    x_gap: int | None,
    length: int,
    positions: int,
    sample_rows: int,
    eps: float,
) -> Prepared:
    """For rows of numbers of ``size`` bytes."""
    config = tile("layer_norm", device, d=D, rows=M, bytes=size)
    numbers = (M, D, x_row, x_gap, length, positions, sample_rows, eps)
    grid = (cdiv(M, config["ROWS"]),)
    return Prepared(device, layer_norm_fwd_kernel, grid, numbers, BLOCK_D=next_power_of_2(D), **config)


def normalize(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    dtype: torch.dtype | None,
    statistics: bool = False,
    branch: Branch | None = None,
    spare: Spare | None = None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One pass over x (M, D) or (F, N, D), any row stride; M = F N.

    Args:
        dtype: of LN(x); None: not wanted.
        statistics: the mean and 1 / sqrt(variance + eps) of each row are wanted.
        branch: added to x first.
        spare: takes the place of rows of x (M, D).
        positions: added to x (M, D) first, in ``dtype``, without a branch. The sum is written if statistics are wanted.

    Returns:
        x, or what was added to it with it, in x's or the positions' dtype (M, D); LN of it (M, D); mean and rstd (M,)
        float32; None for what is not wanted.
    """
    D, device, stored = x.shape[-1], x.device, x.dtype
    M, x_row, x_gap, length = layout_of(x)
    product, product_bias, drop_scale, later = branch or _NO_BRANCH
    spares, length = spare_arguments(spare, M, length)
    position = first = z = y = mean = rstd = None
    count = 0
    if positions is not None:
        (position, first, length), stored = positions, dtype or stored
        count = len(position)
    if branch is not None or (positions is not None and statistics):
        z = torch.empty(M, D, dtype=stored, device=device)
    if dtype is not None:
        y = torch.empty(M, D, dtype=dtype, device=device)
    if statistics:
        mean = torch.empty(M, dtype=torch.float32, device=device)
        rstd = torch.empty_like(mean)
    sample_rows = rows_of_sample(M, drop_scale)
    run = _forward(device, x.dtype.itemsize, M, D, x_row, x_gap, length, count, sample_rows, eps)
    added = product, product_bias, drop_scale, later, z, position, first
    run(x, *added, weight, bias, y, mean, rstd, *spares)
    return x if z is None else z, y, mean, rstd


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of x (M, D), any row stride: (M,) float32 each."""
    _, _, mean, rstd = normalize(x, None, None, eps, None, True)
    assert mean is not None
    assert rstd is not None
    return mean, rstd


def forward(
    save: bool, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    _, y, mean, rstd = normalize(frames_of(x), weight.contiguous(), bias.contiguous(), eps, x.dtype, save)
    assert y is not None
    saved = () if mean is None or rstd is None else (mean, rstd)
    return (y.view_as(x),), saved


def backward(grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[Any], *args: Any) -> list[Tensor]:
    (mean, rstd), (x, weight, bias, _) = saved, args
    dx, dweight, dbias, *_ = normalize_backward(rows_of(grads[0]), frames_of(x), mean, rstd, weight.contiguous())
    result = (dx.view(x.shape), dweight.to(weight.dtype), dbias.to(bias.dtype))
    return [gradient for gradient, need in zip(result, needs, strict=False) if need]

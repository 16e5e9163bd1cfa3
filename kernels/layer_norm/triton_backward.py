"""Backward of LayerNorm in one pass, with what a block has to do to its gradient: the gradient past the branch is
added, a copy in the products' dtype is written, and its columns are summed. Letters as in triton.py.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.launching import Prepared, cdiv, next_power_of_2, prepared, processors, tile
from ..triton.rows import Spare, layout_of, load_rows, rows_of_sample, spare_arguments


@triton.jit(do_not_specialize=["M", "sample_rows"])
def layer_norm_bwd_kernel(
    x_ptr,  # (M, D), rows x_row apart; with x_gap, that much more after every ``length`` rows
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,) or None: with normed
    dy_ptr,  # (M, D), rows dy_row apart
    extra_ptr,  # (M, D), rows extra_row apart, or None: added to dx
    dx_ptr,  # (M, D): with spare, 0 in the rows that it replaces
    normed_ptr,  # (M, D) or None: the forward's result, recomputed
    spare_ptr,  # (M / length, D) or None: takes the place of x in the last of every ``length`` rows
    spare_mean_ptr,  # (M / length,), with spare
    spare_rstd_ptr,  # (M / length,), with spare
    drop_ptr,  # (M / sample_rows,) or None: s
    low_ptr,  # (M, D) or None: s dx
    part_dweight_ptr,  # (programs, D) float32
    part_dbias_ptr,  # (programs, D) float32
    part_low_ptr,  # (programs, D) float32 or None: column sums of s dx
    M,
    D,
    x_row,
    x_gap,
    dy_row,
    extra_row,
    length,
    sample_rows,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    STAGES: tl.constexpr,  # blocks of rows that are being loaded or worked on
):
    columns = tl.arange(0, BLOCK_D)
    in_columns = columns < D
    weight = tl.load(weight_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    if normed_ptr is not None:
        bias = tl.load(bias_ptr + columns, mask=in_columns, other=0.0).to(tl.float32)[None, :]
    dweight = tl.zeros((BLOCK_D,), dtype=tl.float32)
    dbias = tl.zeros((BLOCK_D,), dtype=tl.float32)
    if part_low_ptr is not None:
        low_sums = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & in_columns[None, :]
        wide = rows[:, None].to(tl.int64)
        mean_at, rstd_at = mean_ptr + rows, rstd_ptr + rows
        if spare_ptr is not None:
            is_spare = rows % length == length - 1
            mean_at = tl.where(is_spare, spare_mean_ptr + rows // length, mean_at)
            rstd_at = tl.where(is_spare, spare_rstd_ptr + rows // length, rstd_at)
        mean = tl.load(mean_at, mask=rows < M, other=0.0)[:, None]
        rstd = tl.load(rstd_at, mask=rows < M, other=0.0)[:, None]
        x = load_rows(x_ptr, x_row, x_gap, spare_ptr, rows, columns, inside, D, length)
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
        if spare_ptr is not None:
            dx = tl.where(is_spare[:, None], 0.0, dx)
        tl.store(dx_ptr + wide * D + columns[None, :], dx.to(dx_ptr.dtype.element_ty), mask=inside)
        if drop_ptr is not None:
            dx *= tl.load(drop_ptr + rows // sample_rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        if low_ptr is not None:
            tl.store(low_ptr + wide * D + columns[None, :], dx.to(low_ptr.dtype.element_ty), mask=inside)
        if part_low_ptr is not None:
            low_sums += tl.sum(tl.where(inside, dx, 0.0), 0)
    at = tl.program_id(0).to(tl.int64) * D + columns
    tl.store(part_dweight_ptr + at, dweight, mask=in_columns)
    tl.store(part_dbias_ptr + at, dbias, mask=in_columns)
    if part_low_ptr is not None:
        tl.store(part_low_ptr + at, low_sums, mask=in_columns)


@prepared
def _backward(
    device: torch.device,
    M: int,
    D: int,
    x_row: int,
    x_gap: int | None,
    dy_row: int,
    extra_row: int,
    length: int,
    sample_rows: int,
) -> Prepared:
    config = dict(tile("layer_norm_backward", device, d=D))
    grid = (min(cdiv(M, config["ROWS"]), config.pop("OCCUPANCY") * processors(device)),)
    numbers = (M, D, x_row, x_gap, dy_row, extra_row, length, sample_rows)
    return Prepared(device, layer_norm_bwd_kernel, grid, numbers, BLOCK_D=next_power_of_2(D), **config)


class LayerNormGrads(NamedTuple):
    """What ``normalize_backward`` writes; None for what was not wanted."""

    dx: Tensor  # (M, D), in x's dtype
    dweight: Tensor  # (D,), in float32
    dbias: Tensor  # (D,), too
    normed: Tensor | None  # (M, D): LN(x)
    low: Tensor | None  # (M, D): s dx in the products' dtype
    sums: Tensor | None  # (D,), too: the column sums of s dx


def normalize_backward(
    dy: Tensor,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    *,
    bias: Tensor | None = None,
    normed_dtype: torch.dtype | None = None,
    extra: Tensor | None = None,
    spare: Spare | None = None,
    drop_scale: Tensor | None = None,
    low_dtype: torch.dtype | None = None,
) -> LayerNormGrads:
    """The gradients of LN(x) in one pass over dy (M, D) and x (M, D) or (F, N, D), any row strides; M = F N.

    Args:
        mean, rstd: of x's rows, as the forward saved them.
        bias, normed_dtype: given, LN(x) is recomputed in that dtype on the way.
        extra: (M, D), added to dx: the gradient that reaches x past the LayerNorm.
        spare: took the place of rows of x, whose gradient is 0; it adds to that of the parameters, and has none itself.
        drop_scale, low_dtype: given low_dtype, s dx is written in that dtype (unless that is dx itself) and its columns
            are summed: the gradient of the branch that was added to x.
    """
    D, (M, x_row, x_gap, length) = x.shape[-1], layout_of(x)
    dx = torch.empty(M, D, dtype=x.dtype, device=x.device)
    normed = None if normed_dtype is None else torch.empty(M, D, dtype=normed_dtype, device=x.device)
    same = drop_scale is None and low_dtype == x.dtype
    low = None if low_dtype is None or same else torch.empty(M, D, dtype=low_dtype, device=x.device)
    spares, length = spare_arguments(spare, M, length)
    extra_row = 0 if extra is None else extra.stride(0)
    strides = (x_row, x_gap, dy.stride(0), extra_row)
    run = _backward(x.device, M, D, *strides, length, rows_of_sample(M, drop_scale))
    parts = torch.empty(2 if low_dtype is None else 3, *run.grid, D, dtype=torch.float32, device=x.device)
    read = (x, mean, rstd, weight, None if normed is None else bias, dy, extra)
    run(*read, dx, normed, *spares, drop_scale, low, *(*parts, None)[:3])
    dweight, dbias, *sums = parts.sum(1)
    return LayerNormGrads(dx, dweight, dbias, normed, dx if same else low, sums[0] if sums else None)

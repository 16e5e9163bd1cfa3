"""LayerNorm of rows, with what a block has to do to its residual stream in the same pass: the branch added before it,
and in backward the gradient past the branch, its copy in the products' dtype and the sums of its columns.

M rows of D channels, a whole row in registers, statistics in float32 (mean, then the centered variance). x may have any
row stride; everything written is contiguous.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..triton.gemm import rows_of
from ..triton.launching import Prepared, cdiv, next_power_of_2, prepared, processors, tile


@triton.jit
def saturate(value):
    """What e4m3 cannot hold becomes its largest, 448."""
    return tl.minimum(tl.maximum(value, -448.0), 448.0)


@triton.jit
def _load_rows(x_ptr, x_row, spare_ptr, rows, columns, inside, D, length):
    """rows of x, but of ``spare`` in the last of every ``length`` rows, if it is given; float32"""
    x_at = x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :]
    if spare_ptr is None:
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    else:
        is_spare = (rows % length == length - 1)[:, None]
        spare_at = spare_ptr + (rows // length)[:, None].to(tl.int64) * D + columns[None, :]
        x = tl.load(x_at, mask=inside & ~is_spare, other=0.0).to(tl.float32)
        x += tl.load(spare_at, mask=inside & is_spare, other=0.0).to(tl.float32)
    return x


@triton.jit(do_not_specialize=["M", "sample_rows"])
def layer_norm_fwd_kernel(
    x_ptr,  # (M, D), rows x_row apart
    product_ptr,  # (M, D) or None: x is x + s (product + product_bias), and written to z
    product_bias_ptr,  # (D,) or None
    drop_ptr,  # (M / sample_rows,) or None: s
    later_ptr,  # (D,) or None: added to what is written to z, and not to what is normalized
    z_ptr,  # (M, D), with product; or None, with position
    position_ptr,  # (positions, D) or None: added to x, row i in row i of every ``length`` rows; x is written to z
    first_ptr,  # (D,), with position: added in the first of every ``length`` rows
    weight_ptr,  # (D,)
    bias_ptr,  # (D,)
    y_ptr,  # (M, D) or None: no LayerNorm of it
    scale_ptr,  # (M,) float32 or None: y is in e4m3, over the row's largest value / 448, which is written here
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    spare_ptr,  # (M / length, D) or None: takes the place of x in the last of every ``length`` rows
    spare_mean_ptr,  # (M / length,) float32, with mean and spare
    spare_rstd_ptr,  # (M / length,) float32, with mean and spare
    M,
    D,
    x_row,
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
    x = _load_rows(x_ptr, x_row, spare_ptr, rows, columns, inside, D, length)
    at = rows[:, None].to(tl.int64) * D + columns[None, :]
    if product_ptr is not None:
        product = tl.load(product_ptr + at, mask=inside, other=0.0).to(tl.float32)
        if product_bias_ptr is not None:
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
        if scale_ptr is not None:
            largest = tl.max(tl.where(inside, tl.abs(y), 0.0), 1)
            scale = tl.where(largest == 0.0, 1.0, largest / 448.0)
            y = saturate(tl.div_rn(y, scale[:, None]))
            tl.store(scale_ptr + rows, scale, mask=rows < M)
        tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["M", "sample_rows"])
def layer_norm_bwd_kernel(
    x_ptr,  # (M, D), rows x_row apart
    mean_ptr,  # (M,)
    rstd_ptr,  # (M,)
    weight_ptr,  # (D,)
    bias_ptr,  # (D,) or None: with normed
    dy_ptr,  # (M, D), rows dy_row apart
    extra_ptr,  # (M, D), rows extra_row apart, or None: added to dx
    dx_ptr,  # (M, D)
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
        x = _load_rows(x_ptr, x_row, spare_ptr, rows, columns, inside, D, length)
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


class Branch(NamedTuple):
    """What is added to the residual stream: s (product + bias)."""

    product: Tensor  # (M, D), contiguous
    bias: Tensor | None = None  # (D,)
    drop_scale: Tensor | None = None  # (B,), M a multiple of B: s of each sample
    later: Tensor | None = None  # (D,): added to the result behind the LayerNorm


class Positions(NamedTuple):
    """What is added to each of the sequences of equal length that x holds."""

    rows: Tensor  # (L, D), contiguous: row i is added to row i of every sequence
    first: Tensor  # (D,): added to row 0 of every sequence
    length: int  # rows of a sequence, L or more


class Spare(NamedTuple):
    """What takes the place of x's row in the last row of each of F sequences of equal length."""

    rows: Tensor  # (F, D), contiguous
    mean: Tensor | None  # (F,) float32, of these rows; forward writes them where statistics are wanted
    rstd: Tensor | None


def _spare(spare: Spare | None, rows: int) -> tuple[tuple[Tensor | None, ...], int]:
    """The kernels' three arguments, and the rows of a sequence."""
    return ((None,) * 3, 1) if spare is None else (tuple(spare), rows // spare.rows.shape[0])


@prepared
def _forward(
    device: torch.device,
    size: int,
    M: int,
    D: int,
    x_row: int,
    length: int,
    positions: int,
    sample_rows: int,
    eps: float,
) -> Prepared:
    """For rows of numbers of ``size`` bytes."""
    config = tile("layer_norm", device, d=D, rows=M, bytes=size)
    numbers = (M, D, x_row, length, positions, sample_rows, eps)
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
    scale: Tensor | None = None,
    positions: Positions | None = None,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """One pass over x (M, D), any row stride.

    Args:
        dtype: of LN(x); None: not wanted.
        statistics: the mean and 1 / sqrt(variance + eps) of each row are wanted.
        branch: added to x first.
        spare: takes the place of rows of x.
        scale: (M,) float32, for the dtype e4m3: written, what each row of LN(x) was divided by.
        positions: added to x first, in ``dtype``, and without a branch. The sum is written if statistics are wanted.

    Returns:
        x, or what was added to it with it, in x's or the positions' dtype (M, D); LN of it (M, D); mean and rstd (M,)
        float32; None for what is not wanted.
    """
    M, D = x.shape
    z = None
    if branch is not None or (positions is not None and statistics):
        z = torch.empty(M, D, dtype=x.dtype if positions is None else dtype, device=x.device)
    y = None if dtype is None else torch.empty(M, D, dtype=dtype, device=x.device)
    mean, rstd = (torch.empty(M, dtype=torch.float32, device=x.device) if statistics else None for _ in range(2))
    spares, length = _spare(spare, M)
    position, first, length = positions or (None, None, length)
    count, sample_rows = 0 if position is None else len(position), _sample_rows(M, branch and branch.drop_scale)
    run = _forward(x.device, x.element_size(), M, D, x.stride(0), length, count, sample_rows, eps)
    added = (*(branch or (None,) * 4), z, position, first)
    run(x, *added, weight, bias, y, scale, mean, rstd, *spares)
    return x if z is None else z, y, mean, rstd


def row_statistics(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Mean and 1 / sqrt(variance + eps) of each row of x (M, D), any row stride: (M,) float32 each."""
    _, _, mean, rstd = normalize(x, None, None, eps, None, True)
    assert mean is not None
    assert rstd is not None
    return mean, rstd


def _sample_rows(rows: int, drop_scale: Tensor | None) -> int:
    return 1 if drop_scale is None else rows // max(drop_scale.shape[0], 1)


@prepared
def _backward(
    device: torch.device, M: int, D: int, x_row: int, dy_row: int, extra_row: int, length: int, sample_rows: int
) -> Prepared:
    config = dict(tile("layer_norm_backward", device, d=D))
    grid = (min(cdiv(M, config["ROWS"]), config.pop("OCCUPANCY") * processors(device)),)
    numbers = (M, D, x_row, dy_row, extra_row, length, sample_rows)
    return Prepared(device, layer_norm_bwd_kernel, grid, numbers, BLOCK_D=next_power_of_2(D), **config)


class LayerNormGrads(NamedTuple):
    """What ``normalize_backward`` writes; None for what was not wanted."""

    dx: Tensor  # (M, D), in x's dtype
    dweight: Tensor  # (D,), in the weight's dtype
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
    """The gradients of LN(x) in one pass over dy and x (M, D), any row strides.

    Args:
        mean, rstd: of x's rows, as the forward saved them.
        bias, normed_dtype: given, LN(x) is recomputed in that dtype on the way.
        extra: (M, D), added to dx: the gradient that reaches x past the LayerNorm.
        spare: took the place of rows of x; the gradient of these stands in their place in dx.
        drop_scale, low_dtype: given low_dtype, s dx is written in that dtype (unless that is dx itself) and its columns
            are summed: the gradient of the branch that was added to x.
    """
    M, D = x.shape
    dx = torch.empty(M, D, dtype=x.dtype, device=x.device)
    normed = None if normed_dtype is None else torch.empty(M, D, dtype=normed_dtype, device=x.device)
    same = drop_scale is None and low_dtype == x.dtype
    low = None if low_dtype is None or same else torch.empty(M, D, dtype=low_dtype, device=x.device)
    spares, length = _spare(spare, M)
    extra_row = 0 if extra is None else extra.stride(0)
    strides = (x.stride(0), dy.stride(0), extra_row)
    run = _backward(x.device, M, D, *strides, length, _sample_rows(M, drop_scale))
    parts = torch.empty(2 if low_dtype is None else 3, *run.grid, D, dtype=torch.float32, device=x.device)
    read = (x, mean, rstd, weight, None if normed is None else bias, dy, extra)
    run(*read, dx, normed, *spares, drop_scale, low, *(*parts, None)[:3])
    dweight, dbias, *sums = parts.sum(1).to(weight.dtype)
    return LayerNormGrads(dx, dweight, dbias, normed, dx if same else low, sums[0] if sums else None)


def layer_norm_fp8(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """LN(x) of x (M, D) in e4m3, contiguous, each row over its scale, and the scales (M,) float32."""
    x = rows_of(x)
    scale = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _, y, *_ = normalize(x, weight.contiguous(), bias.contiguous(), eps, torch.float8_e4m3fn, scale=scale)
    assert y is not None
    return y, scale


def forward(
    save: bool, x: Tensor, weight: Tensor, bias: Tensor, eps: float
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    _, y, mean, rstd = normalize(rows_of(x), weight.contiguous(), bias.contiguous(), eps, x.dtype, save)
    assert y is not None
    saved = () if mean is None or rstd is None else (mean, rstd)
    return (y.view(x.shape),), saved


def backward(grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[Any], *args: Any) -> list[Tensor]:
    (mean, rstd), (x, weight, bias, _) = saved, args
    dx, dweight, dbias, *_ = normalize_backward(rows_of(grads[0]), rows_of(x), mean, rstd, weight.contiguous())
    result = (dx.view(x.shape), dweight.to(weight.dtype), dbias.to(bias.dtype))
    return [gradient for gradient, need in zip(result, needs, strict=False) if need]

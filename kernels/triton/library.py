"""y = epilogue(a b^T) with the product by torch's library (cuBLAS), and the epilogue as one pass over its result.

The bias rides in the library's own epilogue; quick_gelu, its slope, drop path, residual and row statistics do not, so
one kernel does what is wanted of them. ``torch.addmm(residual, ...)`` would save nothing: it copies the residual into
the result first, and has no room for the bias.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .._linear import linear
from ._launch import cdiv, launch, next_power_of_2, tile
from .linear_residual import scaled
from .quick_gelu import quick_gelu_rows


@triton.jit(do_not_specialize=["M", "sample_rows"])
def _add_kernel(
    x_ptr,  # (M, N)
    drop_ptr,  # (M / sample_rows,) or None
    residual_ptr,  # (M, N), rows residual_row apart
    y_ptr,  # (M, N)
    mean_ptr,  # (M,) float32 or None: not wanted
    rstd_ptr,  # (M,) float32, with mean
    M,
    N,
    residual_row,
    sample_rows,
    eps,
    ROWS: tl.constexpr,
    BLOCK_D: tl.constexpr,  # >= N, a power of two
):
    """y = residual + s x, with the mean and 1 / sqrt(variance + eps) of its rows as stored"""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK_D)
    inside = (rows < M)[:, None] & (columns < N)[None, :]
    at = rows[:, None].to(tl.int64) * N + columns[None, :]
    value = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if drop_ptr is not None:
        value *= tl.load(drop_ptr + rows // sample_rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
    residual_at = residual_ptr + rows[:, None].to(tl.int64) * residual_row + columns[None, :]
    value += tl.load(residual_at, mask=inside, other=0.0).to(tl.float32)
    y = value.to(y_ptr.dtype.element_ty)
    tl.store(y_ptr + at, y, mask=inside)
    if mean_ptr is not None:
        stored = y.to(tl.float32)
        mean = tl.sum(stored, 1) / N
        off = tl.where(inside, stored - mean[:, None], 0.0)
        tl.store(mean_ptr + rows, mean, mask=rows < M)
        tl.store(rstd_ptr + rows, 1.0 / tl.sqrt(tl.sum(off * off, 1) / N + eps), mask=rows < M)


def _add(x: Tensor, residual: Tensor, drop_scale: Tensor | None, statistics_eps: float | None) -> list[Tensor]:
    """residual + s x (M, N), contiguous, in the promoted dtype, and its rows' mean and rstd if an eps is given."""
    M, N = x.shape
    y = torch.empty(M, N, dtype=torch.promote_types(x.dtype, residual.dtype), device=x.device)
    found = [] if statistics_eps is None else [torch.empty(M, dtype=torch.float32, device=x.device) for _ in range(2)]
    config = tile("layer_norm", x.device, d=N)
    sample_rows = 1 if drop_scale is None else M // max(drop_scale.shape[0], 1)
    numbers = (M, N, residual.stride(0), sample_rows, statistics_eps or 0.0)
    grid, statistics = (cdiv(M, config["ROWS"]),), found or (None, None)
    size = next_power_of_2(N)
    launch(_add_kernel, grid, x, drop_scale, residual, y, *statistics, *numbers, BLOCK_D=size, **config)
    return [y, *found]


def product(
    a: Tensor,
    b: Tensor,
    *,
    bias: Tensor | None = None,
    activation: bool = False,
    slope_at: Tensor | None = None,
    keep: bool = False,
    drop_scale: Tensor | None = None,
    residual: Tensor | None = None,
    statistics_eps: float | None = None,
    sums: bool = False,
) -> tuple[Tensor, ...]:
    """y = residual + s act(a b^T + bias): arguments and results as those of ``gemm.gemm``."""
    y = linear(a, b, None if bias is None else bias.to(a.dtype))
    if slope_at is not None:
        h = torch.empty_like(y) if keep else None
        du, column_sums = scaled(y, a.dtype, slope_at=slope_at, gelu=h)
        return du, *(() if h is None else (h,)), *((column_sums,) if sums else ())
    if activation:
        return quick_gelu_rows(y), *((y,) if keep else ())
    return (y,) if residual is None else tuple(_add(y, residual, drop_scale, statistics_eps))

"""Rows times a factor each, or the slope of quick_gelu, and the sums of their columns, in one pass."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import quick_gelu_slope, quick_gelu_value
from .launching import cdiv, launch, tile


@triton.jit(do_not_specialize=["M", "sample_rows"])
def column_sums_kernel(
    x_ptr,  # (M, N), rows x_row apart
    u_ptr,  # (M, N) or None: scale by the slope of quick_gelu there
    drop_ptr,  # (M / sample_rows,) or None: scale by each sample's factor
    y_ptr,  # (M, N) or None: the scaled x
    h_ptr,  # (M, N) or None: quick_gelu(u)
    parts_ptr,  # (groups, N) float32: column sums of the scaled x, a group of rows each
    M,
    N,
    x_row,
    sample_rows,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0)):
        rows = block * ROWS + tl.arange(0, ROWS)
        inside = (rows < M)[:, None] & (columns < N)[None, :]
        at = rows[:, None].to(tl.int64) * N + columns[None, :]
        x_at = x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :]
        value = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
        if u_ptr is not None:
            u = tl.load(u_ptr + at, mask=inside, other=0.0).to(tl.float32)
            value *= quick_gelu_slope(u)
            if h_ptr is not None:
                tl.store(h_ptr + at, quick_gelu_value(u).to(h_ptr.dtype.element_ty), mask=inside)
        if drop_ptr is not None:
            value *= tl.load(drop_ptr + rows // sample_rows, mask=rows < M, other=0.0).to(tl.float32)[:, None]
        if y_ptr is not None:
            tl.store(y_ptr + at, value.to(y_ptr.dtype.element_ty), mask=inside)
        total += tl.sum(value, 0)
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * N + columns, total, mask=columns < N)


GROUPS = 128  # of rows in a column sum: fixed, so that the order of the additions is


def scaled(
    x: Tensor,
    dtype: torch.dtype,
    drop_scale: Tensor | None = None,
    slope_at: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (M, N) times its drop path factors and the slope of quick_gelu at slope_at (M, N), and its column sums.

    Returns:
        the product (M, N) in ``dtype`` (x itself if nothing changes it); its sums (N,) float32, always added in the
        same order; quick_gelu(slope_at) (M, N) if ``keep``.
    """
    M, N = x.shape
    changes = drop_scale is not None or slope_at is not None or x.dtype != dtype
    y = torch.empty(M, N, dtype=dtype, device=x.device) if changes else None
    h = torch.empty(M, N, dtype=dtype, device=x.device) if keep else None
    config = tile("column_sums", x.device, n=N)
    groups = min(GROUPS, cdiv(M, config["ROWS"]))
    parts = torch.empty(groups, N, dtype=torch.float32, device=x.device)
    sample_rows = 1 if drop_scale is None else M // max(drop_scale.shape[0], 1)
    grid = (groups, cdiv(N, config["BLOCK_N"]))
    launch(column_sums_kernel, grid, x, slope_at, drop_scale, y, h, parts, M, N, x.stride(0), sample_rows, **config)
    return x if y is None else y, parts.sum(0), h

"""Rows times a factor each, or the slope of quick_gelu, and the sums of their columns, in one pass."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .activation import quick_gelu_slope, quick_gelu_value
from .launching import Prepared, cdiv, prepared, processors, tile
from .rows import rows_of_sample


@triton.jit(do_not_specialize=["M", "sample_rows"])
def column_sums_kernel(
    x_ptr,  # (M, N), rows x_row apart
    u_ptr,  # (M, N) or None: scale by the slope of quick_gelu there
    drop_ptr,  # (M / sample_rows,) or None: scale by each sample's factor
    y_ptr,  # (M, N) or None: the scaled x
    h_ptr,  # (M, N) or None: quick_gelu(u)
    parts_ptr,  # (groups, N): column sums of the scaled x, a group of rows each
    M,
    N,
    x_row,
    sample_rows,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,  # blocks of rows that are being loaded or worked on
):
    columns = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    total = tl.zeros((ROWS, BLOCK_N), dtype=tl.float32)  # added up at the end: between warps it goes by shared memory
    for block in tl.range(tl.program_id(0), tl.cdiv(M, ROWS), tl.num_programs(0), num_stages=STAGES):
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
        total += value
    tl.store(parts_ptr + tl.program_id(0).to(tl.int64) * N + columns, tl.sum(total, 0), mask=columns < N)


ONE_STAGE = 2048  # rows up to which one program sums all of a column


class _Launches(NamedTuple):
    """What a sum launches."""

    first: Prepared
    groups: int  # of rows
    last: Prepared | None  # adds the sums of the groups


@prepared
def _prepare(device: torch.device, M: int, N: int, x_row: int, sample_rows: int) -> _Launches:
    if M <= ONE_STAGE:
        return _Launches(_whole(device, M, N, x_row, sample_rows), 1, None)
    config = dict(tile("column_sums", device, n=N))
    programs, blocks = config.pop("OCCUPANCY") * processors(device), cdiv(N, config["BLOCK_N"])
    groups = max(1, min(cdiv(M, config["ROWS"]), programs // blocks))
    first = Prepared(device, column_sums_kernel, (groups, blocks), (M, N, x_row, sample_rows), **config)
    return _Launches(first, groups, _whole(device, groups, N, N, 1))


def _whole(device: torch.device, M: int, N: int, x_row: int, sample_rows: int) -> Prepared:
    """One program for all rows of its columns."""
    config = tile("column_sums_whole", device, n=N)
    grid = (min(M, 1), cdiv(N, config["BLOCK_N"]))
    return Prepared(device, column_sums_kernel, grid, (M, N, x_row, sample_rows), **config)


def scaled(
    x: Tensor,
    dtype: torch.dtype,
    drop_scale: Tensor | None = None,
    slope_at: Tensor | None = None,
    keep: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """x (M, N) times its drop path factors and the slope of quick_gelu at slope_at (M, N), and its column sums.

    Returns:
        the product (M, N) in ``dtype`` (x itself if nothing changes it); its sums (N,) in float32, on one device
        always added in the same order; quick_gelu(slope_at) (M, N) if ``keep``.
    """
    (M, N), device = x.shape, x.device
    changes = drop_scale is not None or slope_at is not None or x.dtype != dtype
    y = torch.empty(M, N, dtype=dtype, device=device) if changes else None
    h = torch.empty(M, N, dtype=dtype, device=device) if keep else None
    first, groups, last = _prepare(device, M, N, x.stride(0), rows_of_sample(M, drop_scale))
    sums = (torch.empty if M else torch.zeros)(N, dtype=torch.float32, device=device)
    if last is None:
        first(x, slope_at, drop_scale, y, h, sums)
    else:
        parts = torch.empty(groups, N, dtype=torch.float32, device=device)
        first(x, slope_at, drop_scale, y, h, parts)
        last(parts, None, None, None, None, sums)
    return x if y is None else y, sums, h

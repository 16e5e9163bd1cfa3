"""residual + s (x W^T + b): everything but the product rides in the GEMM's epilogue."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ._launch import cdiv, launch, tile
from .gemm import gemm, rows_of
from .quick_gelu import quick_gelu_slope, quick_gelu_value


@triton.jit(do_not_specialize=["M", "sample_rows"])
def _scale_kernel(
    x_ptr,  # (M, N), rows x_row apart
    u_ptr,  # (M, N) or None: scale by the slope of quick_gelu there
    drop_ptr,  # (M / sample_rows,) or None: scale by each sample's factor
    y_ptr,  # (M, N) or None: the scaled x
    gelu_ptr,  # (M, N) or None: quick_gelu(u)
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
            if gelu_ptr is not None:
                tl.store(gelu_ptr + at, quick_gelu_value(u).to(gelu_ptr.dtype.element_ty), mask=inside)
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
    gelu: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """x (M, N) times its drop path factors and the slope of quick_gelu at slope_at (M, N), and its column sums.

    ``gelu`` (M, N), with ``slope_at``, is filled with quick_gelu there.

    Returns:
        the product (M, N) in ``dtype`` (x itself if nothing changes it), and its sums (N,) float32, always added in
        the same order.
    """
    M, N = x.shape
    changes = drop_scale is not None or slope_at is not None or x.dtype != dtype
    y = torch.empty(M, N, dtype=dtype, device=x.device) if changes else None
    config = tile("column_sums", x.device, n=N)
    groups = min(GROUPS, cdiv(M, config["ROWS"]))
    parts = torch.empty(groups, N, dtype=torch.float32, device=x.device)
    sample_rows = 1 if drop_scale is None else M // max(drop_scale.shape[0], 1)
    grid = (groups, cdiv(N, config["BLOCK_N"]))
    launch(_scale_kernel, grid, x, slope_at, drop_scale, y, gelu, parts, M, N, x.stride(0), sample_rows, **config)
    return x if y is None else y, parts.sum(0)


def refuse_drop_gradient(need: bool) -> None:
    """Raise: a drop path factor is drawn, not learnt."""
    if need:
        raise NotImplementedError(
            "drop_scale requires a gradient, which the triton kernels do not compute: detach it, or use "
            "xclip_fast.kernels.backend('reference')"
        )


def forward(
    save: bool,
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
    product: Callable[..., tuple[Tensor, ...]] = gemm,
) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    y, *found = product(
        rows_of(x).to(weight.dtype),
        weight,
        bias=bias.contiguous(),
        residual=rows_of(residual),
        drop_scale=None if drop_scale is None else drop_scale.contiguous(),
        statistics_eps=eps if statistics else None,
    )
    if statistics:
        found = [row.view(residual.shape[:-1]) for row in found]
    else:
        found = [torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2)]
    return (y.view(residual.shape), *found), ()


def backward(
    grads: Sequence[Any],
    saved: Sequence[Tensor],
    needs: Sequence[bool],
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    residual: Tensor,
    drop_scale: Tensor | None,
    eps: float,
    statistics: bool,
) -> list[Tensor]:
    refuse_drop_gradient(needs[4])
    result = []
    if any(needs[:3]):
        drop_scale = None if drop_scale is None else drop_scale.contiguous()
        dproduct, sums = scaled(rows_of(grads[0]), weight.dtype, drop_scale)
        if needs[0]:
            result.append(torch.mm(dproduct, weight).view(x.shape).to(x.dtype))
        if needs[1]:
            result.append(torch.mm(dproduct.T, rows_of(x).to(weight.dtype)))
        if needs[2]:
            result.append(sums.to(bias.dtype))
    if needs[3]:
        result.append(grads[0].to(residual.dtype))
    return result

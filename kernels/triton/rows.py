"""Rows of the residual stream as kernels read them: M rows of D numbers, any row stride."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Spare(NamedTuple):
    """What takes the place of x's row in the last row of each of F sequences of equal length."""

    rows: Tensor  # (F, D), contiguous
    mean: Tensor | None  # (F,) float32, of these rows; forward writes them where statistics are wanted
    rstd: Tensor | None


def spare_arguments(spare: Spare | None, rows: int) -> tuple[tuple[Tensor | None, ...], int]:
    """The kernels' three arguments, and the rows of a sequence."""
    return ((None,) * 3, 1) if spare is None else (tuple(spare), rows // spare.rows.shape[0])


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) as rows (M, D) with D contiguous: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def rows_of_sample(rows: int, drop_scale: Tensor | None) -> int:
    """How many rows share a drop path factor."""
    return 1 if drop_scale is None else rows // max(drop_scale.shape[0], 1)


@triton.jit
def load_rows(x_ptr, x_row, spare_ptr, rows, columns, inside, D, length):
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

"""Rows of the residual stream as kernels read them: M rows of D numbers, any row stride, or some rows of each frame."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Spare(NamedTuple):
    """What takes the place of x's row in the last row of each of F sequences of equal length."""

    rows: Tensor  # (F, D), contiguous
    mean: Tensor | None  # (F,) float32, of these rows; forward writes them where statistics are wanted
    rstd: Tensor | None


def spare_arguments(spare: Spare | None, rows: int, length: int) -> tuple[tuple[Tensor | None, ...], int]:
    """The kernels' three arguments, and the rows of a sequence: ``length`` without a spare row."""
    return ((None,) * 3, length) if spare is None else (tuple(spare), rows // spare.rows.shape[0])


def rows_of(x: Tensor) -> Tensor:
    """x (..., D) as rows (M, D) with D contiguous: a view where the strides allow it, else a copy."""
    rows = x.reshape(-1, x.shape[-1])
    return rows if rows.stride(1) == 1 or rows.shape[1] == 1 else rows.contiguous()


def frames_of(x: Tensor) -> Tensor:
    """x itself if ``layout_of`` takes it, else its rows."""
    return x if x.dim() == 3 and x.stride(2) == 1 else rows_of(x)


class Layout(NamedTuple):
    """Where the M rows of a tensor (M, D) or (F, N, D) are."""

    rows: int  # M
    row: int  # distance of two
    gap: int | None  # what lies beyond that between two frames; None: nothing
    length: int  # N, with a gap


def layout_of(x: Tensor) -> Layout:
    """The rows of x (M, D) or (F, N, D) with D contiguous."""
    if x.dim() == 2:
        return Layout(x.shape[0], x.stride()[0], None, 1)
    (frames, length, _), (frame, row, _) = x.shape, x.stride()
    gap = frame - length * row
    return Layout(frames * length, row, gap, length) if gap else Layout(frames * length, row, None, 1)


def rows_of_sample(rows: int, drop_scale: Tensor | None) -> int:
    """How many rows share a drop path factor."""
    return 1 if drop_scale is None else rows // max(drop_scale.shape[0], 1)


@triton.jit
def load_rows(x_ptr, x_row, x_gap, spare_ptr, rows, columns, inside, D, length):
    """rows of x, every ``length`` of them ``x_gap`` further on if it is given, but of ``spare`` in the last of every
    ``length`` rows, if that is given; float32"""
    x_at = x_ptr + rows[:, None].to(tl.int64) * x_row + columns[None, :]
    if x_gap is not None:
        x_at += (rows // length)[:, None].to(tl.int64) * x_gap
    if spare_ptr is None:
        x = tl.load(x_at, mask=inside, other=0.0).to(tl.float32)
    else:
        is_spare = (rows % length == length - 1)[:, None]
        spare_at = spare_ptr + (rows // length)[:, None].to(tl.int64) * D + columns[None, :]
        x = tl.load(x_at, mask=inside & ~is_spare, other=0.0).to(tl.float32)
        x += tl.load(spare_at, mask=inside & is_spare, other=0.0).to(tl.float32)
    return x

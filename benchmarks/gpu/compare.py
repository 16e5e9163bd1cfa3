"""Whether a result is right: the rule of the tests, for any op and all its gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from xclip_fast.kernels.tune.backends import judge

from .case import Job, Row


def check(
    job: Job, row: Row, call: Callable[[], Sequence[Tensor]], exact: Sequence[Tensor], baseline: Sequence[Tensor]
) -> None:
    """Adds to a row the error of the worst result of a call, its limit, and whether it is right."""
    poison(job.device)
    row["error"], row["limit"] = judge(job.wrong(call()), exact, baseline)
    row["right"] = row["error"] <= row["limit"]
    if not row["right"]:
        row["note"] = f"WRONG: error {row['error']:.3g}, limit {row['limit']:.3g}"


def poison(device: str) -> None:
    """Fill memory that the next allocations get with NaN, so that what a kernel fails to write shows."""
    if device == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            kept = [torch.full((size,), math.nan, device=device) for size in (*[1 << 10] * 64, *[1 << 22] * 8, 1 << 28)]
            del kept

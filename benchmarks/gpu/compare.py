"""Whether a result is right: the rule of the tests, for any op and all its gradients."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import torch
from torch import Tensor
from xclip_fast.kernels.common.example import TINY, Maker, Sizes
from xclip_fast.kernels.dispatch import OPS
from xclip_fast.kernels.tune.backends import error


def arguments(op: str, videos: int, frames: int, device: str, tiny: bool) -> tuple[Any, ...]:
    """An op's arguments in float32, at the sizes of B/16 with 400 labels or at tiny ones."""
    sizes = TINY if tiny else Sizes(videos=videos, frames=frames, labels=400)
    return OPS[op].example(sizes, Maker(device))


def judge(got: list[Tensor], exact: list[Tensor], baseline: list[Tensor]) -> tuple[float, float]:
    """The error of the worst result, and its limit: 2 err(torch in the same dtype) + 4 eps.

    A missing result has an infinite error.
    """
    if len(got) != len(exact):
        return math.inf, 0.0
    pairs = []
    for mine, right, torchs in zip(got, exact, baseline, strict=True):
        if mine.shape != right.shape:
            return math.inf, 0.0
        limit = 2 * error(torchs, right) + 4 * torch.finfo(mine.dtype).eps
        pairs.append((error(mine, right), limit))
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])


def poison(device: str) -> None:
    """Fill memory that the next allocations get with NaN, so that what a kernel fails to write shows."""
    if device == "cuda":
        with contextlib.suppress(torch.OutOfMemoryError):
            kept = [torch.full((size,), math.nan, device=device) for size in (*[1 << 10] * 64, *[1 << 22] * 8, 1 << 28)]
            del kept

"""Whether a result is right: the rule of the tests, for any op and all its gradients."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from ops import test_ops
from torch import Tensor
from xclip_fast.kernels.common.example import TINY, Maker, Sizes
from xclip_fast.kernels.dispatch import OPS, backend


def arguments(op: str, videos: int, frames: int, device: str, tiny: bool) -> list[Any]:
    """An op's arguments in float32, at the sizes of B/16 with 400 labels or at tiny ones."""
    sizes = TINY if tiny else Sizes(videos=videos, frames=frames, labels=400)
    return list(OPS[op].example(sizes, Maker(device)))


def results(op: str, args: Sequence[Any], name: str, cotangent: Tensor | None = None) -> list[Tensor]:
    """The first output of a backend; with a cotangent, also every gradient."""
    leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
    with backend(name), torch.set_grad_enabled(cotangent is not None):
        output = test_ops.first(op, OPS[op](*args) if name != "reference" else OPS[op].reference(*args))
        if cotangent is None:
            return [output]
        grads = torch.autograd.grad(output, leaves, cotangent.to(output.dtype), allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def wanting(args: Sequence[Any], dtype: torch.dtype, grad: bool) -> list[Any]:
    """The arguments in a dtype, as leaves of autograd."""
    cast = test_ops.cast(args, dtype)
    return [
        arg.detach().requires_grad_(grad) if isinstance(arg, Tensor) and arg.dtype == dtype else arg for arg in cast
    ]


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value; NaN if there is any NaN."""
    if exact.numel() == 0:
        return 0.0 if got.shape == exact.shape else math.nan
    return float((got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30))


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

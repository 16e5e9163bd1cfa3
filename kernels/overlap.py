"""Two computations beside each other on a GPU, where that costs nothing: inside a CUDA graph that is being captured."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

One = TypeVar("One")
Other = TypeVar("Other")


def side_by_side(x: Tensor, one: Callable[[], One], other: Callable[[], Other]) -> tuple[One, Other]:
    """(one(), other()), where neither reads what the other writes and both start from x.

    While x's GPU captures a CUDA graph (without gradients), ``one`` goes on a side stream, so that in every replay the
    two run beside each other as far as the GPU has room. Elsewhere they run one after the other: an eager launch costs
    the CPU more than the overlap could save.
    """
    if not is_captured(x):
        return one(), other()
    main, side = torch.cuda.current_stream(x.device), _side_stream(x.device)
    # Memory that either stream frees may be taken at once by later work of the same stream, and by no other. That is
    # safe without record_stream. The side stream waits for all that the main one did before, so what an earlier fork
    # allocated there is no longer read when it is taken again; and the main stream waits for the side one before it
    # goes on, so what it frees after this call is no longer read there, and the callers of `one` and `other` hold
    # what both read until then.
    side.wait_stream(main)
    with torch.cuda.stream(side):
        first = one()
    second = other()
    main.wait_stream(side)
    return first, second


def is_captured(x: Tensor) -> bool:
    """Whether work on x is recorded into a CUDA graph. With gradients, backward would have to fork and join as well."""
    if not x.is_cuda or torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return torch.cuda.is_current_stream_capturing()


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    # Of a higher priority, because the joined work waits for the slower of the two, and small kernels must find room
    # beside large ones; and because torch hands out streams of one priority in turn, so that it could be the main one.
    return torch.cuda.Stream(device, priority=-1)

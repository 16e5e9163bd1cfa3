"""Intermediate buffers of inference on a CPU, which the calls within a ``workspace`` share."""

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

_local = threading.local()


def workspace() -> contextlib.AbstractContextManager[None]:
    """Until it ends, the calls of this thread share their intermediate buffers, which are freed at the end.

    Memory that comes from the system comes page by page, which takes time in every call.
    """
    return contextlib.nullcontext() if torch.compiler.is_compiling() else _shared_buffers()


@contextlib.contextmanager
def _shared_buffers() -> Iterator[None]:
    if getattr(_local, "buffers", None) is not None:
        yield  # an outer one holds them
        return
    _keep_freed_memory()
    _local.buffers = {}
    try:
        yield
    finally:
        _local.buffers = None


@functools.cache
def _keep_freed_memory() -> None:
    """Makes glibc keep up to 64 MiB of freed memory for the next call: twice the largest block that was ever freed."""
    torch.empty((32 << 20) - (1 << 16), dtype=torch.uint8, device="cpu")


def take(name: str, rows: int, width: int, dtype: torch.dtype) -> Tensor:
    """An uninitialized (rows, width); its content lasts until the next call with the same name and dtype ("": on)."""
    buffers = getattr(_local, "buffers", None)
    if buffers is None or not name:
        return torch.empty(rows, width, dtype=dtype, device="cpu")
    key = name, dtype, torch.is_inference_mode_enabled()
    flat = buffers.get(key)
    if flat is None or flat.numel() < rows * width:
        flat = buffers[key] = torch.empty(rows * width, dtype=dtype, device="cpu")
    return flat[: rows * width].view(rows, width)

"""What every launcher needs: the launch itself, the architecture, the tile table, memory for descriptors.

The tests replace ``launch`` by a recorder and ``arch`` by an architecture of their choice, run the launchers on meta
tensors of production shapes, and compile what was recorded ahead of time.
"""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from .. import _tables
from .._dispatch import INTERPRETED

TABLE = Path(__file__).with_name("tiles.json")


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)``, with memory for tensor descriptors at hand; an empty grid is no launch."""
    if 0 in grid:
        return
    _provide_descriptor_memory()
    kernel[grid](*args, **options)


@functools.cache
def _provide_descriptor_memory() -> None:
    triton.set_allocator(lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device="cuda"))


@functools.cache
def arch(device: torch.device) -> int:
    """The compute capability as one number: 80, 90, 100. The interpreter counts as 80."""
    if INTERPRETED or device.type != "cuda":
        return 80
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor


@functools.cache
def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 2 in the interpreter, so that a persistent loop turns more than once."""
    if INTERPRETED or device.type != "cuda":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def tile(op: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """The tile of ``op`` for these sizes on this device: the first row of the user's table, then of the shipped one,
    whose architecture is the device's (or the newest below it) and whose bounds hold.

    Raises:
        LookupError: if the tables have no row; the shipped table has one for every size.
    """
    if op in _forced_tiles:
        return _forced_tiles[op]
    return _tile(op, arch(device), tuple(sorted(sizes.items())))


_forced_tiles: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def forced_tile(op: str, use: dict[str, Any]) -> Iterator[None]:
    """Take this tile for ``op`` inside the block, whatever the tables say: for tuning and tests."""
    _forced_tiles[op] = use
    try:
        yield
    finally:
        del _forced_tiles[op]


@functools.cache
def _tile(op: str, architecture: int, sizes: tuple[tuple[str, int], ...]) -> dict[str, Any]:
    for rows in (_tables.rows(_tables.user_table(TABLE.name), op), _tables.rows(TABLE, op)):
        newest = max((row["arch"] for row in rows if row["arch"] <= architecture), default=None)
        for row in rows:
            if row["arch"] == newest and _tables.holds(row, dict(sizes)):
                return dict(row["use"])
    raise LookupError(f"no tile for {op} on architecture {architecture} with {dict(sizes)} in {TABLE}")

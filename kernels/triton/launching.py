"""What every launcher needs: the launch itself, the architecture, the tile table, tile arithmetic.

``assumed_gpu`` lets the tests run the launchers without a GPU, on CPU or meta tensors of production shapes.
"""

import bisect
import contextlib
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .. import tables
from ..dispatch import INTERPRETED

TABLE = Path(__file__).with_name("tiles.json")


def cdiv(a: int, b: int) -> int:
    """a / b rounded up. ``triton.cdiv`` does the same in 1.4 us a call."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n."""
    return 1 << (n - 1).bit_length() if n > 0 else 0


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """``kernel[grid](*args, **options)`` on the device of its tensors, from any thread. An empty grid is no launch."""
    if 0 in grid:
        return
    device = next(arg.device for arg in args if isinstance(arg, Tensor))
    # Triton keeps the allocator in a ContextVar: what one thread sets is missing in autograd's and a server's threads
    triton.set_allocator(_descriptor_memory(device))
    if device.type != "cuda" or device.index == torch.cuda.current_device():
        kernel[grid](*args, **options)
    else:
        with torch.cuda.device(device):  # Triton launches on the current device
            kernel[grid](*args, **options)


@functools.cache
def _descriptor_memory(device: torch.device) -> Callable[[int, int, int | None], Tensor]:
    """The allocator of the memory that a kernel's tensor descriptors take, on this device."""
    return lambda size, alignment, stream: torch.empty(size, dtype=torch.int8, device=device)


_assumed: tuple[int, int] | None = None


@contextlib.contextmanager
def assumed_gpu(architecture: int, sms: int) -> Iterator[None]:
    """Choose tiles and grids as for a GPU of this architecture and number of multiprocessors, whatever the device."""
    global _assumed
    before, _assumed = _assumed, (architecture, sms)
    try:
        yield
    finally:
        _assumed = before


def arch(device: torch.device) -> int:
    """The compute capability as one number: 80, 90, 100. The interpreter counts as 80."""
    return (_assumed or _gpu(device))[0]


def processors(device: torch.device) -> int:
    """Streaming multiprocessors of a device; 2 in the interpreter, so that a persistent loop turns more than once."""
    return (_assumed or _gpu(device))[1]


@functools.cache
def _gpu(device: torch.device) -> tuple[int, int]:
    if INTERPRETED or device.type != "cuda":
        return 80, 2
    properties = torch.cuda.get_device_properties(device)
    return 10 * properties.major + properties.minor, properties.multi_processor_count


def tile(op: str, device: torch.device, **sizes: int) -> dict[str, Any]:
    """The tile of ``op`` for these sizes on this device: the first row of the user's table, then of the shipped one,
    whose bounds hold; of those for the device's architecture or one below it, the newest first.

    Raises:
        LookupError: if the tables have no row; the shipped table has one for every size.
    """
    if op in _forced_tiles:
        return _forced_tiles[op]
    architecture = arch(device)
    rows, bounds, found = _rows(op, architecture)
    # what decides is between which of the table's bounds each size lies, of which there are few: not the size itself
    key = tuple(bisect.bisect_right(at, sizes[name]) if name in sizes else -1 for name, at in bounds)
    use = found.get(key)
    if use is None:
        use = next((row["use"] for row in rows if tables.holds(row, sizes)), None)
        if use is None:
            raise LookupError(f"no tile for {op} on architecture {architecture} with {sizes} in {TABLE}")
        found[key] = use
    return use


_forced_tiles: dict[str, dict[str, Any]] = {}


@contextlib.contextmanager
def forced_tile(op: str, use: dict[str, Any]) -> Iterator[None]:
    """Take this tile for ``op`` inside the block, whatever the tables say: for tuning and tests."""
    _forced_tiles[op] = use
    try:
        yield
    finally:
        del _forced_tiles[op]


Rows = tuple[list[dict[str, Any]], list[tuple[str, list[int]]], dict[tuple[int, ...], dict[str, Any]]]


@functools.cache
def _rows(op: str, architecture: int) -> Rows:
    """The rows of an op for an architecture in their order; the values at which one of their bounds begins or ends to
    hold, by size; the tiles found so far, by the place of each size among those values."""
    rows = []
    for table in (tables.rows(tables.user_table(TABLE.name), op), tables.rows(TABLE, op)):
        rows += sorted((row for row in table if row["arch"] <= architecture), key=lambda row: -row["arch"])
    bounds: dict[str, set[int]] = {}
    for row in rows:
        for name, (low, high) in row.get("where", {}).items():
            bounds.setdefault(name, set()).update((low, high + 1))
    return rows, [(name, sorted(at)) for name, at in bounds.items()], {}


def forget() -> None:
    """Read the tables again at the next call."""
    _rows.cache_clear()
    tables.rows.cache_clear()

"""What every launcher needs: the launch itself, the architecture, the tile table, memory for descriptors.

The tests replace ``launch`` by a recorder and ``arch`` by an architecture of their choice, run the launchers on meta
tensors of production shapes, and compile what was recorded ahead of time.
"""

import contextlib
import functools
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

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


def user_table() -> Path:
    """Where ``python -m xclip_fast.kernels.tune`` keeps what it measured on this machine."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(cache).expanduser() / "xclip_fast" / "tiles.json"


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
    for rows in (_rows(user_table(), op), _rows(TABLE, op)):
        known = [row["arch"] for row in rows if row["arch"] <= architecture]
        for row in rows:
            bounds: dict[str, tuple[int, int]] = row.get("where", {})
            if row["arch"] == max(known, default=None) and all(
                bounds.get(name, (size, size))[0] <= size <= bounds.get(name, (size, size))[1] for name, size in sizes
            ):
                return dict(row["use"])
    raise LookupError(f"no tile for {op} on architecture {architecture} with {dict(sizes)} in {TABLE}")


@functools.cache
def _rows(path: Path, op: str) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    return list(json.loads(path.read_text(encoding="utf-8")).get(op, []))

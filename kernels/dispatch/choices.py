"""Which backend was measured to be the fastest: per (op, architecture, dtype, training or not, class of sizes).

The rows of an op in choices.json hold the median milliseconds of each backend that computed the right thing there;
``python -m xclip_fast.kernels.tune --backends`` measures and writes them. Where no row holds, the op's own order does.
"""

import functools
from pathlib import Path
from typing import Any

import torch

from . import tables

TABLE = Path(__file__).parents[1] / "choices.json"


def known(name: str) -> bool:
    """Whether any table has rows under this name: what a call costs where nothing was measured."""
    return bool(tables.rows(TABLE, name))


def architecture(device: torch.device) -> int | None:
    """The compute capability of a GPU as one number, 90 for 9.0; None elsewhere."""
    return _capability(device) if device.type == "cuda" else None


def measured_on(architecture: int) -> bool:
    """Whether the parts of a block were measured on such a GPU."""
    return any(row["arch"] == architecture for row in tables.rows(TABLE, "norm_linear"))


def order(name: str, architecture: int, sizes: dict[str, Any]) -> tuple[str, ...]:
    """The backends of the first row that holds, the fastest first; none if no row holds."""
    row = tables.first(TABLE, name, range(architecture, architecture + 1), tuple(sizes.items()))
    medians: dict[str, float] = row["milliseconds"] if row else {}
    return tuple(sorted(medians, key=medians.__getitem__))


@functools.cache
def _capability(device: torch.device) -> int:
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor

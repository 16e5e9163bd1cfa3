"""The output of a loader: batches, and a report of delivered and unreadable videos.

Sizes: B videos, V views, T frames, S pixels a side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_SHOWN = 10  # bad videos listed in a summary or an error


class Batch(NamedTuple):
    """One batch. B may be 0.

    frames: uint8 (B, T, S, S, 3), RGB; (B, V, T, S, S, 3) if the transform has several views. labels: int64 (B,), -1
    if unknown. samples: int64 (B,), rows of the manifest.
    """

    frames: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


class DataError(ValueError):
    """Too many videos cannot be read."""


@dataclass
class Report:
    """The outcome of an epoch on one rank.

    `name_of`: the file of a row. `total`: this rank's videos, with those that the index lists as bad. The totals of all
    ranks add up to the rows of the manifest. `delivered`: the videos delivered so far. `bad`: row -> reason, for every
    bad video that this rank knows; it is kept from epoch to epoch.
    """

    name_of: Callable[[int], str]
    total: int = 0
    delivered: int = 0
    bad: dict[int, str] = field(default_factory=dict)

    def summary(self) -> str:
        """ "n of m videos", and the unreadable ones by name."""
        text = f"{self.delivered} of {self.total} videos"
        if self.bad:
            text += f"; {len(self.bad)} could not be read: {self.listed()}"
        return text

    def listed(self) -> str:
        """The first bad videos by name, each with its reason."""
        parts = [f"{self.name_of(row)}: {self.bad[row]}" for row in sorted(self.bad)[:_SHOWN]]
        more = len(self.bad) - len(parts)
        return "; ".join(parts) + (f"; and {more} more" if more else "")


def moved(parts: tuple[torch.Tensor, ...], device: torch.device, stream: torch.cuda.Stream) -> list[torch.Tensor]:
    """Copies on the device, made while the device computes, on a stream that the current one waits for."""
    with torch.cuda.stream(stream):
        copies = [part.to(device, non_blocking=True) for part in parts]
    current = torch.cuda.current_stream(device)
    current.wait_stream(stream)
    for copy in copies:
        copy.record_stream(current)  # or the next copy might get its memory while it is still read
    return copies

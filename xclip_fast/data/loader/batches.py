"""The output of a loader: batches, and a report of the videos that came and those that could not be read.

Sizes: B videos, V views, T frames, S pixels a side.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch

_SHOWN = 10  # bad videos listed in a summary or an error


class Batch(NamedTuple):
    """frames: uint8 (B, T, S, S, 3), or (B, V, T, S, S, 3) of a transform with several views, RGB. labels: int64 (B,),
    -1 where unknown. samples: int64 (B,), rows of the manifest. B may be 0."""

    frames: torch.Tensor
    labels: torch.Tensor
    samples: torch.Tensor


class DataError(ValueError):
    """Too much of the data cannot be used."""


@dataclass
class Report:
    """The outcome of an epoch, on one rank.

    `total`: the videos that should have come, those that the index knows to be bad included; all ranks' add up to the
    manifest's rows. `delivered`: those that did, up to now. `bad`: row -> reason, of the whole manifest as far as this
    rank knows; it stays from epoch to epoch. `names`: row -> file, of the bad ones.
    """

    total: int
    delivered: int = 0
    bad: dict[int, str] = field(default_factory=dict)
    names: dict[int, str] = field(default_factory=dict)

    def summary(self) -> str:
        """ "n of m videos", and which could not be read."""
        text = f"{self.delivered} of {self.total} videos"
        if self.bad:
            text += f"; {len(self.bad)} could not be read: {self.listed()}"
        return text

    def listed(self) -> str:
        """The first bad videos by name, each with its reason."""
        parts = [f"{self.names[row]}: {self.bad[row]}" for row in sorted(self.bad)[:_SHOWN]]
        more = len(self.bad) - len(parts)
        return "; ".join(parts) + (f"; and {more} more" if more else "")

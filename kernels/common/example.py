"""Example arguments of the ops, for tests, benchmarks, checks on a GPU and ``xclip-fast info``.

Each op makes its own from sizes and random tensors: ``op.example(Sizes(), Maker())``.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Sizes(NamedTuple):
    """The sizes of a call. The defaults are those of B/16 with one video."""

    videos: int = 1  # B
    frames: int = 8  # T
    labels: int = 16  # K
    width: int = 768  # D
    embed: int = 512  # E
    image: int = 224  # pixels of a side
    patch: int = 16  # P

    @property
    def sequences(self) -> int:
        """F = B T."""
        return self.videos * self.frames

    @property
    def tokens(self) -> int:
        """L, the tokens of a frame: patches and class token."""
        return (self.image // self.patch) ** 2 + 1


TINY = Sizes(videos=2, frames=2, labels=3, width=64, embed=64, image=16, patch=8)


class Maker:
    """Makes tensors of one dtype on one device: random ones, or uninitialized ones, which cost nothing."""

    def __init__(
        self, device: str | torch.device = "cpu", dtype: torch.dtype = torch.float32, *, empty: bool = False
    ) -> None:
        self.device, self.dtype, self.empty = device, dtype, empty

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        if self.empty:
            return torch.empty(shape, device=self.device, dtype=self.dtype)
        return torch.randn(shape, device=self.device, dtype=self.dtype) * scale

    def norm(self, width: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a LayerNorm."""
        return 1 + self.normal(width, scale=0.1), self.normal(width, scale=0.1)

    def linear(self, out: int, inner: int) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer."""
        return self.normal(out, inner, scale=inner**-0.5), self.normal(out, scale=0.1)

    def levels(self, *shape: int) -> Tensor:
        """Bytes of pixels."""
        if self.empty:
            return torch.empty(shape, device=self.device, dtype=torch.uint8)
        return torch.randint(256, shape, device=self.device, dtype=torch.uint8)

"""Example arguments of a block, for tests, benchmarks, tuning and ``xclip-fast info``."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..common.block import Block
from ..common.example import Maker


def example(
    count: int,
    length: int,
    width: int,
    frames: int = 0,
    *,
    labels: Sequence[int] = (),
    drops: bool = False,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    empty: bool = False,
    **given: Any,
) -> Block:
    """Random arguments with the magnitudes of a trained model.

    Args:
        count, length, width: x is (count, length, width); with frames the last row of a sequence is the spare one.
        frames: T, for a block with a message; 0: without.
        labels: rows of packed causal sequences, in place of count and length.
        drops: with drop path factors, 0 and 1.25 in turn, of each video (or sequence).
        device, dtype, empty: as for ``Maker``.
        given: further arguments. Heads have 64 channels by default.
    """
    make = Maker(device, dtype, empty=empty)

    def linear(name: str, columns: int, inner: int) -> dict[str, Tensor]:
        return dict(zip((f"{name}_weight", f"{name}_bias"), make.linear(columns, inner), strict=True))

    def norm(name: str) -> dict[str, Tensor]:
        return dict(zip((f"{name}_weight", f"{name}_bias"), make.norm(width), strict=True))

    made: dict[str, Any] = {"heads": width // 64, "x": make.normal(count, length, width)}
    if labels:
        ends = torch.tensor([0, *labels]).cumsum(0)
        made |= {
            "x": make.normal(sum(labels), width),
            "offsets": ends.to(device),
            "longest": max(labels),
            "causal": True,
        }
    made |= {**norm("ln_1"), **linear("in", 3 * width, width), **linear("out", width, width)}
    made |= {**norm("ln_2"), **linear("fc", 4 * width, width), **linear("projection", width, 4 * width)}
    if frames:
        made |= {"frames": frames, **linear("message_fc", width, width), **norm("message_ln")}
        made |= {**linear("message_in", 3 * width, width), **linear("message_out", width, width)}
    if drops:
        samples = count // frames if frames else count
        factor = torch.arange(samples, device=device, dtype=dtype) % 2 * 1.25
        made |= {"drop_attention": factor, "drop_feed_forward": 1.25 - factor}
        made |= {"drop_fusion": factor} if frames else {}
    return Block(**{**made, **given})

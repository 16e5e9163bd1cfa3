"""Which frames of a video to look at. Plain arithmetic on frame numbers; nothing here opens a file."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Sampling = Literal["sparse", "dense"]


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on every worker, in any order, after any resume.

    Philox in counter mode: the seed is the key and (sample, epoch) the upper half of the counter, so two samples never
    share numbers. All three must lie in [0, 2**64).
    """
    for name, value in (("seed", seed), ("epoch", epoch), ("sample", sample)):
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2**64)")
    counter = np.array([0, 0, sample, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter))


def frame_indices(
    total: int,
    frames: int,
    sampling: Sampling = "sparse",
    *,
    stride: int = 1,
    rng: np.random.Generator | None = None,
) -> np.ndarray:
    """Frame numbers, int64 (frames,), never decreasing, each in [0, total).

    sparse: one frame of each of `frames` equal segments: the middle one, or with `rng` a random one (the paper's
    training frames). dense: `frames` frames `stride` apart from one window, in the middle of the video or with `rng`
    anywhere. A window longer than the video takes the largest stride that fits. A video of fewer than `frames` frames
    repeats frames evenly, under either sampling.

    Raises ValueError for an unknown `sampling`, or for `total`, `frames` or `stride` under 1.
    """
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling is {sampling!r}; it must be one of {', '.join(get_args(Sampling))}")
    for name, value in (("total", total), ("frames", frames), ("stride", stride)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    steps = np.arange(frames, dtype=np.int64)
    if sampling == "dense" and total >= frames:
        if frames > 1:
            stride = min(stride, (total - 1) // (frames - 1))
        spare = total - 1 - (frames - 1) * stride
        start = spare // 2 if rng is None else int(rng.integers(spare + 1))
        return start + stride * steps
    if rng is None:
        return (2 * steps + 1) * total // (2 * frames)
    low, high = steps * total // frames, (steps + 1) * total // frames
    return rng.integers(low, np.maximum(high, low + 1))

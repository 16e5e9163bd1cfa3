"""The order of videos in an epoch, and the sampled frames of a video. Nothing here opens a file."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np

Sampling = Literal["sparse", "dense"]


def sample_rng(seed: int, epoch: int, sample: int) -> np.random.Generator:
    """The random numbers of one sample in one epoch: the same on every worker, in any order, after any resume.

    Philox in counter mode: the seed is the key and (sample, epoch) is the upper half of the counter, so two samples
    never share numbers. All three values must be in [0, 2**64).
    """
    _check_64_bits(seed=seed, epoch=epoch, sample=sample)
    counter = np.array([0, 0, sample, epoch], np.uint64)
    return np.random.Generator(np.random.Philox(key=np.array([seed, 0], np.uint64), counter=counter))


def _check_64_bits(**values: int) -> None:
    for name, value in values.items():
        if not 0 <= value < 2**64:
            raise ValueError(f"{name} is {value}; it must lie in [0, 2**64)")


def frame_indices(
    total: int,
    frames: int,
    sampling: Sampling = "sparse",
    *,
    stride: int = 1,
    rng: np.random.Generator | None = None,
    clip: int = 0,
    clips: int = 1,
) -> np.ndarray:
    """Frame numbers, int64 (frames,), never decreasing, each in [0, total).

    sparse: one frame of each of `frames` equal segments: the middle one, or with `rng` a random one (the paper's
    training frames). dense: `frames` frames that are `stride` apart, from one window in the middle of the video, or
    with `rng` at a random place. If the window is longer than the video, the largest stride that fits is taken. A video
    of fewer than `frames` frames repeats frames evenly, with either sampling.

    Without `rng` there may be several views in time; `clip` is the number of one of `clips`. sparse: each segment is
    cut into `clips` parts, and a view takes the middle of its part of each segment. dense: the windows are evenly
    spread.

    Raises ValueError for an unknown `sampling`, for `total`, `frames`, `stride` or `clips` below 1, for a `clip` out of
    range, and for several clips together with `rng`.
    """
    if sampling not in get_args(Sampling):
        raise ValueError(f"sampling is {sampling!r}; it must be one of {', '.join(get_args(Sampling))}")
    for name, value in (("total", total), ("frames", frames), ("stride", stride), ("clips", clips)):
        if value < 1:
            raise ValueError(f"{name} is {value}; it must be at least 1")
    if not 0 <= clip < clips:
        raise ValueError(f"clip is {clip}; with {clips} clips it must lie from 0 to {clips - 1}")
    if rng is not None and clips > 1:
        raise ValueError(f"{clips} clips with random frames: several views in time are not random; leave rng out")
    steps = np.arange(frames, dtype=np.int64)
    if sampling == "dense" and total >= frames:
        if frames > 1:
            stride = min(stride, (total - 1) // (frames - 1))
        spare = total - 1 - (frames - 1) * stride
        start = (2 * clip + 1) * spare // (2 * clips) if rng is None else int(rng.integers(spare + 1))
        return start + stride * steps
    if rng is None:
        return (2 * (steps * clips + clip) + 1) * total // (2 * frames * clips)
    low, high = steps * total // frames, (steps + 1) * total // frames
    return rng.integers(low, np.maximum(high, low + 1))


def epoch_order(samples: int, seed: int, epoch: int, shuffle: bool) -> np.ndarray:
    """A permutation of 0 to `samples` - 1 for one epoch, int64 (samples,), the same on every machine.

    It sorts raw numbers of Philox (key (seed, 1), which `sample_rng` never uses) instead of NumPy's shuffle, so it is
    the same in other versions of NumPy. Raises ValueError for a seed or epoch outside [0, 2**64).
    """
    _check_64_bits(seed=seed, epoch=epoch)
    if not shuffle:
        return np.arange(samples, dtype=np.int64)
    philox = np.random.Philox(key=np.array([seed, 1], np.uint64), counter=np.array([0, 0, 0, epoch], np.uint64))
    return np.argsort(philox.random_raw(samples), kind="stable").astype(np.int64, copy=False)


def epoch_batches(order: np.ndarray, batch_size: int, rank: int, world: int) -> list[np.ndarray]:
    """The batches of one rank: of each batch_size * world samples of `order`, every `world`-th, from `rank` on.

    Global batches of the same size hold the same samples with any number of ranks. All ranks get the same number of
    batches. In the last batch a rank may have fewer samples than `batch_size`, even none. Nothing is padded or
    repeated: every sample comes once, on one rank.
    """
    step = batch_size * world
    return [order[start : start + step][rank::world] for start in range(0, len(order), step)]

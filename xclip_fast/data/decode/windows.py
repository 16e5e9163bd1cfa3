"""Parts of videos by time: one span of a video, or windows that slide over the whole video.

A film of any length is planned once and decoded in one pass. Each frame is decoded once, also if several windows show
it. Only the frames of incomplete windows are kept in memory.

Times are seconds from the first frame.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from ..sampling import Sampling, frame_indices
from ..transforms import TestTransform, apply_frame
from .chosen import chosen_pictures
from .source import ReadError, Source, VideoError, as_source, limit

if TYPE_CHECKING:
    import torch

VideoPath = str | os.PathLike[str] | Source

Span = tuple[float, float]
"""(start, end) in seconds: the frames with start <= time < end."""

_ROUNDING = 1e-4  # seconds; a frame this little before a span's start or end counts as at it


@dataclass(frozen=True, eq=False)
class Window:
    """One part of a video: `start` and `end` in seconds, `frames` uint8 (T, S, S, 3), RGB."""

    start: float
    end: float
    frames: torch.Tensor


def decode_windows(
    path: VideoPath,
    window: float = 10.0,
    stride: float | None = None,
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    size: int = 224,
    frame_stride: int = 1,
    threads: int = 1,
) -> Iterator[Window]:
    """Windows of `window` seconds, one every `stride` seconds (default: half a window), in order of time.

    The last window ends with the video and may be shorter. `frames`, `sampling`, `size` and `threads` are those of
    `decode`, for each window; `frame_stride` is its `stride`. Memory does not grow with the video's length, except for
    the list of frame times (about 100 bytes for each frame).

    Raises ValueError for a window or stride that is not positive, and VideoError for a bad file.
    """
    stride = window / 2 if stride is None else stride
    check_windows(window, stride, window)
    test = TestTransform(frames, size, sampling=sampling, stride=frame_stride)
    spans = partial(window_spans, window=window, stride=stride)
    return decode_spans(as_source(path), spans, test, threads=threads)


def check_windows(window: float, stride: float, whole_below: float) -> None:
    """Raises ValueError if a video cannot be cut into windows of these values."""
    for name, value in (("window", window), ("stride", stride)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} is {value} seconds; it must be positive")
    if not whole_below >= 0:
        raise ValueError(f"whole_below is {whole_below} seconds; it must not be negative")


def window_spans(duration: float, window: float, stride: float) -> list[Span]:
    """The windows of a video of `duration` seconds: each span starts `stride` seconds after the one before it.

    The last span is the first that reaches the end, and is cut off there. Raises ReadError for more than
    XCLIP_FAST_MAX_WINDOWS.
    """
    count = 1 + max(0, math.ceil(min((duration - window) / stride, 2.0**53) - 1e-9))
    if count > (most := limit("XCLIP_FAST_MAX_WINDOWS")):  # of a long pause, or of a tiny stride
        raise ReadError(
            f"would have {count} windows in {duration:.6g} seconds; the environment variable XCLIP_FAST_MAX_WINDOWS "
            f"allows more than {most}"
        )
    starts = [number * stride for number in range(count) if number == 0 or number * stride < duration - _ROUNDING]
    return [(start, min(start + window, duration)) for start in starts]


def decode_spans(
    source: Source,
    spans: Callable[[float], Sequence[Span]],
    test: TestTransform,
    *,
    rng: np.random.Generator | None = None,
    threads: int = 1,
) -> Generator[Window, None, None]:
    """The parts of a video in `spans(duration in seconds)`, which are sorted by time, as one view of `test` each.

    A span without a frame shows the frame before it. Raises VideoError.
    """
    size = test.size
    state = {} if rng is None else rng.bit_generator.state
    waiting: deque[tuple[Span, list[int]]] = deque()  # the windows to come, with their frame numbers
    held: dict[int, np.ndarray] = {}  # frames (S, S, 3) that a window still needs
    given = 0  # after a failed plan, these are not yielded again

    def choose(times: np.ndarray) -> set[int]:
        if rng is not None:
            rng.bit_generator.state = state  # called again, it draws the same
        held.clear()
        waiting.clear()
        try:
            waiting.extend(_numbered(times - times[0], spans, test, rng)[given:])
        except ReadError as error:
            raise ReadError(f"{source}: {error}") from error
        return {number for _, numbers in waiting for number in numbers}

    import torch

    with contextlib.closing(chosen_pictures(source, choose, threads)) as pictures:
        for number, picture_HWC in pictures:
            height, width = picture_HWC.shape[:2]
            held[number] = np.empty((size, size, 3), np.uint8)
            apply_frame(test.crops_of(width, height)[0], picture_HWC, held[number])
            while waiting and held.keys() >= set(waiting[0][1]):
                (start, end), numbers = waiting.popleft()
                stacked = torch.from_numpy(np.stack([held[each] for each in numbers]))
                for each in [each for each in held if not waiting or each < waiting[0][1][0]]:
                    del held[each]
                given += 1
                yield Window(start, end, stacked)
    if not given:
        raise VideoError(f"{source}: is damaged: decoded again, it has fewer frames")


def _numbered(
    times: np.ndarray, spans: Callable[[float], Sequence[Span]], test: TestTransform, rng: np.random.Generator | None
) -> list[tuple[Span, list[int]]]:
    """The spans with the frame numbers of each. `times`: of all frames, in seconds from the first."""
    interval = times[-1] / (len(times) - 1) if len(times) > 1 and times[-1] > 0 else 0.04
    duration = float(times[-1] + interval)
    found = []
    for start, end in spans(duration):
        low, high = np.searchsorted(times, (start - _ROUNDING, end - _ROUNDING if end < duration else math.inf))
        low = min(int(low), len(times) - 1)
        if high <= low and times[low] > start:
            low = max(0, low - 1)  # no frame begins in this span: the one before it is still shown
        total = max(1, int(high) - low)
        numbers = low + frame_indices(total, test.frames, test.sampling, stride=test.stride, rng=rng)
        found.append(((start, end), numbers.tolist()))
    return found

"""Parts of videos by time: one span of a video, or windows that slide over the whole video.

A film of any length is planned once and decoded in one pass. Each frame is decoded once, also if several windows show
it. Only the frames of incomplete windows are kept in memory.

Times are seconds from the first frame.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from av.container import InputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from ..sampling import Sampling, frame_indices
from ..transforms import TestTransform, apply_frame
from .picture import EXACT_COLOR, Upright
from .plan import Plan, make_plan, planned_frames, still_fits
from .reading import all_frames, log, no_frame, open_video
from .source import ReadError, Source, VideoError, as_source, limit

Video = str | os.PathLike[str] | Source

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
    path: Video,
    window: float = 10.0,
    stride: float | None = None,
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    whole_below: float | None = None,
    size: int = 224,
    frame_stride: int = 1,
    threads: int = 1,
) -> Iterator[Window]:
    """Windows of `window` seconds, one every `stride` seconds (default: half a window), in order of time.

    A video of at most `whole_below` seconds (default: `window`) is one window. The last window ends with the video and
    may be shorter. `frames`, `sampling`, `size` and `threads` are those of `decode`, for each window; `frame_stride` is
    its `stride`. Memory does not grow with the video's length, except for the list of frame times (about 100 bytes for
    each frame).

    Raises ValueError for a window or stride that is not positive, and VideoError for a bad file.
    """
    stride = window / 2 if stride is None else stride
    whole_below = window if whole_below is None else whole_below
    check_windows(window, stride, whole_below)

    def spans(duration: float) -> list[Span]:
        return [(0.0, duration)] if duration <= whole_below else window_spans(duration, window, stride)

    source = as_source(path)
    return decode_spans(source, spans, frames, sampling, size=size, stride=frame_stride, threads=threads)


def decode_span(
    source: Source, start: float | None, end: float | None, frames: int, sampling: Sampling, **options: Any
) -> Window:
    """One part of a video, as `decode` describes it. `options` are those of `decode_spans`."""
    begin = 0.0 if start is None else start
    if not 0 <= begin < (math.inf if end is None else end):
        raise ValueError(f"start is {start} and end is {end} seconds; 0 <= start < end wanted")

    def spans(duration: float) -> list[Span]:
        if begin >= duration:
            raise VideoError(f"{source}: lasts {duration:.3f} seconds, and the start is {begin:g}")
        return [(begin, duration if end is None else min(end, duration))]

    parts = decode_spans(source, spans, frames, sampling, **options)
    try:
        for part in parts:
            return part
    finally:
        parts.close()
    raise VideoError(f"{source}: is damaged: decoded again, it has fewer frames")


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
    if count > (most := limit("XCLIP_FAST_MAX_WINDOWS")):  # of a time stamp far off, or of a tiny stride
        raise ReadError(
            f"would have {count} windows in {duration:.6g} seconds; the environment variable XCLIP_FAST_MAX_WINDOWS "
            f"allows more than {most}"
        )
    starts = [number * stride for number in range(count) if number == 0 or number * stride < duration - _ROUNDING]
    return [(start, min(start + window, duration)) for start in starts]


def decode_spans(
    source: Source,
    spans: Callable[[float], Sequence[Span]],
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    size: int = 224,
    stride: int = 1,
    rng: np.random.Generator | None = None,
    threads: int = 1,
) -> Generator[Window, None, None]:
    """The parts of a video in `spans(duration in seconds)`, which are sorted by time.

    A span without a frame shows the frame before it. Raises VideoError.
    """
    job = _Job(source, spans, frames, sampling, size, stride, rng)
    if source.plan is not None:
        with open_video(source, threads) as (container, stream):
            if still_fits(source.plan, source, container, stream) and (
                yield from job.by_plan(container, stream, source.plan)
            ):
                return
    with open_video(source, threads) as (container, stream):
        plan = make_plan(container, stream)
        if plan is not None and plan != source.plan and (yield from job.by_plan(container, stream, plan)):
            return
    if plan is not None:
        log.info("%s: seeking did not give the frames of its packets; decoding the whole file", source)
    with open_video(source, threads) as (container, stream):
        rate = float(stream.average_rate or 25)
        base = float(stream.time_base or 0)
        known = [math.nan if frame.pts is None else frame.pts * base for frame in all_frames(container, stream)]
        if not known:
            raise no_frame(source, stream)
    times = np.array(known, np.float64)
    if not (np.diff(times, prepend=times[0]) >= 0).all():  # unknown times, or a clock that was set back
        times = np.arange(len(known)) / rate
    with open_video(source, threads) as (container, stream):
        yield from job.emit(times, enumerate(all_frames(container, stream)))


class _Job:
    """The wanted windows of one video, and the number of those that have been yielded."""

    def __init__(
        self,
        source: Source,
        spans: Callable[[float], Sequence[Span]],
        frames: int,
        sampling: Sampling,
        size: int,
        stride: int,
        rng: np.random.Generator | None,
    ) -> None:
        self.source, self.spans, self.rng = source, spans, rng
        self.frames, self.sampling, self.size, self.stride = frames, sampling, size, stride
        self.test = TestTransform(frames, size, sampling=sampling, stride=stride)
        self.state = rng.bit_generator.state if rng is not None else {}
        self.given = 0  # after a failed plan, these are not yielded again

    def wanted(self, times: np.ndarray) -> list[tuple[Span, np.ndarray]]:
        """The spans with the frame numbers (T,) of each."""
        if self.rng is not None:
            self.rng.bit_generator.state = self.state  # called again, it draws the same
        times = times - times[0]
        interval = times[-1] / (len(times) - 1) if len(times) > 1 and times[-1] > 0 else 0.04
        duration = float(times[-1] + interval)
        found = []
        try:
            spans = self.spans(duration)
        except ReadError as error:
            raise ReadError(f"{self.source}: {error}") from error
        for start, end in spans:
            low, high = np.searchsorted(times, (start - _ROUNDING, end - _ROUNDING if end < duration else math.inf))
            low = min(int(low), len(times) - 1)
            if high <= low and times[low] > start:
                low = max(0, low - 1)  # no frame begins in this span: the one before it is still shown
            total = max(1, int(high) - low)
            numbers = low + frame_indices(total, self.frames, self.sampling, stride=self.stride, rng=self.rng)
            found.append(((start, end), numbers))
        return found

    def by_plan(self, container: InputContainer, stream: VideoStream, plan: Plan) -> Generator[Window, None, bool]:
        """Returns False if the file does not follow the plan."""
        times = np.array(plan.pts, np.float64) * float(stream.time_base or 0)
        wanted = self.wanted(times)[self.given :]
        numbers = sorted({int(number) for _, each in wanted for number in each})
        frames = planned_frames(container, stream, plan, numbers)
        worked: list[bool] = []

        def pairs() -> Iterator[tuple[int, VideoFrame]]:
            worked.append((yield from frames))

        yield from self._windows(wanted, pairs())
        return worked != [False]

    def emit(self, times: np.ndarray, frames: Iterable[tuple[int, VideoFrame]]) -> Iterator[Window]:
        """The windows from numbered frames that begin with the first frame."""
        wanted = self.wanted(times)[self.given :]
        numbers = {int(number) for _, each in wanted for number in each}
        yield from self._windows(wanted, ((number, frame) for number, frame in frames if number in numbers))

    def _windows(
        self, wanted: list[tuple[Span, np.ndarray]], frames: Iterator[tuple[int, VideoFrame]]
    ) -> Iterator[Window]:
        reformatter, upright = VideoReformatter(), Upright()
        held: dict[int, np.ndarray] = {}  # frames (S, S, 3) that a window still needs
        place = 0
        for number, frame in frames:
            rgb = reformatter.reformat(frame, format="rgb24", interpolation=EXACT_COLOR, threads=1)
            picture_HWC = upright(frame, rgb.to_ndarray())
            height, width = picture_HWC.shape[:2]
            view = self.test.crops_of(width, height)[0]
            held[number] = np.empty((self.size, self.size, 3), np.uint8)
            apply_frame(view, picture_HWC, held[number])
            while place < len(wanted) and all(int(each) in held for each in wanted[place][1]):
                (start, end), numbers = wanted[place]
                stacked = torch.from_numpy(np.stack([held[int(each)] for each in numbers]))
                place, self.given = place + 1, self.given + 1
                first = int(wanted[place][1][0]) if place < len(wanted) else 1 << 62
                held = {each: picture for each, picture in held.items() if each >= first}
                yield Window(start, end, stacked)

"""Chosen frames of one video file, by the fastest way that gives the right ones.

A stored plan comes first (`plan.py`), then a plan from the file's packets. If the packets do not match the frames (odd
containers), or a frame on the way is damaged, the whole file is decoded: slower, with the same result.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Generator, Iterator

import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import VideoReformatter
from av.video.stream import VideoStream

from .picture import EXACT_COLOR, Upright
from .plan import Plan, PlanFails, make_plan, planned_frames, still_fits
from .reading import all_frames, log, no_frame, open_video
from .source import Source, VideoError
from .times import clock_of, frame_times


def chosen_pictures(
    source: Source, choose: Callable[[np.ndarray], Collection[int]], threads: int = 1
) -> Generator[tuple[int, np.ndarray], None, None]:
    """The chosen frames in order of display: number and upright picture, uint8 (H, W, 3), RGB.

    `choose` returns frame numbers. It gets the times of all frames, float64 in seconds, and raises IndexError or
    VideoError if they are too few. If a plan fails on the way, `choose` is called again, and its frames come from the
    first one on.

    Raises VideoError, and the errors of `choose`.
    """
    reformatter, upright = VideoReformatter(), Upright()

    def pictures(frames: Iterator[tuple[int, VideoFrame]]) -> Iterator[tuple[int, np.ndarray]]:
        for number, frame in frames:
            rgb = reformatter.reformat(frame, format="rgb24", interpolation=EXACT_COLOR, threads=1)
            yield number, upright(frame, rgb.to_ndarray())

    failed = None
    if source.plan is not None:
        with open_video(source, threads) as (container, stream), contextlib.suppress(PlanFails):
            if still_fits(source.plan, source, container, stream):
                try:
                    numbers = choose(_times(source.plan, stream))
                except (IndexError, VideoError):
                    raise PlanFails from None  # the errors of a wrong frame count come below
                failed = source.plan
                yield from pictures(planned_frames(container, stream, source.plan, sorted(set(numbers))))
                return
        log.info("%s: does not match its stored plan; planning it again", source)
    with open_video(source, threads) as (container, stream), contextlib.suppress(PlanFails):
        plan = make_plan(container, stream)
        if plan is not None and plan != failed:
            numbers = choose(_times(plan, stream))
            yield from pictures(planned_frames(container, stream, plan, sorted(set(numbers))))
            return
    if plan is not None:
        log.info("%s: seeking did not give the frames of its packets; decoding the whole file", source)
    times = _decoded_times(source, threads)
    try:
        wanted = set(choose(times))
    except (IndexError, VideoError) as error:
        if plan is not None and len(times) < len(plan.pts):
            raise VideoError(
                f"{source}: is damaged: only {len(times)} of its {len(plan.pts)} frames can be decoded"
            ) from error
        raise
    with open_video(source, threads) as (container, stream):
        every = enumerate(all_frames(container, stream))
        left = len(wanted)
        for number, picture in pictures(pair for pair in every if pair[0] in wanted):
            yield number, picture
            left -= 1
            if not left:
                return


def _times(plan: Plan, stream: VideoStream) -> np.ndarray:
    return np.array(plan.pts, np.float64) * float(stream.time_base or 0)


def _decoded_times(source: Source, threads: int) -> np.ndarray:
    """The times of all frames, from a decode of the whole file. Raises VideoError if there is no frame."""
    with open_video(source, threads) as (container, stream):
        base, step = clock_of(stream)
        given = [frame.pts for frame in all_frames(container, stream)]
        if not given:
            raise no_frame(source, stream)
    return np.array(frame_times(given, step), np.float64) * float(base)

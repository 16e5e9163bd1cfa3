"""The times of a video's frames, also if the times in the file are missing or go backwards."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from fractions import Fraction

from av.video.stream import VideoStream

_REORDER = 32  # frames; no codec reorders more
LONGEST_PAUSE = 1_000_000  # frames: 11 hours at 25 a second
"""A longer one is no pause: FFmpeg adds 26.5 hours to the times of an MPEG-TS whose clock was set back by a minute."""


def clock_of(stream: VideoStream) -> tuple[Fraction, int]:
    """The seconds of a tick of the stream's clock, and the ticks of a frame at its average rate."""
    base = Fraction(stream.time_base or Fraction(1, 90000))  # PyAV 19's own type rounds products, even to 0
    return base, max(1, round(1 / ((stream.average_rate or 25) * base)))


def frame_times(given: Sequence[int | None], step: int) -> list[int]:
    """The time of each frame, from 0 at the first, always rising.

    `given`: the times of the frames in order of display. None is an unknown time (some AVI files, bare streams); it
    becomes `step` after the previous one. AVI keeps no display times, so those of B frames go back and forth; they are
    sorted. If the clock was really set back (joined recordings) or far ahead, the times go on from the last one.
    """
    filled: list[int] = []
    for time in given:
        filled.append(time if time is not None else (filled[-1] + step if filled else 0))
    times: list[int] = []
    start = 0  # of a recording
    latest = filled[0] if filled else 0
    for place in range(1, len(filled) + 1):
        if place < len(filled):
            restart = filled[place] - latest > LONGEST_PAUSE * step
            restart |= filled[place] < latest and _is_restart(filled, start, place, latest, step)
            latest = filled[place] if restart else max(latest, filled[place])
            if not restart:
                continue
        part = sorted(filled[start:place])
        begin = times[-1] + step if times else 0
        for time in part:
            time = time - part[0] + begin
            times.append(max(time, times[-1] + 1) if times else time)
        start = place
    return times


def _is_restart(times: Sequence[int], start: int, place: int, latest: int, step: int) -> bool:
    """Whether the clock was set back at `place`: further than B frames go, or to times that are already taken."""
    if latest - times[place] > _REORDER * step:
        return True
    ahead = times[place : place + _REORDER]
    taken = sorted(times[max(start, place - 2 * _REORDER) : place])
    again = 0
    for time in ahead:
        at = bisect_left(taken, time)
        again += any(abs(other - time) * 5 < step * 3 for other in taken[max(0, at - 1) : at + 1])
    return again >= min(3, len(ahead))

"""When the frames of a video are shown, where its own times do not just rise."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

_REORDER = 32  # frames: more than any codec shows out of order


def frame_times(given: Sequence[int | None], step: int) -> list[int]:
    """When each frame is shown, from 0 at the first, each later than the one before.

    `given`: the frames' times in the order of display; None for unknown: `step` after the one before (some AVI files,
    bare streams). AVI keeps no times of display, so that those of B frames go back and forth: they are sorted. Where a
    clock was really set back (joined recordings), the times go on from there.
    """
    filled: list[int] = []
    for time in given:
        filled.append(time if time is not None else (filled[-1] + step if filled else 0))
    times: list[int] = []
    start = 0  # of a recording
    latest = filled[0] if filled else 0
    for place in range(1, len(filled) + 1):
        if place < len(filled):
            restart = filled[place] < latest and _is_restart(filled, start, place, latest, step)
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
    """True if the clock was set back at `place`: further than B frames go, or to times that are taken already."""
    if latest - times[place] > _REORDER * step:
        return True
    ahead = times[place : place + _REORDER]
    taken = sorted(times[max(start, place - 2 * _REORDER) : place])
    again = 0
    for time in ahead:
        at = bisect_left(taken, time)
        again += any(abs(other - time) * 5 < step * 3 for other in taken[max(0, at - 1) : at + 1])
    return again >= min(3, len(ahead))

"""The facts about one video, as `probe` finds them and a row of a manifest stores them."""

from __future__ import annotations

import base64
import zlib
from dataclasses import dataclass

import numpy as np

from ...console import plain
from .plan import Plan


@dataclass(frozen=True, slots=True)
class Video:
    """The facts about a video file or a member of a tar shard: a row of a manifest.

    In a manifest, `path` is relative to its root, with "/" between folders. For a member of a tar it is the path of the
    shard; `member` and `offset` (bytes) give the place in it. `size` is in bytes (of the member, in a shard);
    `mtime_ns` is the file's. `label` is an index into the manifest's classes, or None. `frames` is the number of real
    frames, which the header may misstate. `width` and `height` are as displayed, after `rotation` (degrees clockwise).
    `duration` is in seconds; `fps` is the average. `colorspace` is the matrix of the first frame in FFmpeg's numbers
    (1: BT.709, 2: not stated, 5 and 6: BT.601, 9: BT.2020). `interlaced`: the first frame holds two fields. `packed` is
    the compressed decoding plan; `plan` unpacks it. A row with an `error` (one line) may lack the other facts.
    """

    path: str
    label: int | None = None
    member: str | None = None
    offset: int | None = None
    size: int = 0
    mtime_ns: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    codec: str = ""
    pix_fmt: str = ""
    rotation: int = 0
    duration: float = 0.0
    fps: float = 0.0
    colorspace: int = 2
    interlaced: bool = False
    packed: str | None = None
    error: str | None = None

    @property
    def plan(self) -> Plan | None:
        """The decoding plan, or None if the whole file must be decoded.

        Raises DamagedPlan.
        """
        return None if self.packed is None else unpack_plan(self.packed, self.frames)


def video_name(video: Video) -> str:
    """A video's name for people: see `Manifest.name`."""
    return plain(video.path if video.member is None else f"{video.path}:{video.member}")


def one_line(reason: str) -> str:
    return plain(" ".join(reason.split())) or "unknown reason"


def pack_plan(plan: Plan) -> str:
    """A plan as a short string of compressed differences. 300 frames take about 100 characters."""
    numbers = [len(plan.pts), len(plan.keyframes)]
    keys, decoded = [key for key, _ in plan.keyframes], [dts - key for key, dts in plan.keyframes]
    columns = [np.diff(np.array(column, np.int64), prepend=0) for column in (plan.pts, plan.start, keys, decoded)]
    data = np.concatenate([np.array(numbers, np.int64), *columns]).astype("<i8")
    return base64.b64encode(zlib.compress(data.tobytes(), 9)).decode()


_LONGEST_PLAN = 2**23
"""The most frames, and keyframes, of a stored plan: 77 hours at 30 a second, 134 MB."""


class DamagedPlan(ValueError):
    """The decoding plan in a manifest's row cannot be used."""


def unpack_plan(packed: str, frames: int | None = None) -> Plan:
    """The plan from the string of `pack_plan`. `frames`: its number of frames, if known. Raises DamagedPlan.

    A few bytes may unpack to gigabytes. No more is unpacked than the stated length, up to 2**23 frames.
    """
    try:
        data = base64.b64decode(packed, validate=True)
        stated = np.frombuffer(zlib.decompressobj().decompress(data, 16), "<i8")
        if len(stated) != 2 or not all(0 < number <= _LONGEST_PLAN for number in stated.tolist()):
            raise ValueError("it states an impossible length")
        count, keys = stated.tolist()
        if frames not in (None, count):
            raise ValueError(f"it has {count} frames, and the video has {frames}")
        length = 8 * (2 + 2 * count + 2 * keys)
        whole = zlib.decompressobj()
        numbers = np.frombuffer(whole.decompress(data, length + 1), np.uint8)
        if len(numbers) != length or not whole.eof:
            raise ValueError("it does not have the length it states")
        columns = np.split(numbers.view("<i8")[2:], [count, 2 * count, 2 * count + keys])
        pts, start, key, dts = (column.cumsum() for column in columns)
        if start.min() < 0 or start.max() >= keys or (np.diff(pts) <= 0).any():
            raise ValueError("it holds impossible numbers")
    except (ValueError, zlib.error) as error:
        raise DamagedPlan(f"its decoding plan in the manifest is damaged ({error}); index again") from error
    return Plan(pts.tolist(), start.tolist(), list(zip(key.tolist(), (key + dts).tolist(), strict=True)))

"""Encodes one video again, frame for frame, so that it decodes fast (see transcoder.py)."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Annotated, Literal

import av
import numpy as np
from av.container import InputContainer, OutputContainer
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Colorspace, Interpolation, VideoReformatter
from av.video.stream import VideoStream

from ...schema import Count, Range
from ...schema import check as check_fields
from ..decode.picture import Upright
from ..decode.reading import all_frames, open_video, reason
from ..decode.source import Source, VideoError
from ..decode.times import clock_of, frame_times

Preset = Literal[
    "ultrafast", "superfast", "veryfast", "faster", "fast", "medium", "slow", "slower", "veryslow", "placebo"
]
_BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M
_SAME_SHAPE = 0.02  # relative change of the aspect ratio that the rounding of sides may cause
_SCALING = Interpolation.BICUBIC | Interpolation.ACCURATE_RND  # without it, another matrix costs 3 dB
_FINEST = 1_000_000  # ticks in a second; finer clocks overflow in MP4 and H.264


class CannotWrite(Exception):
    """FFmpeg's error in writing the copy. Errors in reading the source are VideoErrors."""

    def __init__(self, error: Exception) -> None:
        super().__init__(reason(error))
        self.errno = getattr(error, "errno", None)


@dataclass(frozen=True)
class Settings:
    """The encoding of the copies. Each copy stores its settings for later runs."""

    short_side: Annotated[int, Range(16)]
    keyframe_every: Count
    crf: Annotated[float, Range(0, 51)]  # of x264: 0 is lossless, 51 the worst
    preset: Preset

    def __post_init__(self) -> None:
        check_fields(self)
        if self.short_side % 2:
            raise ValueError(f"short_side is {self.short_side}; an even number of pixels is wanted")

    def options(self) -> dict[str, str]:
        """The options for libx264.

        tune=fastdecode leaves out the loop filter and arithmetic coding: half the decoding time for a twelfth more
        bytes.
        """
        return {
            "preset": self.preset,
            "crf": str(self.crf),
            "tune": "fastdecode",
            "g": str(self.keyframe_every),
            "sc_threshold": "0",  # no extra keyframes
            "bf": "0",
            "flags": "+cgop",
            "a53cc": "0",
        }


def reencode(
    source: str, path: Path, settings: Settings, stopped: Callable[[], bool] = lambda: False
) -> tuple[list[str], Clock]:
    """Encodes every decodable frame of `source` into the MP4 file `path`, at even times.

    Returns the damage of the source, if any, and the times of its frames, for `finish`. Raises VideoError if there is
    no frame, CannotWrite for FFmpeg's errors in writing, and CancelledError if `stopped()` is true.
    """
    damage: list[str] = []
    shown = Source(source)
    with open_video(shown) as (container, stream):
        frames = _frames(container, stream, damage, stopped)
        first = next(frames, None)
        if first is None:
            raise VideoError("; ".join([f"{shown}: no frame can be decoded", *damage]))
        clock = Clock(stream)
        convert, size = _converter(str(shown), first, settings.short_side)
        with writing(path) as copy:
            rate = stream.average_rate or Fraction(25)
            rate = rate if 1 <= rate <= 1000 else Fraction(25)
            output = copy.add_stream("libx264", rate=rate, options=settings.options())
            context = output.codec_context
            context.width, context.height, context.pix_fmt = *size, "yuv420p"
            context.thread_count = 1  # the same bytes on any machine; the other cores encode other files
            context.time_base = 1 / rate
            context.colorspace, context.color_range = _BT601, ColorRange.MPEG
            context.color_primaries, context.color_trc = first.color_primaries, first.color_trc  # not converted
            if stream.sample_aspect_ratio:
                shape = stream.sample_aspect_ratio
                context.sample_aspect_ratio = 1 / shape if Upright().turned(first) else shape
            for number, frame in enumerate(chain([first], frames)):
                clock.add(frame)  # before the next lines: a picture that needs no conversion is the frame itself
                picture = convert(frame)
                picture.pts, picture.duration, picture.time_base = number, 1, 1 / rate
                picture.pict_type = 0  # the encoder decides
                with _writing_errors():
                    copy.mux(output.encode(picture))
            with _writing_errors():
                copy.mux(output.encode(None))
    return damage, clock


def finish(path: Path, copy: Path, clock: Clock, note: str) -> None:
    """Writes the packets again at the frames' times, with `note` as the comment and the index at the front."""
    times = clock.times()
    left = iter(zip(times, [*times[1:], times[-1] + clock.last], strict=True))
    with av.open(f"file:{path}") as source, writing(copy, movflags="+faststart") as container:
        container.metadata["comment"] = note
        output = container.add_stream_from_template(source.streams.video[0])
        output.time_base = clock.unit
        for packet in source.demux(video=0):
            if packet.size:
                time, after = next(left, (0, 0))  # without B frames, packets come in the frames' order
                packet.stream, packet.time_base = output, clock.unit
                packet.pts = packet.dts = time
                packet.duration = after - time
                with _writing_errors():
                    container.mux(packet)


def check(path: Path, clock: Clock) -> None:
    """Raises VideoError if the file does not hold a packet for each frame at its time."""
    times = [time * clock.unit for time in clock.times()]
    try:
        with av.open(f"file:{path}") as container:
            found = [p.pts * p.time_base for p in container.demux(video=0) if p.size and p.pts is not None]
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"the copy cannot be read back ({reason(error)})") from error
    if found != times:
        raise VideoError(f"the copy has {len(found)} frames instead of {len(times)}, or other times")


@contextlib.contextmanager
def writing(path: Path, **options: str) -> Iterator[OutputContainer]:
    """An MP4 file to write to."""
    with contextlib.ExitStack() as stack:
        with _writing_errors():
            container = av.open(f"file:{path}", "w", format="mp4", options={"fflags": "+bitexact", **options})
        stack.push(lambda *_: container.close() if _[0] else None)  # after an error the file is discarded
        yield container
        with _writing_errors():
            container.close()


@contextlib.contextmanager
def _writing_errors() -> Iterator[None]:
    try:
        yield
    except (av.FFmpegError, OSError) as error:
        raise CannotWrite(error) from error


def _frames(
    container: InputContainer, stream: VideoStream, damage: list[str], stopped: Callable[[], bool]
) -> Iterator[VideoFrame]:
    """Every decodable frame, numbered as by `decode`. At the end, `damage` lists the damage of the source."""
    count = patched = 0
    for frame in all_frames(container, stream, damage):
        if stopped():
            raise CancelledError
        count += 1
        patched += frame.is_corrupt
        yield frame
    size = os.path.getsize(container.name.removeprefix("file:"))
    end = max((entry.pos + entry.size for entry in stream.index_entries), default=0)
    if end > size:
        damage.append(f"cut short: its index goes to byte {end}, the file ends at {size}")
    if patched:
        damage.append(f"{patched} of {count} frames are damaged and patched by the decoder")


class Clock:
    """The times of a video's frames, in the order of the decoder.

    `given`: times in units of `unit` seconds, None for a frame without a time. `step`: one frame at the average rate.
    `last`: the duration of the last frame.
    """

    def __init__(self, stream: VideoStream) -> None:
        base, step = clock_of(stream)
        # MP4 counts in whole fractions of a second
        self.unit = Fraction(1, min(base.denominator, _FINEST))
        self._scale = base / self.unit
        self.step = self.last = max(1, round(step * self._scale))
        self.given: list[int | None] = []

    def add(self, frame: VideoFrame) -> None:
        self.given.append(None if frame.pts is None else round(frame.pts * self._scale))
        self.last = round((frame.duration or 0) * self._scale) or self.step

    def times(self) -> list[int]:
        return frame_times(self.given, self.step)


def _converter(
    source: str, first: VideoFrame, short_side: int
) -> tuple[Callable[[VideoFrame], VideoFrame], tuple[int, int]]:
    """A function from a frame to a small, upright BT.601 picture in yuv420p, and the (width, height) of its results."""
    upright = Upright()
    width, height = upright.size(first)
    scale = Fraction(min(short_side, width, height), min(width, height))
    # even, and never larger than the source
    even_width, even_height = (min(2 * round(side * scale / 2), side - side % 2) for side in (width, height))
    if not even_width or not even_height:
        raise VideoError(f"{source}: {width}x{height} is too small for 4:2:0 video")
    reformatter, after = VideoReformatter(), VideoReformatter()

    def convert(frame: VideoFrame) -> VideoFrame:
        now = upright.size(frame)
        if abs(now[0] * height / (now[1] * width) - 1) > _SAME_SHAPE:
            raise VideoError(
                f"{source}: the picture size changes from {width}x{height} to {now[0]}x{now[1]}; a copy would be "
                "distorted"
            )
        shown = upright.matrix(frame) is not None
        turned = upright.turned(frame)
        scaled = reformatter.reformat(
            frame,
            even_height if turned else even_width,
            even_width if turned else even_height,
            "yuv444p" if shown else "yuv420p",
            dst_colorspace=Colorspace.ITU601,
            dst_color_range=ColorRange.MPEG,
            interpolation=_SCALING,
            threads=1,
        )
        if not shown:
            return scaled
        # Turned with full chroma: subsampled chroma lies at the left pixel, and would end up above, below or right.
        planes_HWC = upright(frame, scaled.to_ndarray().transpose(1, 2, 0))
        shown_upright = VideoFrame.from_ndarray(np.ascontiguousarray(planes_HWC.transpose(2, 0, 1)), "yuv444p")
        shown_upright.colorspace, shown_upright.color_range = _BT601, ColorRange.MPEG
        return after.reformat(shown_upright, format="yuv420p", interpolation=_SCALING, threads=1)

    return convert, (even_width, even_height)

"""Small pictures and looping previews of moments, and moments cut out as files."""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorRange, Interpolation, VideoReformatter

from ..data.decode.chosen import chosen_pictures
from ..data.decode.decoder import probe
from ..data.decode.picture import EXACT_COLOR, Upright
from ..data.decode.reading import open_video
from ..data.decode.source import Source, VideoError
from ..data.remote import local_path
from ..files import replaced
from .query import Hit

_BT601 = 6  # FFmpeg's AVCOL_SPC_SMPTE170M
_TICKS = 90_000  # a second, in the files written here
_WIDTH = 320  # pixels, of stills and previews
_ROUNDING = 1e-4  # seconds
_SEEKABLE = {"mov", "matroska"}
_PREVIEW = 24  # frames, over the whole moment
_RATE = 8  # frames a second that a preview plays at

T = TypeVar("T")


def in_thread(work: Callable[..., T], *args: Any) -> T:
    """The result of a call in another thread. In the main thread, Python loses a Ctrl-C while FFmpeg reads a file."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work, *args).result()


def pictures(path: str, start: float, end: float) -> tuple[bytes, bytes]:
    """A still from the middle of a moment (JPEG), and a short preview of all of it (MP4, H.264, without sound).

    Both are 320 pixels wide at most. `end` 0 means the end of the video. Raises VideoError.
    """
    with local_path(path) as name:
        stop = end if end > start else probe(name).duration
        wanted = np.linspace(start, stop, _PREVIEW, endpoint=False)
        found: list[np.ndarray] = []
        for time, picture in _shown(name, start, stop):
            if shown := sum(wanted <= time + 1e-3) - len(found):
                found += [_small(picture())] * shown
    return _jpeg(found[len(found) // 2]), _mp4(found)


def cut(hit: Hit, folder: Path) -> Path:
    """Writes a moment as an mp4 file with its sound into a folder, and returns the file.

    The name has the video's name and the times. No file is overwritten: a number makes the name unique.
    Raises VideoError.
    """
    folder.mkdir(parents=True, exist_ok=True)
    stem = re.sub(r"[^\w. -]", "_", os.path.splitext(os.path.basename(hit.path))[0])[:60].lstrip(".") or "clip"
    number, suffix = 1, ""
    with local_path(hit.path) as name:
        while True:
            target = folder / f"{stem} {hit.start:.1f}-{hit.end:.1f}{suffix}.mp4"
            with contextlib.suppress(FileExistsError), replaced(target) as draft:  # another process may be writing it
                if not os.path.lexists(target):
                    _write(name, hit.start, hit.end if hit.end > hit.start else math.inf, draft)
                    return target
            number += 1
            suffix = f" ({number})"


def _decoded(container: Any, stream: Any, start: float, end: float) -> Iterator[tuple[float, Any]]:
    """(seconds from the video's first frame, frame) of the frames before `end`, from one at or before `start` on."""
    base = float(stream.time_base or 1)
    first = stream.start_time or 0
    if start > 0:
        with contextlib.suppress(av.FFmpegError):  # some containers cannot be searched: then from the beginning
            container.seek(int(start / base) + first, stream=stream)
    for packet in container.demux(stream):
        try:
            frames = packet.decode()
        except av.FFmpegError:
            continue
        for frame in frames:
            if frame.pts is None:
                continue
            time = (frame.pts - first) * base
            if time >= end - _ROUNDING:
                return
            yield time, frame


def _shown(path: str, start: float, end: float) -> Iterator[tuple[float, Callable[[], np.ndarray]]]:
    """(time, call for its upright RGB picture) of the frames with start <= time < end.

    Without such a frame, the frame before it, which is still shown. MP4 and Matroska seek by exact time. In other
    files, and if a seek does not arrive, all packets are read to find the frames. Raises VideoError.
    """
    exact, upright = VideoReformatter(), Upright()

    def picture(frame: VideoFrame) -> np.ndarray:
        return upright(frame, exact.reformat(frame, format="rgb24", interpolation=EXACT_COLOR, threads=1).to_ndarray())

    with open_video(path) as (container, stream):
        latest = start - _ROUNDING
        frames = _decoded(container, stream, start, end)
        first = None if _SEEKABLE.isdisjoint(container.format.name.split(",")) else next(frames, None)
        if first is not None and (first[0] <= start + _ROUNDING if start else first[0] == 0):
            for time, frame in chain([first], frames):
                if time > latest:
                    yield (latest := time), partial(picture, frame)
    if latest > start - _ROUNDING:
        return
    times: dict[int, float] = {}

    def choose(all_times: np.ndarray) -> Collection[int]:
        every = all_times - all_times[0]
        low, high = np.searchsorted(every, (start - _ROUNDING, end - _ROUNDING)).tolist()
        over = start * (len(every) - 1) >= every[-1] * len(every) > 0  # the last frame lasts as long as the others
        times.clear()
        times.update((number, max(start, every[number])) for number in range(low, high))
        if not times and not over:
            times[max(0, low - 1)] = start
        return times

    shown = False
    for number, picture_HWC in chosen_pictures(Source(path), choose):
        shown = True
        yield times[number], partial(np.asarray, picture_HWC)
    if not shown:
        raise VideoError(f"{path}: no frame can be decoded from {start:g} s on")


def _small(picture_HWC: np.ndarray) -> np.ndarray:
    """The picture with even sides, at most `_WIDTH` wide."""
    height, width = picture_HWC.shape[:2]
    scale = min(1.0, _WIDTH / width)
    frame = VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), "rgb24")
    across, down = (max(2, round(side * scale / 2) * 2 if scale < 1 else side - side % 2) for side in (width, height))
    flags = Interpolation.BICUBIC | Interpolation.ACCURATE_RND
    return frame.reformat(across, down, "rgb24", interpolation=flags).to_ndarray()


def _jpeg(picture_HWC: np.ndarray) -> bytes:
    encoder: Any = av.CodecContext.create("mjpeg", "w")
    encoder.height, encoder.width = picture_HWC.shape[:2]
    encoder.pix_fmt, encoder.time_base = "yuvj420p", Fraction(1, 25)
    encoder.options = {"qmin": "4", "qmax": "4"}
    frame = VideoFrame.from_ndarray(picture_HWC, "rgb24")  # the encoders here convert it to their own format
    return b"".join(bytes(packet) for packet in [*encoder.encode(frame), *encoder.encode(None)])


def _mp4(found: list[np.ndarray]) -> bytes:
    file = io.BytesIO()
    with av.open(file, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = _video_stream(container, found[0].shape[:2], _RATE, crf=30)
        for number, picture_HWC in enumerate(found):
            _encode(container, stream, number / _RATE, picture_HWC)
        container.mux(stream.encode(None))
    return file.getvalue()


def _video_stream(container: Any, size: tuple[int, int], rate: Any, crf: int) -> Any:
    stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "preset": "veryfast"})
    stream.height, stream.width = size
    stream.pix_fmt = "yuv420p"
    stream.codec_context.time_base = Fraction(1, _TICKS)
    stream.codec_context.colorspace, stream.codec_context.color_range = _BT601, ColorRange.MPEG
    stream.codec_context.thread_count = 1
    return stream


def _encode(container: Any, stream: Any, time: float, picture_HWC: np.ndarray) -> None:
    """Adds a picture, unless the size of the video's pictures has changed."""
    if picture_HWC.shape[:2] == (stream.height, stream.width):
        frame = VideoFrame.from_ndarray(picture_HWC, "rgb24")
        frame.pts, frame.time_base = round(time * _TICKS), Fraction(1, _TICKS)
        container.mux(stream.encode(frame))


def _write(path: str, start: float, end: float, out: Path) -> None:
    """The frames and the sound of a moment, encoded anew."""
    with av.open(f"file:{out}", "w", format="mp4", options={"movflags": "+faststart"}) as container:
        with open_video(path) as (source, stream):
            rate = stream.average_rate or 25
            sound = bool(source.streams.audio)
        video: Any = None
        # Both streams are there before the first packet is written.
        audio: Any = container.add_stream("aac", rate=48_000) if sound else None
        for time, picture in _shown(path, start, end):
            picture_HWC = picture()
            height, width = picture_HWC.shape[:2]
            picture_HWC = np.ascontiguousarray(picture_HWC[: height - height % 2, : width - width % 2])
            if video is None:
                video = _video_stream(container, picture_HWC.shape[:2], rate, crf=20)
            _encode(container, video, time - start, picture_HWC)
        container.mux(video.encode(None))
        if audio is not None:
            _sound(path, start, end, container, audio)


def _sound(path: str, start: float, end: float, container: Any, audio: Any) -> None:
    def new() -> av.AudioResampler:
        return av.AudioResampler(format="fltp", layout="stereo", rate=48_000)

    resampler, at = new(), 0
    with open_video(path) as (source, video):
        zero = float((video.start_time or 0) * (video.time_base or 0))
        stream = source.streams.audio[0]
        offset = float((stream.start_time or 0) * (stream.time_base or 0)) - zero
        for time, frame in _decoded(source, stream, start - offset, end - offset):
            if time < start - offset - _ROUNDING:
                continue
            frame.pts = at = max(at, round((time + offset - start) * 48_000))
            frame.time_base = Fraction(1, 48_000)
            at += frame.samples * 48_000 // frame.sample_rate
            try:
                parts = resampler.resample(frame)
            except ValueError:  # the rate or the channels change, as between broadcasts
                parts, resampler = resampler.resample(None), new()
                parts += resampler.resample(frame)
            for part in parts:
                container.mux(audio.encode(part))
        for part in resampler.resample(None):
            container.mux(audio.encode(part))
        container.mux(audio.encode(None))

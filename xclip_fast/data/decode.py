"""Frames out of video files, on PyAV.

Frame `i` of a video is the i-th that decoding the whole file gives, and the pixels are exactly those, mostly without
decoding the whole file. A first pass reads the packets without decoding them and finds, for each wanted frame, the
keyframe to start from; then one seek per keyframe, skipping frames that no other frame refers to on the way. Where the
packets cannot tell the frames (odd containers) or a frame on the way is damaged, the file is decoded from end to end
instead: slower, the same answer. (Damage elsewhere is not seen; frames are then numbered by their packets.)

Colours are converted to 8-bit RGB as the stream's matrix and range say; high dynamic range is not tone-mapped. Rotation
and mirroring by metadata are applied, the pixel aspect ratio is not (as in the readers that X-CLIP was trained with).
The PyAV wheel bundles FFmpeg with GPL encoders (x264, x265): mind that if you redistribute it.
"""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby
from pathlib import Path
from typing import Any, Literal

import av
import numpy as np
import torch
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from .sampling import Sampling, frame_indices

log = logging.getLogger(__name__)

# Codecs with one packet per frame, in containers that keep presentation times. Others are decoded from end to end.
_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
_CONTAINERS = {"avi", "flv", "matroska", "mov", "mpegts"}
_SKIP_UNREFERENCED = {"h264", "hevc", "mpeg4"}  # VP9 and AV1 carry entropy state across frames that show nothing else
_MPEG4_PICTURE = b"\0\0\1\xb6"
_LONGEST_SIDE = 16384  # of a resized frame: a bound on memory for absurdly narrow videos


class VideoError(ValueError):
    """A video file that cannot be used. One line: the file and what is wrong with it."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` finds. `width` and `height` are as displayed, after `rotation` (degrees clockwise: 0, 90, 180, 270);
    `frames` counts the frames there are, whatever the header says; `duration` is in seconds; `fps` is the average."""

    frames: int
    width: int
    height: int
    codec: str
    pix_fmt: str
    rotation: int
    duration: float
    fps: float


def decode(
    path: str | os.PathLike[str],
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    size: int = 224,
    stride: int = 1,
    rng: np.random.Generator | None = None,
    threads: int = 1,
) -> torch.Tensor:
    """Sampled frames of one video: uint8 (frames, size, size, 3), RGB.

    `sampling`, `stride` and `rng` are those of `frame_indices`; a video with fewer frames than asked repeats them. Each
    frame is resized to a short side of size * 256 / 224 (bilinear) and cropped in the centre: the paper's test view.
    `threads` is for the decoder of this one file; with many files give them a thread each instead (`decode_many`).
    Raises VideoError.
    """
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1 pixel")
    convert = _centre_crop(size, path)
    arrays = _pick(path, lambda total: frame_indices(total, frames, sampling, stride=stride, rng=rng), convert, threads)
    return torch.from_numpy(np.stack(arrays))


def decode_frames(path: str | os.PathLike[str], indices: Sequence[int] | np.ndarray, *, threads: int = 1) -> np.ndarray:
    """The frames of these numbers, in this order, full size: uint8 (n, H, W, 3), RGB.

    Raises VideoError for a bad file or one whose picture size changes, IndexError for a frame that is not there.
    """
    wanted = [int(index) for index in indices]
    if not wanted:
        raise ValueError(f"{path}: no frame numbers given")

    def choose(total: int) -> list[int]:
        if not 0 <= min(wanted) <= max(wanted) < total:
            raise IndexError(f"{path}: has frames 0 to {total - 1}; asked for {min(wanted)} to {max(wanted)}")
        return wanted

    arrays = _pick(path, choose, _full_size(), threads)
    if len({array.shape for array in arrays}) > 1:
        raise VideoError(f"{path}: the picture size changes within the video; use decode(), which resizes")
    return np.stack(arrays)


def decode_many(
    paths: Iterable[str | os.PathLike[str]],
    frames: int = 8,
    sampling: Sampling = "sparse",
    *,
    size: int = 224,
    stride: int = 1,
    workers: int | None = None,
    errors: Literal["raise", "return"] = "raise",
) -> Iterator[torch.Tensor | VideoError]:
    """`decode` of each path, in order, by a pool of threads (PyAV gives up the GIL); default one thread per core.

    At most two results per worker wait in memory. A bad file raises its VideoError at its place in the order or, with
    `errors="return"`, stands there instead of the frames.
    """
    if errors not in ("raise", "return"):
        raise ValueError(f"errors is {errors!r}; it must be 'raise' or 'return'")
    if workers is None:
        workers = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    waiting: deque[Future[torch.Tensor]] = deque()

    def finished() -> torch.Tensor | VideoError:
        try:
            return waiting.popleft().result()
        except VideoError as error:
            if errors == "raise":
                raise
            return error

    try:
        for path in paths:
            waiting.append(pool.submit(decode, path, frames, sampling, size=size, stride=stride))
            if len(waiting) >= 2 * workers:
                yield finished()
        while waiting:
            yield finished()
    finally:
        pool.shutdown(cancel_futures=True)


def probe(path: str | os.PathLike[str]) -> VideoInfo:
    """Size, codec, timing and true frame count. Decodes one frame, or all where the packets cannot be counted.

    Raises VideoError.
    """
    with _open(path) as (container, stream):
        plan = _plan(container, stream)
    with _open(path) as (container, stream):
        codec = stream.codec_context.codec.canonical_name
        frames = _all_frames(container, stream)
        first = next(frames, None)
        if first is None:
            raise VideoError(f"{path}: no frame can be decoded ({codec})")
        height, width = _upright(first, np.empty((first.height, first.width, 1))).shape[:2]
        times = plan.pts if plan else [first.pts, *(frame.pts for frame in frames)]
        count, known = len(times), [time for time in times if time is not None]
        span = (max(known) - min(known)) * (stream.time_base or 0) if known else 0
        # The span of n frames is n - 1 intervals; the last frame lasts as long as the others did on average.
        rate = (count - 1) / span if span else stream.average_rate or 25
        duration = float(count / rate)
        return VideoInfo(
            count, width, height, codec, first.format.name, -first.rotation % 360, duration, count / duration
        )


@contextmanager
def _open(path: str | os.PathLike[str], threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream. Every FFmpeg error inside leaves as a VideoError."""
    file = Path(path)
    if file.is_dir():
        raise VideoError(f"{path}: is a directory, not a video file")
    if not file.exists():
        raise VideoError(f"{path}: no such file")
    if not file.is_file():  # opening a pipe or a device could wait for ever
        raise VideoError(f"{path}: is not a regular file")
    if not file.stat().st_size:
        raise VideoError(f"{path}: is empty (zero bytes)")
    # A text file may read as a playlist: "file:" and the white list keep FFmpeg from fetching what it names.
    options = {"protocol_whitelist": "file", "fflags": "+discardcorrupt"}
    try:
        container = av.open(f"file:{os.fspath(path)}", options=options)
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be opened as a video ({_reason(error)})") from error
    try:
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos or container.format.name == "tty":  # FFmpeg "plays" any text as a terminal session
            kinds: list[str] = sorted({s.type for s in container.streams if s.type != "video"})
            raise VideoError(f"{path}: has no video stream (only: {', '.join(kinds) or 'text or a cover picture'})")
        best = container.streams.best("video")
        stream = best if isinstance(best, VideoStream) and best in videos else videos[0]
        if stream.codec_context is None:
            raise VideoError(f"{path}: this build of FFmpeg has no decoder for its video codec")
        stream.codec_context.thread_count = threads
        if threads != 1:
            stream.thread_type = "AUTO"
        yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{path}: cannot be read ({_reason(error)})") from error
    finally:
        container.close()


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets up to the end of the file, or to where it cannot be read further."""
    packets = container.demux(stream)
    while True:
        try:
            packet = next(packets)
        except (StopIteration, av.EOFError):
            return
        except av.FFmpegError as error:
            log.warning("%s: %s; using the frames before that", container.name.removeprefix("file:"), _reason(error))
            return
        if packet.size:  # PyAV ends with an empty packet
            yield packet


def _all_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame, by decoding from end to end. A packet that fails to decode is passed over."""
    for packet in chain(_packets(container, stream), (None,)):  # None drains the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            log.info("%s: %s; packet passed over", container.name.removeprefix("file:"), _reason(error))
            continue
        yield from frames


@dataclass(frozen=True)
class _Plan:
    """What the packets tell: each frame's pts, in order of display; the number of the keyframe to start from to get it;
    and the (pts, dts) of each keyframe, in order of decoding."""

    pts: list[int]
    start: list[int]
    keyframes: list[tuple[int, int]]


def _plan(container: InputContainer, stream: VideoStream) -> _Plan | None:
    """Read all packets, decode none. None where packets and frames need not match one to one."""
    codec = stream.codec_context.codec.canonical_name
    formats = container.format.name.split(",")
    if codec not in _CODECS or _CONTAINERS.isdisjoint(formats):
        return None
    if "avi" in formats and codec in ("h264", "hevc") and stream.codec_context.has_b_frames:
        return None  # AVI keeps no presentation times, and nothing rebuilds them for these codecs
    keyframes: list[tuple[int, int]] = []
    frames: list[tuple[int, int]] = []
    for packet in _packets(container, stream):
        if packet.pts is None or (codec == "mpeg4" and not _holds_one_picture(packet)):
            return None
        if packet.is_keyframe:
            keyframes.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        # With an open group of pictures, frames shown before their keyframe need the keyframe before that.
        start = len(keyframes) - 1
        while start >= 0 and keyframes[start][0] > packet.pts:
            start -= 1
        if start < 0:
            return None
        if not packet.is_discard:  # an edit list hides it: the decoder needs it, but no frame comes out
            frames.append((packet.pts, start))
    frames.sort()
    pts = [time for time, _ in frames]
    if not pts or len(set(pts)) < len(pts) or len({key for key, _ in keyframes}) < len(keyframes):
        return None
    return _Plan(pts, [start for _, start in frames], keyframes)


def _holds_one_picture(packet: av.Packet) -> bool:
    """False for MPEG-4 packets of two pictures ("packed bitstream") and for the few bytes that say "as before"."""
    data = bytes(packet)
    at = data.find(_MPEG4_PICTURE)
    return data.count(_MPEG4_PICTURE) == 1 and (len(data) > 12 or (data + b"\0")[at + 4] >> 6 == 2)  # 2: a B picture


def _by_plan(
    container: InputContainer,
    stream: VideoStream,
    plan: _Plan,
    numbers: Sequence[int],
    convert: Callable[[VideoFrame], np.ndarray],
) -> dict[int, np.ndarray] | None:
    """The converted frames of these sorted numbers, or None if the file does not behave as planned."""
    context = stream.codec_context
    skips = context.codec.canonical_name in _SKIP_UNREFERENCED
    found: dict[int, np.ndarray] = {}
    for start, group in groupby(numbers, plan.start.__getitem__):
        targets = {plan.pts[number]: number for number in group}
        packets = _packets_from(container, stream, plan, start)
        to_send = len(targets)
        while to_send:
            packet = next(packets, None)
            wanted = packet is not None and packet.pts in targets and not packet.is_discard
            if skips:
                # "Unreferenced" frames may be left out on the way; asked for themselves, they are decoded.
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames = context.decode(packet)
                to_send -= wanted
                if not to_send and packet is not None:
                    frames += context.decode(None)  # no need to feed it packets until it gives the last
            except av.FFmpegError:
                return None
            for frame in frames:
                if frame.pts is None or (frame.is_corrupt and frame.pts >= plan.keyframes[start][0]):
                    return None  # how damage is patched up depends on all that was decoded before
                if frame.pts in targets:
                    found[targets[frame.pts]] = convert(frame)
            if packet is None:
                break
    return found if len(found) == len(numbers) else None


def _packets_from(container: InputContainer, stream: VideoStream, plan: _Plan, start: int) -> Iterator[av.Packet]:
    """Packets from this keyframe on. None at all if the container cannot be brought there."""
    order = {pts: number for number, (pts, _) in enumerate(plan.keyframes)}
    target = plan.keyframes[start][0]
    # Some containers seek by presentation time, some by decoding time.
    for time in dict.fromkeys((*plan.keyframes[start], plan.keyframes[0][1])):
        container.seek(time, stream=stream)
        packets = _packets(container, stream)
        first = next(packets, None)
        if first is not None and first.is_keyframe and order.get(first.pts or 0, start + 1) <= start:
            yield from dropwhile(lambda packet: packet.pts != target, chain((first,), packets))
            return


def _upright(frame: VideoFrame, array: np.ndarray) -> np.ndarray:
    """The picture (H, W, C) as it is to be shown: the nearest quarter turn and mirroring to its display matrix."""
    matrix: Any = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return array
    a, b, _, c, d = np.frombuffer(matrix, np.int32)[:5].astype(np.int64)  # x' = a x + c y, y' = b x + d y
    if abs(a) + abs(d) >= abs(b) + abs(c):
        flip_y, flip_x = d < 0, a < 0
    else:
        array = array.transpose(1, 0, 2)
        flip_y, flip_x = b < 0, c < 0
    return array[:: -1 if flip_y else 1, :: -1 if flip_x else 1]


def _full_size() -> Callable[[VideoFrame], np.ndarray]:
    reformatter = VideoReformatter()
    return lambda frame: _upright(frame, reformatter.reformat(frame, format="rgb24", threads=1).to_ndarray())


def _centre_crop(size: int, path: str | os.PathLike[str]) -> Callable[[VideoFrame], np.ndarray]:
    """A function from frame to uint8 (size, size, 3) that keeps one scaler for all frames of this file."""
    reformatter = VideoReformatter()
    short = round(size * 256 / 224)

    def convert(frame: VideoFrame) -> np.ndarray:
        scale = short / min(frame.width, frame.height)
        width, height = max(short, round(frame.width * scale)), max(short, round(frame.height * scale))
        if max(width, height) > _LONGEST_SIDE:
            raise VideoError(f"{path}: {frame.width}x{frame.height} is too narrow to crop a square from")
        resized = reformatter.reformat(
            frame, width, height, "rgb24", interpolation=Interpolation.BILINEAR, threads=1
        ).to_ndarray()
        upright = _upright(frame, resized)
        top, left = (upright.shape[0] - size) // 2, (upright.shape[1] - size) // 2
        return np.ascontiguousarray(upright[top : top + size, left : left + size])

    return convert


def _pick(
    path: str | os.PathLike[str],
    choose: Callable[[int], Sequence[int] | np.ndarray],
    convert: Callable[[VideoFrame], np.ndarray],
    threads: int,
) -> list[np.ndarray]:
    """The converted frames that `choose(frame count)` names, in its order."""
    with _open(path, threads) as (container, stream):
        plan = _plan(container, stream)
        if plan is not None:
            numbers = [int(number) for number in choose(len(plan.pts))]
            found = _by_plan(container, stream, plan, sorted(set(numbers)), convert)
            if found is not None:
                return [found[number] for number in numbers]
            log.info("%s: seeking did not give the frames its packets promise; decoding it from end to end", path)
    with _open(path, threads) as (container, stream):
        total = sum(1 for _ in _all_frames(container, stream))
        if not total:
            raise VideoError(f"{path}: no frame can be decoded ({stream.codec_context.codec.canonical_name})")
    numbers = [int(number) for number in choose(total)]
    wanted, last = set(numbers), max(numbers)
    with _open(path, threads) as (container, stream):
        found = {}
        for number, frame in enumerate(_all_frames(container, stream)):
            if number in wanted:
                found[number] = convert(frame)
            if number == last:
                break
    return [found[number] for number in numbers]

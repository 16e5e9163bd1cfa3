"""One video file: opening it, reading its packets, and the plan that gets single frames out of it.

Reading the packets without decoding them tells, for each frame, the keyframe to start from. With that plan a frame
costs one seek and the frames since its keyframe, less those that nothing refers to. A plan can be stored and used
again; then the packets need not be read through, which takes the whole file.
"""

from __future__ import annotations

import logging
import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain, dropwhile, groupby
from pathlib import Path

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

log = logging.getLogger("xclip_fast.data.decode")

# Codecs with one packet per frame, in containers that keep presentation times. Others are decoded from end to end.
_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
_CONTAINERS = {"avi", "flv", "matroska", "mov", "mpegts"}
_SKIP_UNREFERENCED = {"h264", "hevc", "mpeg4"}  # VP9 and AV1 carry entropy state across frames that show nothing else
_MPEG4_PICTURE = b"\0\0\1\xb6"


class VideoError(ValueError):
    """A video file that cannot be used. One line: the file and what is wrong with it."""


@dataclass(frozen=True)
class Plan:
    """What the packets tell: each frame's pts, in order of display; the number of the keyframe to start from to get it;
    and the (pts, dts) of each keyframe, in order of decoding. Times are in units of the stream's time base."""

    pts: list[int]
    start: list[int]
    keyframes: list[tuple[int, int]]


@dataclass(frozen=True)
class Source:
    """Where a video is: a file, or with `offset` and `size` (bytes) a member of an uncompressed tar file.

    `plan`: one made before (`probe`), to save reading all packets. `size` without `offset` is the size the file had
    then; if it has another now, or does not behave as planned, it is planned anew. Give it: without, an mp4 is known by
    its index, but of other containers a changed file of equal timing would pass, with the frames of those times.
    """

    path: str
    offset: int | None = None
    size: int | None = None
    plan: Plan | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """For people: unprintable characters escaped, so that it fits on a line and any terminal."""
        name = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in self.path)
        return name if self.offset is None else f"{name} (byte {self.offset})"


def as_source(path: str | os.PathLike[str] | Source) -> Source:
    return path if isinstance(path, Source) else Source(os.fspath(path))


@contextmanager
def open_video(path: str | os.PathLike[str] | Source, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream. Every FFmpeg error inside leaves as a VideoError."""
    source = as_source(path)
    # A text file may read as a playlist: "file:" and the white list keep FFmpeg from fetching what it names.
    url, protocols = f"file:{source.path}", "file"
    _check_file(source)
    if source.offset is not None and source.size is not None:
        # Read by FFmpeg itself, without Python in between. A comma in the file's name does no harm after the ",,:".
        url, protocols = f"subfile,,start,{source.offset},end,{source.offset + source.size},,:{url}", "file,subfile"
    try:
        container = av.open(
            url,
            options={"protocol_whitelist": protocols, "fflags": "+discardcorrupt"},
            metadata_errors="replace",  # titles are in any encoding
        )
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{source}: cannot be opened as a video ({reason(error)})") from error
    try:
        if is_picture(container):
            raise VideoError(f"{source}: is a picture, not a video")
        videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
        if not videos or container.format.name == "tty":  # FFmpeg "plays" any text as a terminal session
            kinds: list[str] = sorted({s.type for s in container.streams if s.type != "video"})
            raise VideoError(f"{source}: has no video stream (only: {', '.join(kinds) or 'text or a cover picture'})")
        best = container.streams.best("video")
        stream = best if isinstance(best, VideoStream) and best in videos else videos[0]
        if stream.codec_context is None:
            raise VideoError(f"{source}: this build of FFmpeg has no decoder for its video codec")
        stream.codec_context.thread_count = threads
        if threads != 1:
            stream.thread_type = "AUTO"
        yield container, stream
    except (av.FFmpegError, OSError) as error:
        raise VideoError(f"{source}: cannot be read ({reason(error)})") from error
    finally:
        container.close()


def is_picture(container: InputContainer) -> bool:
    """Whether this is a file format of still pictures, which FFmpeg would play as a video of one frame."""
    name = container.format.name
    still = container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1")  # they share MP4's form
    return still or name == "image2" or name.endswith("_pipe")


def _check_file(source: Source) -> None:
    file = Path(source.path)
    if "\0" in source.path:
        raise VideoError(f"{source}: no file can have this name")
    if file.is_dir():
        raise VideoError(f"{source}: is a directory, not a video file")
    if not file.exists():
        raise VideoError(f"{source}: no such file")
    if not file.is_file():  # opening a pipe or a device could wait for ever
        raise VideoError(f"{source}: is not a regular file")
    length = file.stat().st_size
    if not length or (source.size == 0 and source.offset is not None):
        raise VideoError(f"{source}: is empty (zero bytes)")
    if source.offset is not None:
        _check_member(source, length)


def _check_member(source: Source, length: int) -> None:
    """Refuse a tar member that is plainly no longer where it was."""
    if source.size is None or source.offset is None or source.offset < 0 or source.size < 0:
        raise ValueError(f"{source}: a member of a tar file needs an offset and a size; got size {source.size}")
    if source.offset + source.size > length:
        raise VideoError(
            f"{source}: the tar file ends before this member does; it is cut off, or changed: index it again"
        )
    try:
        with open(source.path, "rb") as file:
            file.seek(max(0, source.offset - 512))
            header = file.read(512)
    except OSError as error:
        raise VideoError(f"{source}: cannot be opened as a video ({reason(error)})") from error
    digits = header[124:136].strip(b"\0 ")  # octal; other forms, for huge members, are taken as they are
    if header[257:262] == b"ustar" and digits.isdigit() and int(digits, 8) != source.size:
        raise VideoError(f"{source}: the tar file has another member in this place; it has changed: index it again")


def reason(error: Exception) -> str:
    """FFmpeg's own words, without number and file name."""
    return getattr(error, "strerror", None) or str(error)


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets up to the end of the file, or to where it cannot be read further."""
    packets = container.demux(stream)
    try:
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                return
            except av.FFmpegError as error:
                log.warning("%s: %s; using the frames before that", _name(container), reason(error))
                return
            if packet.size:  # PyAV ends with an empty packet
                yield packet
    finally:
        packets.close()  # type: ignore[attr-defined]  # left to the garbage collector, PyAV leaks 150 bytes


def all_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame, by decoding from end to end. A packet that fails to decode is passed over."""
    for packet in chain(packets_of(container, stream), (None,)):  # None drains the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            log.info("%s: %s; packet passed over", _name(container), reason(error))
            continue
        yield from frames


def _name(container: InputContainer) -> str:
    return str(Source(container.name.rpartition(",,:")[2].removeprefix("file:")))


def can_plan(container: InputContainer, stream: VideoStream) -> bool:
    """Whether packets and frames match one to one, as far as the kinds of container and codec tell."""
    codec = stream.codec_context.codec.canonical_name
    formats = container.format.name.split(",")
    if codec not in _CODECS or _CONTAINERS.isdisjoint(formats):
        return False
    # AVI keeps no presentation times, and nothing rebuilds them for these codecs.
    return not ("avi" in formats and codec in ("h264", "hevc") and stream.codec_context.has_b_frames)


def make_plan(container: InputContainer, stream: VideoStream) -> Plan | None:
    """Read all packets, decode none. None where packets and frames need not match one to one."""
    if not can_plan(container, stream):
        return None
    codec = stream.codec_context.codec.canonical_name
    keyframes: list[tuple[int, int]] = []
    frames: list[tuple[int, int]] = []
    for packet in packets_of(container, stream):
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
    return Plan(pts, [start for _, start in frames], keyframes)


def _holds_one_picture(packet: av.Packet) -> bool:
    """False for MPEG-4 packets of two pictures ("packed bitstream") and for the few bytes that say "as before"."""
    data = bytes(packet)
    at = data.find(_MPEG4_PICTURE)
    return data.count(_MPEG4_PICTURE) == 1 and (len(data) > 12 or (data + b"\0")[at + 4] >> 6 == 2)  # 2: a B picture


def still_fits(plan: Plan, source: Source, container: InputContainer, stream: VideoStream) -> bool:
    """Whether the file can still be the one that the plan was made of, as far as that is seen without reading it."""
    if not can_plan(container, stream) or not plan.pts:
        return False
    if source.size is not None:  # of a tar member, `open_video` has compared it with the archive's own entry
        return source.offset is not None or os.stat(source.path).st_size == source.size
    if "mov" in container.format.name.split(",") and len(stream.index_entries):
        # mp4 lists all samples in front (a fragmented one only some, and is planned anew each time).
        entries = [(entry.timestamp, entry.is_keyframe, entry.is_discard) for entry in stream.index_entries]
        shown = sum(not hidden for _, _, hidden in entries)
        return shown == len(plan.pts) and [time for time, key, _ in entries if key] == [
            dts for _, dts in plan.keyframes
        ]
    return True


def by_plan(
    container: InputContainer,
    stream: VideoStream,
    plan: Plan,
    numbers: Sequence[int],
    take: Callable[[int, VideoFrame], None],
) -> bool:
    """Hand the frames of these sorted numbers to `take`. False if the file does not behave as planned."""
    frames = planned_frames(container, stream, plan, numbers)
    while True:
        try:
            take(*next(frames))
        except StopIteration as end:
            return end.value


def planned_frames(
    container: InputContainer, stream: VideoStream, plan: Plan, numbers: Sequence[int]
) -> Generator[tuple[int, VideoFrame], None, bool]:
    """Yields the frames of these sorted numbers. Returns False if the file does not behave as planned."""
    context = stream.codec_context
    skips = context.codec.canonical_name in _SKIP_UNREFERENCED
    for start, group in groupby(numbers, plan.start.__getitem__):
        targets = {plan.pts[number]: number for number in group}
        packets = _packets_from(container, stream, plan, start)
        to_send = len(targets)
        while to_send:
            packet = next(packets, None)
            shown = packet is not None and not packet.is_discard
            if packet is not None and shown and not _among(plan.pts, packet.pts):
                return False  # a frame that the plan knows nothing of: the numbers after it would be wrong
            wanted = packet is not None and shown and packet.pts in targets
            if skips:
                # "Unreferenced" frames may be left out on the way; asked for themselves, they are decoded.
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames = context.decode(packet)
                to_send -= wanted
                if not to_send and packet is not None and targets.keys() - {frame.pts for frame in frames}:
                    frames += context.decode(None)  # no need to feed it packets until it gives the last
            except av.FFmpegError:
                return False
            for frame in frames:
                if frame.pts is None or (frame.is_corrupt and frame.pts >= plan.keyframes[start][0]):
                    return False  # how damage is patched up depends on all that was decoded before
                if frame.pts in targets:
                    yield targets.pop(frame.pts), frame
            if packet is None:
                break
        if targets:
            return False
    return True


def _among(times: Sequence[int], time: int | None) -> bool:
    if time is None:
        return False
    at = bisect_left(times, time)
    return at < len(times) and times[at] == time


def _packets_from(container: InputContainer, stream: VideoStream, plan: Plan, start: int) -> Iterator[av.Packet]:
    """Packets from this keyframe on. None at all if the container cannot be brought there."""
    order = {pts: number for number, (pts, _) in enumerate(plan.keyframes)}
    target = plan.keyframes[start][0]
    # Some containers seek by presentation time, some by decoding time.
    for time in dict.fromkeys((*plan.keyframes[start], plan.keyframes[0][1])):
        try:
            container.seek(time, stream=stream)
        except av.FFmpegError:
            continue
        packets = packets_of(container, stream)
        first = next(packets, None)
        if first is not None and first.is_keyframe and order.get(first.pts or 0, start + 1) <= start:
            yield from dropwhile(lambda packet: packet.pts != target, chain((first,), packets))
            return

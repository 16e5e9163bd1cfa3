"""The plan that gets single frames out of one video file.

Reading the packets without decoding them tells, for each frame, the keyframe to start from. With that plan a frame
costs one seek and the frames since its keyframe, less those that nothing refers to. A plan can be stored and used
again; then the packets need not be read through, which takes the whole file.
"""

from __future__ import annotations

import os
from bisect import bisect_left
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .fields import may_hold_fields
from .reading import Source, VideoError, lacks_memory, limit, name_of, packets_of

# Codecs with one packet per frame, in containers that keep presentation times. Others are decoded from end to end.
_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
_CONTAINERS = {"avi", "flv", "matroska", "mov", "mpegts"}
_SKIP_UNREFERENCED = {"h264", "hevc", "mpeg4"}  # VP9 and AV1 carry entropy state across frames that show nothing else
_MPEG4_PICTURE = b"\0\0\1\xb6"


@dataclass(frozen=True)
class Plan:
    """Facts read from the packets: each frame's pts, in order of display; the keyframe to start from to get it;
    and the (pts, dts) of each keyframe, in order of decoding. Times are in units of the stream's time base."""

    pts: list[int]
    start: list[int]
    keyframes: list[tuple[int, int]]


def can_plan(container: InputContainer, stream: VideoStream) -> bool:
    """True if packets and frames match one to one, as far as container and codec tell."""
    codec = stream.codec_context.codec.canonical_name
    formats = container.format.name.split(",")
    if codec not in _CODECS or _CONTAINERS.isdisjoint(formats):
        return False
    # AVI keeps no presentation times, and nothing rebuilds them for these codecs.
    return not ("avi" in formats and codec in ("h264", "hevc") and stream.codec_context.has_b_frames)


def make_plan(container: InputContainer, stream: VideoStream, verify: bool = False) -> Plan | None:
    """Reads all packets, decodes none. None where packets and frames need not match one to one.

    A packet of interlaced H.264 may be a frame or one of its two fields. `verify` decodes such a stream, and gives the
    plan if every packet gave the frame that it stands for. Without `verify` such a stream has no plan.

    Raises VideoError for more than XCLIP_FAST_MAX_FRAMES packets.
    """
    if not can_plan(container, stream):
        return None
    context, most = stream.codec_context, limit("XCLIP_FAST_MAX_FRAMES")
    codec = context.codec.canonical_name
    check = codec == "h264" and may_hold_fields(context.extradata)
    if check and not verify:
        return None
    decoded: list[int | None] = []
    keyframes: list[tuple[int, int]] = []
    frames: list[tuple[int, int]] = []
    for packet in packets_of(container, stream):
        if len(frames) >= most:
            raise VideoError(
                f"{name_of(container)}: has more than {most} frames; the environment variable XCLIP_FAST_MAX_FRAMES "
                "allows more"
            )
        if check:
            decoded += _times(context, packet)
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
    if check and decoded + _times(context, None) != pts:
        return None
    return Plan(pts, [start for _, start in frames], keyframes)


def _times(context: VideoCodecContext, packet: av.Packet | None) -> list[int | None]:
    """When the frames are shown that the decoder gives for this packet."""
    try:
        return [frame.pts for frame in context.decode(packet)]
    except av.FFmpegError as error:
        if lacks_memory(error):
            raise
        return []


def _holds_one_picture(packet: av.Packet) -> bool:
    """False for MPEG-4 packets of two pictures ("packed bitstream") and for the few bytes that say "as before"."""
    data = bytes(packet)
    at = data.find(_MPEG4_PICTURE)
    return data.count(_MPEG4_PICTURE) == 1 and (len(data) > 12 or (data + b"\0")[at + 4] >> 6 == 2)  # 2: a B picture


def still_fits(plan: Plan, source: Source, container: InputContainer, stream: VideoStream) -> bool:
    """False if the file is not the one that the plan was made of. Does not read the file through."""
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
            except av.FFmpegError as error:
                if lacks_memory(error):
                    raise
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

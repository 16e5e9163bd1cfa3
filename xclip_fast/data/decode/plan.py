"""The plan for decoding single frames of one video file.

The packets tell, without decoding, the keyframe from which each frame can be decoded. With that plan a frame costs one
seek and the decoding of the frames since its keyframe, without those that no other frame refers to. A plan can be
stored and used again. Otherwise all packets of the file must be read.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, dropwhile, groupby, pairwise

import av
from av.container import InputContainer
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from .fields import may_hold_fields
from .reading import lacks_memory, name_of, packets_of
from .source import ReadError, Source, limit
from .times import LONGEST_PAUSE, clock_of

# Codecs with one packet for each frame, in containers that keep presentation times. Other files are decoded whole.
_CODECS = {"av1", "h264", "hevc", "mjpeg", "mpeg4", "vp9"}
_CONTAINERS = {"avi", "flv", "matroska", "mov", "mpegts"}
_SKIP_UNREFERENCED = {"h264", "hevc", "mpeg4"}  # VP9 and AV1 need skipped frames for their entropy state
_MPEG4_PICTURE = b"\0\0\1\xb6"


@dataclass(frozen=True)
class Plan:
    """Facts from the packets. Times are in units of the stream's time base.

    pts: of each frame, in order of display. start: for each frame, the number of the keyframe to decode from.
    keyframes: (pts, dts) of each keyframe, in order of decoding.
    """

    pts: list[int]
    start: list[int]
    keyframes: list[tuple[int, int]]


class PlanFails(Exception):
    """The file does not follow the plan."""


def can_plan(container: InputContainer, stream: VideoStream) -> bool:
    """Whether packets and frames match one to one, by the container and the codec."""
    codec = stream.codec_context.codec.canonical_name
    formats = container.format.name.split(",")
    if codec not in _CODECS or _CONTAINERS.isdisjoint(formats):
        return False
    # AVI keeps no presentation times, and nothing rebuilds them for these codecs.
    return not ("avi" in formats and codec in ("h264", "hevc") and stream.codec_context.has_b_frames)


def make_plan(container: InputContainer, stream: VideoStream, verify: bool = False) -> Plan | None:
    """The plan from all packets, without decoding. None if packets and frames may not match one to one.

    A packet of interlaced H.264 may be a frame or one of its two fields. `verify` decodes such a stream and returns the
    plan if every packet gives one frame. Without `verify` such a stream has no plan.

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
    latest = -(2**63)  # dts
    for packet in packets_of(container, stream):
        if len(frames) >= most:
            raise ReadError(
                f"{name_of(container)}: has more than {most} frames; the environment variable XCLIP_FAST_MAX_FRAMES "
                "allows more"
            )
        if check:
            decoded += _times(context, packet)
        if packet.pts is None or (codec == "mpeg4" and not _holds_one_picture(packet)):
            return None
        if packet.dts is not None:
            if packet.dts < latest:  # the clock was set back (joined recordings): times do not give the order
                return None
            latest = packet.dts
        if packet.is_keyframe:
            keyframes.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
        # In an open group of pictures, frames shown before their keyframe need the previous keyframe.
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
    longest = LONGEST_PAUSE * clock_of(stream)[1]
    if any(after - time > longest for time, after in pairwise(pts)):
        return None
    if check and decoded + _times(context, None) != pts:
        return None
    return Plan(pts, [start for _, start in frames], keyframes)


def _times(context: VideoCodecContext, packet: av.Packet | None) -> list[int | None]:
    """The times of the frames that the decoder gives for this packet."""
    try:
        return [frame.pts for frame in context.decode(packet)]
    except av.FFmpegError as error:
        if lacks_memory(error):
            raise
        return []


def _holds_one_picture(packet: av.Packet) -> bool:
    """False for an MPEG-4 packet of two pictures ("packed bitstream"), and for one that only repeats a picture."""
    data = bytes(packet)
    at = data.find(_MPEG4_PICTURE)
    return data.count(_MPEG4_PICTURE) == 1 and (len(data) > 12 or (data + b"\0")[at + 4] >> 6 == 2)  # 2: a B picture


def still_fits(plan: Plan, source: Source, container: InputContainer, stream: VideoStream) -> bool:
    """False if the plan belongs to another file, by the file's size. Reads no packets."""
    if not can_plan(container, stream) or not plan.pts:
        return False
    # `open_video` has compared a tar member with the archive's header
    return source.offset is not None or os.stat(source.path).st_size == source.size


def planned_frames(
    container: InputContainer, stream: VideoStream, plan: Plan, numbers: Sequence[int]
) -> Iterator[tuple[int, VideoFrame]]:
    """Yields the frames of these sorted numbers. Raises PlanFails if the file does not follow the plan."""
    context, known = stream.codec_context, set(plan.pts)
    skips = context.codec.canonical_name in _SKIP_UNREFERENCED
    for start, group in groupby(numbers, plan.start.__getitem__):
        targets = {plan.pts[number]: number for number in group}
        packets = _packets_from(container, stream, plan, start)
        to_send = len(targets)
        while to_send:
            packet = next(packets, None)
            shown = packet is not None and not packet.is_discard
            if packet is not None and shown and packet.pts not in known:
                raise PlanFails  # a frame that is not in the plan: later numbers would be wrong
            wanted = packet is not None and shown and packet.pts in targets
            if skips:
                # Frames that no other frame refers to are skipped, unless they are wanted themselves.
                context.skip_frame = "DEFAULT" if wanted else "NONREF"
            try:
                frames = context.decode(packet)
                to_send -= wanted
                if not to_send and packet is not None and targets.keys() - {frame.pts for frame in frames}:
                    frames += context.decode(None)  # flushed, so that it needs no further packets
            except av.FFmpegError as error:
                if lacks_memory(error):
                    raise
                raise PlanFails from error
            for frame in frames:
                if frame.pts is None or (frame.is_corrupt and frame.pts >= plan.keyframes[start][0]):
                    raise PlanFails  # the concealment of damage depends on all earlier frames
                if frame.pts in targets:
                    yield targets.pop(frame.pts), frame
            if packet is None:
                break
        if targets:
            raise PlanFails


def _packets_from(container: InputContainer, stream: VideoStream, plan: Plan, start: int) -> Iterator[av.Packet]:
    """The packets from this keyframe on. No packets if the container cannot seek there."""
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

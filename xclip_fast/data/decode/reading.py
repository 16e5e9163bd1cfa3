"""Opens one video file and reads its packets and frames, within fixed limits.

FFmpeg reads through `File`, so a failed read (a broken disk, a lost network share) is never taken for the end of the
file. FFmpeg gets one open file and a list of formats. It opens no other file and no network address.
"""

from __future__ import annotations

import errno
import logging
import os
from collections.abc import Iterator
from contextlib import closing, contextmanager
from itertools import chain
from typing import Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ...console import plain
from ..threads import progress
from .source import File, ReadError, Source, VideoError, as_source, limit

log = logging.getLogger("xclip_fast.data.decode")

# FFmpeg's demuxers that read one file and open nothing else. Pictures are among them, for a better error.
_FORMATS = (
    "3dostr,amv,apng,asf,av1,avi,avs2,avs3,cavsvideo,dirac,dv,evc,flv,gif,gxf,h261,h263,h264,hevc,ingenient,ipu,"
    "ivf,live_flv,m4v,matroska,mjpeg,mjpeg_2000,mov,mpeg,mpegts,mpegtsraw,mpegvideo,mpjpeg,mxf,nsv,nut,nuv,obu,ogg,rm,"
    "smjpeg,swf,tty,ty,vc1,vc1test,vvc,wtv,webp,webp_anim,webp_pipe,yuv4mpegpipe,bmp_pipe,exr_pipe,gif_pipe,j2k_pipe,"
    "jpeg_pipe,jpegls_pipe,jpegxl_anim,jpegxl_pipe,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,psd_pipe,"
    "qoi_pipe,sgi_pipe,svg_pipe,tiff_pipe,xbm_pipe,xpm_pipe,aac,ac3,aiff,flac,mp3,wav"
)
_BUFFER = 65536  # bytes that FFmpeg reads at a time

# For av.open: titles may be in any encoding. PyAV 18 raises for bytes that are not UTF-8, unless it is asked to escape
# them. PyAV 19 always escapes them and has no such argument.
ESCAPED: dict[str, Any] = {"metadata_errors": "surrogateescape"} if av.__version__.startswith("18.") else {}


def _refuse(url: str, flags: int, options: dict[str, Any]) -> Any:
    raise PermissionError(errno.EACCES, "it refers to other files, which are not opened", url)


@contextmanager
def open_video(path: str | os.PathLike[str] | Source, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream.

    Every error of FFmpeg or of the file in the block becomes a VideoError. A failed read becomes a ReadError, whatever
    error FFmpeg raises for it. So does a lack of memory.
    """
    source = as_source(path)
    with closing(File(source)) as file:
        try:
            with _open(source, file) as container:
                yield container, _video_stream(source, file, container, threads)
        except (av.FFmpegError, OSError, MemoryError) as error:
            if lacks_memory(error):
                raise ReadError(f"{source}: not enough memory to decode it") from error
            raise VideoError(f"{source}: cannot be read ({reason(error)})") from error
        finally:
            if file.error is not None:
                raise ReadError(f"{source}: cannot be read now ({file.error.strerror})") from file.error


def _open(source: Source, file: File) -> InputContainer:
    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS, "fflags": "+discardcorrupt"}
    # FFmpeg may decode a frame while it looks for the streams.
    options["max_pixels"] = str(limit("XCLIP_FAST_MAX_PIXELS"))
    try:
        return av.open(file, "r", options=options, buffer_size=_BUFFER, io_open=_refuse, **ESCAPED)
    except (av.FFmpegError, OSError, MemoryError) as error:
        if lacks_memory(error):
            raise
        why = reason(error)
        if isinstance(error, av.error.ArgumentError):
            why = "its format holds no video, or refers to other files"
        raise VideoError(f"{source}: cannot be opened as a video ({why})") from error


def _video_stream(source: Source, file: File, container: InputContainer, threads: int) -> VideoStream:
    if is_picture(container):
        if _is_animated_webp(file):
            raise VideoError(f"{source}: is an animated WebP, which FFmpeg cannot decode; convert it to mp4")
        raise VideoError(f"{source}: is a picture, not a video")
    videos = [s for s in container.streams.video if not s.disposition & Disposition.attached_pic]
    if not videos or container.format.name == "tty":  # FFmpeg "plays" any text as a terminal session
        kinds: list[str] = sorted({s.type for s in container.streams if s.type != "video"})
        raise VideoError(f"{source}: has no video stream (only: {', '.join(kinds) or 'text or a cover picture'})")
    best = container.streams.best("video")
    stream = best if isinstance(best, VideoStream) and best in videos else videos[0]
    context = stream.codec_context
    if context is None:
        raise VideoError(f"{source}: this build of FFmpeg has no decoder for its video codec")
    most = limit("XCLIP_FAST_MAX_PIXELS")
    if context.width * context.height > most:
        raise ReadError(
            f"{source}: a frame has {context.width}x{context.height} pixels, more than the limit of {most}; "
            "the environment variable XCLIP_FAST_MAX_PIXELS allows more"
        )
    # Decoders count the edges that they add to a frame, and call a frame above the limit a lack of memory.
    context.options = {"max_pixels": str(max(most, (context.width + 128) * (context.height + 128)))}
    context.thread_count = threads
    if threads != 1:
        stream.thread_type = "AUTO"
    return stream


def no_frame(source: Source, stream: VideoStream) -> VideoError:
    """The error of a video that gives no frame."""
    context = stream.codec_context
    why = context.codec.canonical_name
    kind = VideoError
    if not context.width * context.height:  # FFmpeg drops a size above the limit
        kind = ReadError
        why += (
            f"; its picture size is missing, or above the limit of {limit('XCLIP_FAST_MAX_PIXELS')} pixels; the "
            "environment variable XCLIP_FAST_MAX_PIXELS allows more"
        )
    return kind(f"{source}: no frame can be decoded ({why})")


def is_picture(container: InputContainer) -> bool:
    """Whether the format is one of still pictures. FFmpeg plays them as videos of one frame."""
    name = container.format.name
    still = container.metadata.get("major_brand") in ("avif", "heic", "heix", "mif1")  # they look like MP4
    return still or name == "image2" or name.endswith("_pipe")


def _is_animated_webp(file: File) -> bool:
    file.seek(0)
    head = file.read(21)
    return head[:4] == b"RIFF" and head[8:16] == b"WEBPVP8X" and bool(head[20] & 2)


def reason(error: BaseException) -> str:
    """FFmpeg's message, without number and file name."""
    return getattr(error, "strerror", None) or str(error)


def lacks_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or getattr(error, "errno", None) == errno.ENOMEM


def packets_of(container: InputContainer, stream: VideoStream, damage: list[str] | None = None) -> Iterator[av.Packet]:
    """The stream's packets, up to the end of the file or to a place that cannot be read.

    `damage`: gets a line for such a place, which is logged otherwise.
    """
    packets, count = container.demux(stream), 0
    try:
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                return
            except av.FFmpegError as error:
                if lacks_memory(error):
                    raise
                if damage is None:
                    log.warning("%s: %s; the frames before that are used", name_of(container), reason(error))
                else:
                    damage.append(f"cannot be read after {count} packets ({reason(error)})")
                return
            if packet.size:  # PyAV ends with an empty packet
                progress()
                count += 1
                yield packet
    finally:
        packets.close()  # type: ignore[attr-defined]  # without this PyAV leaks 150 bytes


def all_frames(container: InputContainer, stream: VideoStream, damage: list[str] | None = None) -> Iterator[VideoFrame]:
    """Every frame of the file, in order. A packet that fails to decode is skipped.

    `damage`: gets lines about packets that cannot be read or decoded. Raises VideoError if no frame comes out of
    XCLIP_FAST_MAX_LEADING_PACKETS packets.
    """
    failed, leading, most = 0, True, limit("XCLIP_FAST_MAX_LEADING_PACKETS")
    for count, packet in enumerate(chain(packets_of(container, stream, damage), (None,))):  # None drains the decoder
        if leading and count > most:
            raise ReadError(
                f"{name_of(container)}: its first {most} packets give no frame; the environment variable "
                "XCLIP_FAST_MAX_LEADING_PACKETS allows more"
            )
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if lacks_memory(error):
                raise
            log.info("%s: %s; packet skipped", name_of(container), reason(error))
            failed += 1
            continue
        leading = leading and not frames
        yield from frames
    if failed and damage is not None:
        damage.append(f"{failed} of {count} packets cannot be decoded")


def name_of(container: InputContainer) -> str:
    return plain(container.name.removeprefix("file:"))

"""Opens one video file and reads its packets and frames, within fixed limits.

FFmpeg reads through `File`, so a failed read (a broken disk, a lost network share) is never taken for the end of the
file. FFmpeg gets one open file and a list of formats. It opens no other file and no network address.
"""

from __future__ import annotations

import errno
import logging
import os
import stat
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import TYPE_CHECKING, Any

import av
from av.container import InputContainer
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from ...console import plain
from ..threads import progress

if TYPE_CHECKING:
    from .plan import Plan

log = logging.getLogger("xclip_fast.data.decode")

# FFmpeg's demuxers that read one file and open nothing else. Pictures are among them, for a better error.
_FORMATS = (
    "3dostr,amv,apng,asf,av1,avi,avs2,avs3,cavsvideo,dirac,dv,evc,flv,gif,gxf,h261,h263,h264,hevc,ingenient,ipu,"
    "ivf,live_flv,m4v,matroska,mjpeg,mjpeg_2000,mov,mpeg,mpegts,mpegtsraw,mpegvideo,mpjpeg,mxf,nsv,nut,nuv,obu,ogg,rm,"
    "smjpeg,swf,tty,ty,vc1,vc1test,vvc,wtv,webp,webp_pipe,yuv4mpegpipe,bmp_pipe,exr_pipe,gif_pipe,j2k_pipe,jpeg_pipe,"
    "jpegls_pipe,jpegxl_anim,jpegxl_pipe,pam_pipe,pbm_pipe,pcx_pipe,pgm_pipe,png_pipe,ppm_pipe,psd_pipe,qoi_pipe,"
    "sgi_pipe,svg_pipe,tiff_pipe,xbm_pipe,xpm_pipe,aac,ac3,aiff,flac,mp3,wav"
)
_BUFFER = 65536  # bytes that FFmpeg reads at a time
_PASSING = {
    getattr(errno, name)
    for name in ("EIO", "ESTALE", "ETIMEDOUT", "EAGAIN", "ECONNRESET", "ENOTCONN", "ENETDOWN", "EHOSTDOWN", "EREMOTEIO")
    if hasattr(errno, name)
}
"""Errors that a network share may recover from."""
RETRIES = (0.1, 0.4, 1.0)  # seconds to wait before each new try


class VideoError(ValueError):
    """A video file that cannot be used. The message is one line: the file and the reason."""


class ReadError(VideoError):
    """A file that could not be read this time: a read error, too little memory or a limit of this run.

    The video itself may be good, so this error is no fact about it: the next run reads the file again.
    """


@dataclass(frozen=True)
class Source:
    """The place of a video: a file, or with `offset` and `size` (bytes) a member of an uncompressed tar file.

    `plan`: an earlier plan (`probe`), which saves reading all packets. `size` without `offset` is the file's size at
    that time. If the size has changed, or the file does not follow the plan, a new plan is made. Give the size: without
    it, an mp4 is checked by its index, but a changed file of another container with the same times is not noticed.
    """

    path: str
    offset: int | None = None
    size: int | None = None
    plan: Plan | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """The name for people, on one line, with unprintable characters escaped."""
        name = plain(self.path)
        return name if self.offset is None else f"{name} (byte {self.offset})"


def as_source(path: str | os.PathLike[str] | Source) -> Source:
    return path if isinstance(path, Source) else Source(os.fspath(path))


_DEFAULTS = {
    "XCLIP_FAST_MAX_PIXELS": 2**26,  # of one frame
    "XCLIP_FAST_MAX_FRAMES": 2**22,  # of one video
    "XCLIP_FAST_MAX_LEADING_PACKETS": 4096,  # before the first frame
    "XCLIP_FAST_MAX_WINDOWS": 2**20,  # of one video
    "XCLIP_FAST_MAX_SECONDS": 120,  # without a packet
}


def limit(name: str) -> int:
    """The limit of this name: the environment variable or its default. Raises ValueError for a value below 1."""
    given = os.environ.get(name, "").strip()
    if not given:
        return _DEFAULTS[name]
    if not given.isdecimal() or int(given) < 1:
        raise ValueError(f"{name} is {given!r}; a whole number of at least 1 is wanted")
    return min(int(given), 2**62)


def too_slow(source: Source | str) -> ReadError:
    """The error of a file whose decoding hangs."""
    seconds = limit("XCLIP_FAST_MAX_SECONDS")
    return ReadError(
        f"{source}: decoding did not advance for {seconds} seconds; the environment variable XCLIP_FAST_MAX_SECONDS "
        "allows more"
    )


class File:
    """The bytes of a source, which FFmpeg reads. `error` is the first read error that retries did not mend, or None.

    Raises VideoError for a source that is not a regular file with bytes in it, and ReadError if it cannot be opened.
    """

    def __init__(self, source: Source) -> None:
        self.name = f"file:{source.path}"  # the suffix helps FFmpeg to find the format
        self.error: OSError | None = None
        self._source, self._at, self._descriptor = source, 0, -1
        if "\0" in source.path:
            raise VideoError(f"{source}: is not a possible file name")
        try:
            status = self._open()
        except (FileNotFoundError, NotADirectoryError):
            raise ReadError(f"{source}: no such file") from None
        except OSError as error:
            raise ReadError(f"{source}: cannot be opened ({error.strerror})") from error
        try:
            if stat.S_ISDIR(status.st_mode):
                raise VideoError(f"{source}: is a directory, not a video file")
            if not stat.S_ISREG(status.st_mode):
                raise VideoError(f"{source}: is not a regular file")
            if not status.st_size or (source.size == 0 and source.offset is not None):
                raise VideoError(f"{source}: is empty (zero bytes)")
            self._start, self._length = 0, status.st_size
            if source.offset is not None:
                self._check_member(source, status.st_size)
                self._start, self._length = source.offset, source.size or 0
        except BaseException:
            self.close()
            raise

    def _open(self) -> os.stat_result:
        # Without O_NONBLOCK, opening a pipe waits until somebody writes to it.
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
        descriptor = os.open(self._source.path, flags)
        if self._descriptor >= 0:
            os.close(self._descriptor)
        self._descriptor = descriptor
        return os.fstat(descriptor)

    def _check_member(self, source: Source, length: int) -> None:
        """Refuses a tar member that has moved."""
        if source.size is None or source.offset is None or source.offset < 0 or source.size < 0:
            raise ValueError(f"{source}: a member of a tar file needs an offset and a size; got size {source.size}")
        if source.offset + source.size > length:
            raise VideoError(
                f"{source}: the tar file ends before this member; it is cut off or has changed. Index it again"
            )
        try:
            self._start, self._length = max(0, source.offset - 512), 512
            header = self.read(512)
        except OSError as error:
            raise ReadError(f"{source}: cannot be read ({error.strerror})") from error
        self._at = 0
        digits = header[124:136].strip(b"\0 ")  # octal; other forms, for huge members, are not checked
        if header[257:262] == b"ustar" and digits.isdigit() and int(digits, 8) != source.size:
            raise VideoError(
                f"{source}: the tar file has another member at this place, so it has changed. Index it again"
            )

    def read(self, count: int) -> bytes:
        """Up to `count` bytes; none at the end. After a passing error the file is opened and read again."""
        count = min(count, self._length - self._at)
        if count <= 0 or self.error is not None:  # the first failure is reported once
            return b""
        for wait in (*RETRIES, None):
            try:
                os.lseek(self._descriptor, self._start + self._at, os.SEEK_SET)
                data = os.read(self._descriptor, count)
                break
            except OSError as error:
                if wait is None or error.errno not in _PASSING:
                    self.error = self.error or error
                    raise
                time.sleep(wait)
                try:
                    self._open()
                except OSError as again:
                    self.error = self.error or again
                    raise
        self._at += len(data)
        return data

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        to = offset + (0, self._at, self._length)[whence]
        if to < 0:
            return -errno.EINVAL  # as FFmpeg's own files answer
        self._at = to
        return to

    def tell(self) -> int:
        return self._at

    def close(self) -> None:
        if self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1


def _refuse(url: str, flags: int, options: dict[str, Any]) -> Any:
    raise PermissionError(errno.EACCES, "it refers to other files, which are not opened", url)


@contextmanager
def open_video(path: str | os.PathLike[str] | Source, threads: int = 1) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its video stream.

    Every error of FFmpeg or of the file in the block becomes a VideoError. A failed read becomes a ReadError, whatever
    error FFmpeg raises for it. So does a lack of memory.
    """
    source = as_source(path)
    file = File(source)
    try:
        try:
            with _opened(source, file) as container:
                yield container, _video_stream(source, file, container, threads)
        except (av.FFmpegError, OSError, MemoryError) as error:
            if lacks_memory(error):
                raise ReadError(f"{source}: not enough memory to decode it") from error
            raise VideoError(f"{source}: cannot be read ({reason(error)})") from error
        finally:
            if file.error is not None:
                raise ReadError(f"{source}: cannot be read now ({file.error.strerror})") from file.error
    finally:
        file.close()


@contextmanager
def _opened(source: Source, file: File) -> Iterator[InputContainer]:
    options = {"protocol_whitelist": "none", "format_whitelist": _FORMATS, "fflags": "+discardcorrupt"}
    # FFmpeg may decode a frame while it looks for the streams.
    options["max_pixels"] = str(limit("XCLIP_FAST_MAX_PIXELS"))
    try:
        # Titles may be in any encoding.
        container: Any = av.open(
            file, "r", options=options, metadata_errors="replace", buffer_size=_BUFFER, io_open=_refuse
        )
    except (av.FFmpegError, OSError, MemoryError) as error:
        if lacks_memory(error):
            raise
        why = reason(error)
        if isinstance(error, av.error.ArgumentError):
            why = "its format holds no video, or refers to other files"
        raise VideoError(f"{source}: cannot be opened as a video ({why})") from error
    try:
        yield container
    finally:
        container.close()


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


def packets_of(container: InputContainer, stream: VideoStream) -> Iterator[av.Packet]:
    """The stream's packets, up to the end of the file or to a place that cannot be read."""
    packets = container.demux(stream)
    try:
        while True:
            try:
                packet = next(packets)
            except (StopIteration, av.EOFError):
                return
            except av.FFmpegError as error:
                if lacks_memory(error):
                    raise
                log.warning("%s: %s; the frames before that are used", name_of(container), reason(error))
                return
            if packet.size:  # PyAV ends with an empty packet
                progress()
                yield packet
    finally:
        packets.close()  # type: ignore[attr-defined]  # without this PyAV leaks 150 bytes


def all_frames(container: InputContainer, stream: VideoStream) -> Iterator[VideoFrame]:
    """Every frame of the file, in order. A packet that fails to decode is skipped.

    Raises VideoError if no frame comes out of XCLIP_FAST_MAX_LEADING_PACKETS packets.
    """
    silent, most = 0, limit("XCLIP_FAST_MAX_LEADING_PACKETS")
    for packet in chain(packets_of(container, stream), (None,)):  # None drains the decoder
        try:
            frames = stream.codec_context.decode(packet)
        except av.FFmpegError as error:
            if lacks_memory(error):
                raise
            log.info("%s: %s; packet skipped", name_of(container), reason(error))
            frames = []
        if silent >= 0 and not frames and packet is not None:
            silent += 1
            if silent > most:
                raise ReadError(
                    f"{name_of(container)}: its first {most} packets give no frame; the environment variable "
                    "XCLIP_FAST_MAX_LEADING_PACKETS allows more"
                )
        elif frames:
            silent = -1
        yield from frames


def name_of(container: InputContainer) -> str:
    return plain(container.name.removeprefix("file:"))

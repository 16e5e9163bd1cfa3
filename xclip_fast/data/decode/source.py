"""The place of a video and its bytes; the errors and the limits of reading it."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ...console import plain

if TYPE_CHECKING:
    from .plan import Plan

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

    `plan`: an earlier plan (`probe`), which saves reading all packets. It needs the file's `size` at that time. If the
    size has changed, or the file does not follow the plan, a new plan is made.
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
        from tarfile import HeaderError, TarInfo

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
        with contextlib.suppress(HeaderError):  # damaged, or not a header: not checked
            if TarInfo.frombuf(header, "utf-8", "surrogateescape").size != source.size:
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

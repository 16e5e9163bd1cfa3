"""Decoded videos kept on disk, so that a small data set is decoded once.

Each video is one file of all its frames, uint8 (F, H, W, 3), full size, read by memory mapping: a view reads only the
frames it needs. A CRC-32 of each frame follows the frames. Each process checks a frame when it first reads it. A file
with a wrong frame is deleted and made again. The name of the file is a hash of the frames' shape, the video's path, its
place in a tar shard, its present size and time of change (not those in the index), and the version of the decoder.

Files are written under another name and then renamed, so several processes may fill one folder. Each process looks at
the folder's size only every few seconds, so each may exceed the limit by one video.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import shutil
import threading
import time
import zlib
from collections.abc import Sequence
from pathlib import Path

import av
import numpy as np

from ..decode.decoder import decode_frames, decode_views
from ..decode.source import Source, VideoError
from ..decode.video import Video
from ..transforms import View, apply

_CHUNK = 2**26  # bytes of frames that are decoded at once
_LARGEST = 2**30  # bytes of one decoded video; a larger one would take minutes until its first frame
_PIXELS = 2  # version; it grows when the decoder gives other pixels
_LOOK_EVERY = 10.0  # seconds between two looks at the size of the folder
_STALE = 3600.0  # seconds; an older unfinished file belongs to a killed process


class FrameCache:
    """A folder of decoded videos that holds at most `limit` bytes of them.

    The default limit is the present size of its videos plus half of the free space on its disk. If the cache is full,
    other videos are decoded every time. No video is evicted: every epoch reads all of them, so none is a better choice
    than the first ones. `notes`: messages for people by their kind, the first of each.
    """

    def __init__(self, folder: str | os.PathLike[str], limit: int | None = None) -> None:
        self.folder = Path(folder).absolute()
        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._used, self._looked = self._look(), time.monotonic()
        if limit is None:
            limit = self._used + shutil.disk_usage(self.folder).free // 2
        if limit < 0:
            raise ValueError(f"cache_bytes is {limit}; it must not be negative")
        self.limit = limit
        self.notes: dict[str, str] = {}
        self._cannot: set[str] = set()  # files of videos that cannot be decoded to their end
        self._broken = False
        self._checked: dict[str, np.ndarray] = {}  # by file: frames whose checksum is right, bool (F,)

    def __reduce__(self) -> tuple[type[FrameCache], tuple[str, int]]:
        return FrameCache, (os.fspath(self.folder), self.limit)

    def decode_views(self, source: Source, views: Sequence[View], *, video: Video, out: np.ndarray) -> None:
        """The same pixels as `decode.decode_views`, from the cache if the video is in it or still fits.

        `video`: the source's row of the manifest. Raises VideoError.
        """
        frames = self._frames(source, (video.frames, video.height, video.width, 3))
        if frames is None or not self._sound(frames, np.concatenate([view.frames for view in views])):
            decode_views(source, views, out=out)
            return
        for view, out_TSSC in zip(views, out, strict=True):
            apply(view, frames[view.frames], out_TSSC)

    def _frames(self, source: Source, shape: tuple[int, ...]) -> np.memmap | None:
        """All frames of the video, (F, H, W, 3), mapped from the cache; None if the cache does not have them."""
        try:
            path = self.folder / f"{_key(source, shape)}.frames"
        except OSError:  # no such file: the decoder has the better error
            return None
        stored = _mapped(path, shape)
        if stored is not None:
            return stored
        if path.name in self._cannot or self._broken or not self._room(math.prod(shape), source):
            return None
        if self._write(path, source, shape):
            return _mapped(path, shape)
        return None

    def _sound(self, frames: np.memmap, numbers: np.ndarray) -> bool:
        """Whether these frames have their checksums. If not, the file is removed."""
        path = Path(str(frames.filename))
        checked = self._checked.setdefault(path.name, np.zeros(len(frames), bool))
        try:
            sums = np.fromfile(path, "<u4", offset=frames.size)
        except OSError:  # another process has just deleted it
            return False
        for number in np.unique(numbers[~checked[numbers]]).tolist():
            if zlib.crc32(frames[number]) != sums[number]:
                self._note("damaged", f"{path}: frame {number} is damaged; the video is decoded again. Check the disk")
                del self._checked[path.name]
                with contextlib.suppress(OSError):
                    path.unlink()
                return False
            checked[number] = True
        return True

    def _room(self, size: int, source: Source) -> bool:
        if size > _LARGEST:
            self._note("large", f"{source}: {size / 2**30:.1f} GiB once decoded, too large for the cache")
            return False
        with self._lock:
            if time.monotonic() - self._looked > _LOOK_EVERY:
                self._used, self._looked = self._look(), time.monotonic()
            if self._used + size > self.limit:
                self._note("full", f"{self.folder}: the cache is full ({self.limit / 2**30:.2f} GiB); other videos are "
                           "decoded every time. Raise cache_bytes, or empty the folder")  # fmt: skip
                return False
            self._used += size
            return True

    def _write(self, path: Path, source: Source, shape: tuple[int, ...]) -> bool:
        """Decodes the whole video into this file. False if decoding does not match the manifest, or writing fails."""
        part = path.with_name(f".{path.stem}.{os.getpid()}.{threading.get_ident()}.part")
        sums: list[int] = []
        step = max(1, _CHUNK // max(1, math.prod(shape[1:])))
        try:
            with open(part, "xb") as file:
                for start in range(0, shape[0], step):
                    try:
                        frames = decode_frames(source, range(start, min(start + step, shape[0])))
                    except (VideoError, IndexError):
                        frames = None
                    if frames is None or frames.shape[1:] != shape[1:]:
                        self._cannot.add(path.name)
                        return False
                    frames = np.ascontiguousarray(frames)  # turned pictures keep their order in memory
                    file.write(frames.data)
                    sums += [zlib.crc32(frame) for frame in frames]
                file.write(np.array(sums, "<u4").tobytes())
            os.replace(part, path)
            return True
        except OSError as error:
            self._broken = True
            self._note("broken", f"{self.folder}: cannot be written to ({error.strerror or error}); the cache is off")
            return False
        finally:
            with contextlib.suppress(OSError):  # the disk's fault, not the video's
                part.unlink(missing_ok=True)

    def _look(self) -> int:
        """The bytes of our files in the folder. Unfinished files that killed processes left are removed."""
        used = 0
        with os.scandir(self.folder) as entries:
            for entry in entries:
                try:
                    status = entry.stat()
                    if entry.name.endswith(".part") and time.time() - status.st_mtime > _STALE:
                        os.unlink(entry.path)
                    elif entry.name.endswith((".frames", ".part")):  # other files are not read, so they do not count
                        used += status.st_size
                except FileNotFoundError:  # another process renamed or removed it just now
                    continue
        return used

    def _note(self, kind: str, text: str) -> None:
        self.notes.setdefault(kind, text)


def _key(source: Source, shape: tuple[int, ...]) -> str:
    status = os.stat(source.path)
    file = (os.path.abspath(source.path), source.offset, source.size, status.st_size, status.st_mtime_ns)
    text = repr((_PIXELS, *file, shape, av.__version__))
    return hashlib.blake2b(text.encode("utf-8", "surrogateescape"), digest_size=20).hexdigest()


def _mapped(path: Path, shape: tuple[int, ...]) -> np.memmap | None:
    """The frames in this file, or None if the file is missing or incomplete."""
    try:
        if os.path.getsize(path) != math.prod(shape) + 4 * shape[0]:
            return None
        return np.memmap(path, np.uint8, "r", shape=shape)
    except (OSError, ValueError):
        return None

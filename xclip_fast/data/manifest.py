"""What there is to train on: the videos of a data set with what one pass over the files found out about each.

A manifest is a text file of JSON lines. The first line is a header, and each line after it is a video:

    {"xclip_fast_manifest": 1, "root": ".", "classes": ["archery", "bowling"]}
    {"path": "archery/a.mp4", "label": 0, "size": 51230, "mtime_ns": 1763880000000000000, "frames": 300, ...}

`index` makes one from a folder or a list. A video that cannot be used is a line too, with an `error` that says why.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from .sources import Entry, read_source

if TYPE_CHECKING:  # decode imports PyAV, which a manifest can do without
    from .decode import Plan, Source

VERSION = 1


@dataclass(frozen=True, slots=True)
class Video:
    """One row: a video file, or a member of a tar shard, and what is known of it.

    `path` is relative to the manifest's root, with "/" between folders; for a member of a tar it is the shard's, and
    `member` and `offset` (bytes) say where in the shard. `size` is in bytes (the member's, in a shard); `mtime_ns` is
    the file's. `label` counts in the manifest's classes, None where unknown. `width` and `height` are as displayed,
    after `rotation` (degrees clockwise); `duration` is in seconds; `fps` is the average. `packed` is the decoding
    plan, compressed; `plan` gives it. With an `error` (one line) the rest may be missing.
    """

    path: str
    label: int | None = None
    member: str | None = None
    offset: int | None = None
    size: int = 0
    mtime_ns: int = 0
    frames: int = 0
    width: int = 0
    height: int = 0
    codec: str = ""
    pix_fmt: str = ""
    rotation: int = 0
    duration: float = 0.0
    fps: float = 0.0
    packed: str | None = None
    error: str | None = None

    @property
    def plan(self) -> Plan | None:
        """Which keyframe each frame needs, or None where the file has to be decoded from end to end."""
        return None if self.packed is None else unpack_plan(self.packed)


_DEFAULTS = {field.name: field.default for field in fields(Video)}


@dataclass(frozen=True)
class Manifest:
    """The videos of a data set, below one folder `root`, and the names of their classes. Immutable."""

    root: Path
    classes: tuple[str, ...]
    videos: tuple[Video, ...]

    def __len__(self) -> int:
        return len(self.videos)

    @staticmethod
    def read(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Manifest:
        """The manifest in this file; `root` says where the videos are now, if not where the file says.

        Raises ValueError for a file that is not a manifest, naming the line, and OSError if it cannot be read.
        """
        path = Path(path)
        with open(path, "rb") as file:
            header = _header(path, file.readline())
            videos = tuple(_rows(path, enumerate(file, 2), len(header["classes"])))
        if root is None:  # a relative one is seen from where the file really is
            root = os.path.join(os.path.dirname(os.path.realpath(path)), header["root"])
        return Manifest(Path(os.path.realpath(root)), tuple(header["classes"]), videos)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. A root above or below it is stored relative to it, to be moved along."""
        path = Path(path)
        part = path.with_name(f".{path.name[:200]}.{os.getpid()}.{threading.get_ident()}.part")
        try:
            with open(part, "x", encoding="ascii") as file:
                file.write(_dump({"xclip_fast_manifest": VERSION, "root": self._stored_root(path)}, self.classes))
                file.writelines(_line(video) for video in self.videos)
                file.flush()
                os.fsync(file.fileno())
            os.replace(part, path)
        finally:
            part.unlink(missing_ok=True)

    def _stored_root(self, path: Path) -> str:
        root, home = PurePosixPath(os.path.realpath(self.root)), Path(os.path.realpath(path)).parent
        if root == home or home in Path(root).parents or Path(root) in home.parents:
            return Path(os.path.relpath(root, home)).as_posix()
        return str(root)

    def source(self, row: int) -> Source:
        """What the decoder opens for this row. Raises ValueError for a row with an error."""
        from .decode import Source

        video = self.videos[row]
        if video.error is not None:
            raise ValueError(f"{self.name(row)}: cannot be used: {video.error}")
        path = os.path.join(self.root, video.path)
        if video.offset is None:
            return Source(path, plan=video.plan)
        return Source(path, offset=video.offset, size=video.size, plan=video.plan)

    @cached_property
    def usable(self) -> np.ndarray:
        """The rows without an error, int64, ascending."""
        return np.array([row for row, video in enumerate(self.videos) if video.error is None], np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of every row, int64; -1 where unknown."""
        return np.array([-1 if video.label is None else video.label for video in self.videos], np.int64)

    @property
    def bad(self) -> dict[int, str]:
        """The rows with an error, and what it is."""
        return {row: video.error for row, video in enumerate(self.videos) if video.error is not None}

    def name(self, row: int) -> str:
        """The row's file for people to read: one line of printable characters; `shard.tar:member` in a shard."""
        return video_name(self.videos[row])

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits for what the data is: classes, and the files, sizes and labels in their order.

        It changes with none of the rest: where the root is, the files' times, what errors are known.
        """
        digest = hashlib.blake2b(_dump({}, self.classes).encode(), digest_size=16)
        for video in self.videos:
            digest.update(json.dumps([video.path, video.member, video.size, video.label]).encode())
        return digest.hexdigest()

    def select(self, rows: Iterable[int]) -> Manifest:
        """A manifest of these rows, in this order, with the same classes."""
        return replace(self, videos=tuple(self.videos[int(row)] for row in rows))

    def with_error(self, row: int, reason: str) -> Manifest:
        """The same manifest with this row marked as one that cannot be used."""
        bad = replace(self.videos[row], error=one_line(reason))
        return replace(self, videos=(*self.videos[:row], bad, *self.videos[row + 1 :]))


def video_name(video: Video) -> str:
    """A video's name for people: see `Manifest.name`."""
    return printable(video.path if video.member is None else f"{video.path}:{video.member}")


def printable(text: str) -> str:
    """The text with what cannot be printed written as escapes: a name may hold line ends, or bytes that are no text."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def one_line(reason: str) -> str:
    return printable(" ".join(reason.split())) or "unknown reason"


def pack_plan(plan: Plan) -> str:
    """A plan as a short string: differences, which mostly repeat, compressed. 300 frames take about 100 characters."""
    numbers = [len(plan.pts), len(plan.keyframes)]
    keys, decoded = [key for key, _ in plan.keyframes], [dts - key for key, dts in plan.keyframes]
    columns = [np.diff(np.array(column, np.int64), prepend=0) for column in (plan.pts, plan.start, keys, decoded)]
    data = np.concatenate([np.array(numbers, np.int64), *columns]).astype("<i8")
    return base64.b64encode(zlib.compress(data.tobytes(), 9)).decode()


def unpack_plan(packed: str) -> Plan:
    """The plan that `pack_plan` packed. Raises ValueError for anything else."""
    from .decode import Plan

    try:
        data = np.frombuffer(zlib.decompress(base64.b64decode(packed, validate=True)), "<i8")
        frames, keys = (int(number) for number in data[:2])
        pts, start, key, dts = np.split(data[2:], [frames, 2 * frames, 2 * frames + keys])
        if len(dts) != keys or len(key) != keys or len(start) != frames:
            raise ValueError("it does not have the length it states")
    except (ValueError, zlib.error) as error:
        raise ValueError(f"a decoding plan in the manifest is damaged ({error}); delete it and index again") from error
    keyframes = zip(key.cumsum().tolist(), (key.cumsum() + dts.cumsum()).tolist(), strict=True)
    return Plan(pts.cumsum().tolist(), start.cumsum().tolist(), list(keyframes))


def _dump(header: dict[str, Any], classes: Iterable[str]) -> str:
    return json.dumps({**header, "classes": list(classes)}) + "\n"


def _line(video: Video) -> str:
    row = {name: getattr(video, name) for name in _DEFAULTS if getattr(video, name) != _DEFAULTS[name]}
    return json.dumps(row, separators=(",", ":")) + "\n"


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = json.loads(line)
        version = header["xclip_fast_manifest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a manifest; make one with `xclip-fast index`") from error
    if version != VERSION:
        raise ValueError(f"{path}: is a manifest of version {version}, and this reads version {VERSION}; index anew")
    classes = header.get("classes")
    if not isinstance(header.get("root"), str) or not isinstance(classes, list):
        raise ValueError(f"{path}: the header needs a root and classes; index anew")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: every class must have a name in the header; index anew")
    return header


def _rows(path: Path, lines: Iterable[tuple[int, bytes]], classes: int) -> Iterator[Video]:
    for number, line in lines:
        try:
            video = Video(**json.loads(line))
            _check(video, classes)
        except (ValueError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        yield video


def _check(video: Video, classes: int) -> None:
    if video.label is not None and not 0 <= video.label < classes:
        raise ValueError(f"label {video.label} is not one of the {classes} classes")
    if video.error is None and (video.path.startswith("/") or ".." in video.path) and leaves(video.path):
        raise ValueError(f"{printable(video.path)} leads out of the root folder")


def leaves(path: str) -> bool:
    """Whether a path, by its spelling alone, may lead out of the folder it is meant for."""
    return os.path.isabs(path) or ".." in PurePosixPath(path).parts


def index(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    workers: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Look at every video of a source once, write its manifest to `out` (default: `manifest.jsonl` in the folder)."""
    listing = read_source(source)
    videos = []
    with ThreadPoolExecutor(workers) as pool:
        for video in pool.map(lambda entry: _look(listing.root, entry), listing.entries):
            videos.append(video)
            if progress:
                progress(len(videos), len(listing.entries))
    manifest = Manifest(listing.root, listing.classes, tuple(videos))
    manifest.write(Path(source) / "manifest.jsonl" if out is None else out)
    return manifest


def _look(root: Path, entry: Entry) -> Video:
    from .decode import VideoError, probe

    path = os.path.join(root, entry.path)
    row = Video(entry.path, entry.label, entry.member, entry.offset, entry.size)
    try:
        status = os.stat(path)
        info = probe(path)
    except (VideoError, OSError) as error:
        return replace(row, error=one_line(str(error)))
    plan = getattr(info, "plan", None)
    facts = {name: value for name, value in vars(info).items() if name in _DEFAULTS}
    packed = None if plan is None else pack_plan(plan)
    return replace(row, size=status.st_size, mtime_ns=status.st_mtime_ns, **facts, packed=packed)

"""The manifest: the videos of a data set and their facts, from one pass over the files.

A manifest is a text file of JSON lines. The first line is a header, and each line after it is a video:

    {"xclip_fast_manifest": 2, "root": ".", "classes": ["archery", "bowling"]}
    {"path": "archery/a.mp4", "label": 0, "size": 51230, "mtime_ns": 1763880000000000000, "frames": 300, ...}

`index` makes one from a folder or a list. A video that cannot be used is a line too, with an `error` that says why.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any, get_args, get_type_hints

import numpy as np

from ...console import plain
from ...files import errors_name, parse_json, replaced, require_regular
from ..decode.source import Source
from ..decode.video import Video, one_line, video_name

log = logging.getLogger(__name__)

VERSION = 2

_DEFAULTS = {field.name: field.default for field in fields(Video)}
_HINTS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Video).items()}
_KINDS = {name: (*kinds, int) if float in kinds else kinds for name, kinds in _HINTS.items()}  # 25 for 25.0
_COUNTS = {"offset", "size", "frames", "width", "height"}


@dataclass(frozen=True)
class Manifest:
    """The videos of a data set, in one folder `root`, and the names of their classes. Immutable."""

    root: Path
    classes: tuple[str, ...]
    videos: tuple[Video, ...]

    def __len__(self) -> int:
        return len(self.videos)

    @staticmethod
    def read(path: str | os.PathLike[str]) -> Manifest:
        """Read a manifest.

        A damaged line is a video with an error, and is logged. Raises ValueError for a file that is not a manifest or
        has no good line, and OSError if it cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a manifest; `xclip-fast index {path}` makes one of it")
        require_regular(path)
        with errors_name(path), open(path, "rb") as file:
            header = _header(path, file.readline())
            videos = tuple(_rows(path, enumerate(file, 2), len(header["classes"])))
        # a relative root starts at the folder of the real file
        root = os.path.join(os.path.dirname(os.path.realpath(path)), header["root"])
        return Manifest(Path(os.path.realpath(root)), tuple(header["classes"]), videos)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. A root above or below its folder is stored as a relative path."""
        path = Path(path)
        with replaced(path) as part, open(part, "x", encoding="ascii") as file:
            file.write(header_line(self._stored_root(path), self.classes))
            file.writelines(row_line(video) for video in self.videos)

    def _stored_root(self, path: Path) -> str:
        root, home = Path(os.path.realpath(self.root)), Path(os.path.realpath(path)).parent
        if root == home or home in root.parents or root in home.parents:
            return Path(os.path.relpath(root, home)).as_posix()
        return str(root)

    def source(self, row: int) -> Source:
        """The row's source for the decoder. Raises ValueError for a row with an error."""
        video = self.videos[row]
        if video.error is not None:
            raise ValueError(f"{self.name(row)}: cannot be used: {video.error}")
        path = os.path.join(self.root, video.path)
        return Source(path, offset=video.offset, size=video.size, plan=video.plan)

    @cached_property
    def usable(self) -> np.ndarray:
        """The rows without an error, int64, ascending."""
        return np.array([row for row, video in enumerate(self.videos) if video.error is None], np.int64)

    @cached_property
    def labels(self) -> np.ndarray:
        """The label of each row, int64; -1 if it has none."""
        return np.array([-1 if video.label is None else video.label for video in self.videos], np.int64)

    @property
    def bad(self) -> dict[int, str]:
        """The rows with an error, and the error."""
        return {row: video.error for row, video in enumerate(self.videos) if video.error is not None}

    def name(self, row: int) -> str:
        """The row's file as one line of printable characters; `shard.tar:member` in a shard."""
        return video_name(self.videos[row])

    @cached_property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that identify the data: the classes and the files, sizes and labels in their order.

        The root, the times of the files and known errors do not change it.
        """
        digest = hashlib.blake2b((json.dumps({"classes": list(self.classes)}) + "\n").encode(), digest_size=16)
        for video in self.videos:
            digest.update(json.dumps([video.path, video.member, video.size, video.label]).encode())
        return digest.hexdigest()

    def select(self, rows: Iterable[int]) -> Manifest:
        """A manifest of these rows, in this order, with the same classes."""
        return replace(self, videos=tuple(self.videos[int(row)] for row in rows))

    def with_errors(self, bad: Mapping[int, str]) -> Manifest:
        """The same manifest with these errors, as {row: reason}.

        An `index` that reuses the manifest reads these files again.
        """
        videos = list(self.videos)
        for row, reason in bad.items():
            videos[row] = replace(videos[row], error=one_line(reason), mtime_ns=0)
        return replace(self, videos=tuple(videos))


def header_line(root: str, classes: Iterable[str]) -> str:
    return json.dumps({"xclip_fast_manifest": VERSION, "root": root, "classes": list(classes)}) + "\n"


def row_line(video: Video) -> str:
    row = {name: getattr(video, name) for name in _DEFAULTS if getattr(video, name) != _DEFAULTS[name]}
    return json.dumps(row, separators=(",", ":")) + "\n"


def _header(path: Path, line: bytes) -> dict[str, Any]:
    try:
        header = parse_json(line)
        version = header["xclip_fast_manifest"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: is not a manifest; make one with `xclip-fast index`") from error
    if version != VERSION:
        raise ValueError(
            f"{path}: is a manifest of version {version!r}; this package reads {VERSION}. Make it again with "
            "`xclip-fast index`"
        )
    classes = header.get("classes")
    named = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    if not named or not isinstance(header.get("root"), str):
        raise ValueError(f"{path}: the header needs a root and the names of classes; run `xclip-fast index` again")
    return header


def _rows(path: Path, lines: Iterable[tuple[int, bytes]], classes: int) -> Iterator[Video]:
    """Every line's video. A damaged line is a row with an error; without a good line, the first one's is raised."""
    first: ValueError | None = None
    good = damaged = 0
    for number, line in lines:
        if not line.strip():
            continue
        row: Any = None
        try:
            video = _video(row := parse_json(line))
            _check(video, classes)
            good += 1
        except ValueError as error:
            first = first or ValueError(f"{path}, line {number}: {error}")
            damaged += 1
            name = row.get("path") if isinstance(row, dict) else None
            reason = f"line {number} of the manifest is damaged: {error}"
            video = Video(name if isinstance(name, str) else f"line {number}", error=one_line(reason), mtime_ns=0)
        yield video
    if first is not None and not good:
        raise first
    if first is not None:
        log.warning("%s. %d of %d videos are left out. Index again to mend it", first, damaged, good + damaged)


def _video(row: Any) -> Video:
    if not isinstance(row, dict) or "path" not in row:
        raise ValueError("not a JSON object with the path of a video and its facts")
    for name, value in row.items():
        kinds = _KINDS.get(name)
        if kinds is None:
            raise ValueError(f"{name!r} is not a field of a row; the file may be of a newer version")
        if type(value) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {value!r}; {wanted} wanted")
        if name in _COUNTS and value is not None and not 0 <= value < 2**62:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 2**62")
    return Video(**row)


def _check(video: Video, classes: int) -> None:
    if video.label is not None and not 0 <= video.label < classes:
        raise ValueError(f"label {video.label} is not one of the {classes} classes")
    if video.error is None and (video.path.startswith("/") or ".." in video.path) and leaves(video.path):
        raise ValueError(f"{plain(video.path)} leads out of the root folder")


def leaves(path: str) -> bool:
    """Whether a path may lead out of its folder, by its spelling alone."""
    return os.path.isabs(path) or ".." in PurePosixPath(path).parts


def checked(video: Video, classes: int) -> Video:
    """The row, or one with an error if `Manifest.read` would refuse it."""
    try:
        _video(parse_json(row_line(video)))
        _check(video, classes)
    except ValueError as error:
        return Video(video.path, member=video.member, error=one_line(f"cannot be listed: {error}"))
    return video

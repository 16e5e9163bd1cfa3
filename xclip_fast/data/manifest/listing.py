"""Shared by all readers of data sets: the request, the listing, and how files are found and named."""

from __future__ import annotations

import csv
import io
import os
import posixpath
import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from ...files import errors_name, require_regular
from ..decode.video import Video
from .manifest import leaves

VIDEO_NAME = re.compile(
    r"[^.].*\.(3gp|avi|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|ogv|ts|webm|wmv)", re.IGNORECASE | re.DOTALL
)
"""The names of video files. Names that begin with a dot are skipped."""


@dataclass(frozen=True)
class Listing:
    """The videos of a source, in its order, without facts. An entry with an error cannot be used.

    `root` has no symbolic links. `notes` tell what was left out.
    """

    root: Path
    classes: tuple[str, ...]
    entries: tuple[Video, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Request:
    """The arguments of `read_source`. `path` is the folder or list. `classes` come from the labels."""

    path: Path
    classes: tuple[str, ...] | None = None
    split: str | None = None
    root: str | None = None
    follow_links: bool = False

    @property
    def top(self) -> str:
        """The given root. Without one, the folder that was given, or that of the list."""
        folder = self.path if self.path.is_dir() else self.path.parent
        return os.fspath(folder) if self.root is None else self.root

    def listing(self, classes: Sequence[str], entries: Iterable[Video], notes: Sequence[str] = ()) -> Listing:
        """A listing below ``top``."""
        return Listing(Path(os.path.realpath(self.top)), tuple(classes), tuple(entries), tuple(notes))


def lines_of(path: Path) -> list[tuple[int, str]]:
    """(number, line) of every line of a text file that is not blank. Bytes that are not UTF-8 stay as they are."""
    text = _text_of(path)
    if "\0" in text:
        raise ValueError(f"{path}: is not a text file")
    # not splitlines(), which also splits where a name may go on
    lines = ((number, line.removesuffix("\r")) for number, line in enumerate(text.split("\n"), 1))
    return [(number, line) for number, line in lines if line.strip()]


def csv_of(path: Path) -> list[tuple[int, list[str]]]:
    """(number of the last line, row) of every row of a csv file.

    The separator is the comma, semicolon or tab: the most frequent of them in the first line outside quotes.
    """
    text = _text_of(path)
    first = next((line for line in text.splitlines() if line.strip()), "")
    bare = re.sub(r'"[^"]*"', "", first)
    separator = max(",;\t", key=bare.count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator)
    try:
        return [(reader.line_num, row) for row in reader if row]
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: is not csv ({error})") from error


_LONGEST_LIST = 1 << 30  # bytes


def _text_of(path: Path) -> str:
    """The content of a list, without a byte order mark. Bytes that are not UTF-8 stay as they are."""
    if (size := require_regular(path)) > _LONGEST_LIST:
        raise ValueError(f"{path}: has {size} bytes, too many for a list")
    with errors_name(path):
        return path.read_bytes().decode("utf-8", "surrogateescape").removeprefix("\ufeff")


def is_folder(entry: os.DirEntry[str]) -> bool:
    """Whether an entry is a folder to look into. A folder with the name of a video is not."""
    try:
        return entry.is_dir() and not VIDEO_NAME.fullmatch(entry.name)
    except OSError:  # a link to itself
        return False


def unlisted_reason(error: OSError) -> str:
    """The error of a folder that cannot be listed."""
    return f"is a folder that cannot be listed ({error.strerror})"


def walk(root: Path, follow_links: bool) -> tuple[list[Video], list[str], dict[str, str]]:
    """Every video below a folder, sorted by path, and notes on files that were left out.

    A folder that cannot be listed is a video with an error; the last result has its path and the error, too.
    """
    found: list[Video] = []
    unlisted: dict[str, str] = {}
    others: Counter[str] = Counter()
    first = os.stat(root)
    # with its parents, to notice links that lead back
    folders: list[tuple[str, tuple[tuple[int, int], ...]]] = [("", ((first.st_dev, first.st_ino),))]
    while folders:
        below, above = folders.pop()
        try:
            inside = list(os.scandir(root / below))
        except OSError as error:
            if not below:
                raise
            unlisted[below.rstrip("/")] = unlisted_reason(error)
            continue
        for entry in inside:
            path = below + entry.name
            if entry.name.startswith("."):
                continue
            folder = is_folder(entry)
            if folder and entry.is_symlink() and not follow_links:
                found.append(Video(path, error="is a link to a folder; --follow-links (follow_links=True) enters it"))
            elif folder:
                status = entry.stat()
                if (status.st_dev, status.st_ino) in above:
                    found.append(Video(path, error="is a link to one of its own parent folders"))
                else:
                    folders.append((f"{path}/", (*above, (status.st_dev, status.st_ino))))
            elif VIDEO_NAME.fullmatch(entry.name):
                found.append(Video(path))
            else:
                others[os.path.splitext(entry.name)[1].lower() or "no suffix"] += 1
    others.pop(".jsonl", None)
    others.pop(".partial", None)
    kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(9))
    notes = [f"{root}: skipped files that have no video suffix: {kinds}"] if others else []
    found += [Video(path, error=reason) for path, reason in unlisted.items()]
    return sorted(found, key=lambda entry: entry.path), notes, unlisted


def videos_below(folder: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """The paths of the video files below a folder, sorted, and the subfolders that cannot be listed, with the reason.

    Hidden files and links to folders are left out.
    """
    found, _, unlisted = walk(Path(folder), follow_links=False)
    paths = [os.path.join(folder, entry.path) for entry in found if entry.error is None]
    return paths, {os.path.join(folder, path): reason for path, reason in unlisted.items()}


def class_numbers(
    request: Request, raw: Sequence[str], names: Sequence[str], where: str = ""
) -> tuple[dict[str, int], tuple[str, ...]]:
    """The number of each class by its raw name. The given labels may hold the raw names or the readable ones."""
    if request.classes is None:
        if len(set(names)) < len(names):
            names = raw  # a_b and "a b" are two classes
        return {name: number for number, name in enumerate(raw)}, tuple(names)
    known = {name: number for number, name in enumerate(request.classes)}
    numbers: dict[str, int] = {}
    for old, new in zip(raw, names, strict=True):
        number = known.get(old, known.get(new))
        if number is None:
            raise ValueError(f"{where or request.path}: the class {old!r} is not in the labels ({len(known)} names)")
        numbers[old] = number
    return numbers, request.classes


class Place:
    """Turns the paths of a list into paths below the root.

    A missing video is replaced by its mp4 copy, or by a file whose name differs in Unicode composition only: macOS
    stores an accent apart from its letter.
    """

    def __init__(self, request: Request) -> None:
        self.roots = os.path.abspath(request.top), os.path.realpath(request.top)
        self._names: dict[str, dict[str, str]] = {}  # folder -> composed name -> name

    def entry(self, path: str, label: int | None) -> Video:
        below = posixpath.normpath(path.replace(os.sep, "/"))
        for root in self.roots:
            below = below.removeprefix(f"{root.rstrip('/')}/")
        if not leaves(below):
            return Video(self._there(below), label)
        return Video(
            path,
            label,
            error=f"lies outside of the root folder ({self.roots[0]}); --root (root=) gives another",
        )

    def _there(self, path: str) -> str:
        """The path if it exists, else that of its copy by `transcode` or of another spelling, else the path."""
        if os.path.lexists(f"{self.roots[0]}/{path}"):
            return path
        names = [path]
        if VIDEO_NAME.fullmatch(posixpath.basename(path)):
            names.append(posixpath.splitext(path)[0] + ".mp4")
        return next(filter(None, map(self._spelled, names)), path)

    def _spelled(self, path: str) -> str:
        """The path of an existing file that differs from this one in Unicode composition at most, or ""."""
        found = ""
        for part in path.split("/"):
            if not os.path.lexists(f"{self.roots[0]}/{found}{part}"):
                if found not in self._names:
                    try:
                        inside = os.listdir(f"{self.roots[0]}/{found}")
                    except OSError:
                        inside = []
                    self._names[found] = {unicodedata.normalize("NFC", name): name for name in inside}
                part = self._names[found].get(unicodedata.normalize("NFC", part), "")
                if not part:
                    return ""
            found += f"{part}/"
        return found.rstrip("/")

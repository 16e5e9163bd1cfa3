"""Lists of videos in the forms in which data sets come: which files there are, and the class of each."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

VIDEO_NAME = re.compile(
    r"[^.].*\.(3gp|avi|flv|m2ts|m4v|mkv|mov|mp4|mpe?g|mts|ogv|ts|webm|wmv)", re.IGNORECASE | re.DOTALL
)
"""What the name of a video file looks like; names that begin with a dot are passed over."""


@dataclass(frozen=True, slots=True)
class Entry:
    """A video that a source names: where it should be (below the root, "/" between folders), and its label."""

    path: str
    label: int | None = None
    member: str | None = None
    offset: int | None = None
    size: int = 0
    error: str | None = None


@dataclass(frozen=True)
class Listing:
    """What a source names, in its order."""

    root: Path
    classes: tuple[str, ...]
    entries: tuple[Entry, ...]


def read_source(source: str | os.PathLike[str]) -> Listing:
    """The videos that this folder holds, a class per folder in it."""
    root = Path(os.path.realpath(source))
    found = sorted(_walk(root))
    folders = sorted({path.split("/", 1)[0] for path in found if "/" in path})
    classes = tuple(folder.replace("_", " ") for folder in folders)
    numbers = {folder: number for number, folder in enumerate(folders)}
    return Listing(root, classes, tuple(Entry(path, numbers.get(path.split("/", 1)[0])) for path in found))


def _walk(root: Path) -> Iterator[str]:
    for folder, inside, files in os.walk(root):
        inside[:] = [name for name in inside if not name.startswith(".")]
        below = os.path.relpath(folder, root).replace(os.sep, "/")
        for name in (*files, *inside):
            if VIDEO_NAME.fullmatch(name):
                yield name if below == "." else f"{below}/{name}"

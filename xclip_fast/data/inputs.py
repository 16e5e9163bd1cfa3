"""The videos that a command line names: files, folders, globs, lists, standard input, URLs."""

from __future__ import annotations

import glob
import os
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from .manifest.listing import VIDEO_NAME, lines_of, unlisted_reason, videos_below
from .manifest.manifest import Manifest
from .remote import is_remote, remote_files


@dataclass
class Inputs:
    """The videos of a command line.

    `paths`: the videos in the given order, those of a folder sorted; a name that was given twice occurs twice.
    `folders`: the given folders, local or remote, in which a store looks for removed videos. `empty`: one line for each
    folder, glob or list without a video, and for each subfolder that cannot be listed. `unlisted`: the folders that
    cannot be listed, so that nothing is known of their videos.
    """

    paths: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    empty: list[str] = field(default_factory=list)
    unlisted: list[str] = field(default_factory=list)


def find_videos(given: str | os.PathLike[str] | Iterable[str | os.PathLike[str]]) -> Inputs:
    """The videos of each name.

    A folder stands for the video files in it and in its subfolders, without hidden ones. A name with `*`, `?` or `[`
    that is not a file stands for the files that match it (`**`: any folders). `-` stands for the paths on standard
    input, one on each line or separated by NUL bytes. A `.txt` file stands for the paths in it, one on each line,
    relative to the file's folder. A `.jsonl` file is a manifest. `http://`, `https://`, `s3://` and the other schemes
    of fsspec name remote files. If the scheme can list, they may also name remote folders and globs.

    Any other name is kept as a path; reading it gives the error. Raises ValueError for an empty name.
    """
    found = Inputs()
    names = [given] if isinstance(given, (str, os.PathLike)) else given
    for name in [os.fspath(each) for each in names]:
        before = len(found.paths)
        if not name:
            raise ValueError("a name is empty; a video file or folder is wanted")
        if name == "-":
            found.paths += [path for path in _standard_input() if path]
            kind = "paths on standard input"
        elif is_remote(name):
            kind = "video file in this remote folder"
            listed = remote_files(name)
            if listed is None:
                found.paths.append(name)
            else:
                found.folders.append(name)
                found.paths += [path for path in listed if VIDEO_NAME.fullmatch(path.rsplit("/", 1)[-1])]
        elif os.path.isdir(name):
            kind = "video file in this folder"
            found.folders.append(name)
            try:
                paths, unlisted = videos_below(name)
                found.paths += paths
                found.unlisted += unlisted
                found.empty += [f"{subfolder}: {reason}" for subfolder, reason in unlisted.items()]
            except OSError as error:
                found.unlisted.append(name)
                kind += f", which cannot be listed ({error.strerror})"
        elif os.path.isfile(name) and name.lower().endswith((".txt", ".jsonl")):
            kind = "video file in this list"
            paths, members = _listed(Path(name))
            found.paths += paths
            if members:
                why = "unpack them: only index, train and evaluate read videos in tar files"
                found.empty.append(f"{name}: {members} of its videos lie in tar files; {why}")
        elif glob.has_magic(name) and not os.path.lexists(name):
            kind = "file matches"
            unlisted = _unlisted(name)
            found.unlisted += unlisted
            found.empty += [f"{folder}: {reason}" for folder, reason in unlisted.items()]
            found.paths += sorted(path for path in glob.glob(name, recursive=True) if not os.path.isdir(path))
        else:
            kind = ""
            found.paths.append(name)
        if len(found.paths) == before:
            found.empty.append(f"{name}: no {kind}")
    return found


def _unlisted(pattern: str) -> dict[str, str]:
    """The folders that a glob looks into and cannot list, with the reason: ``glob`` passes over them silently."""
    found: dict[str, str] = {}
    pattern += "/*" if os.path.basename(pattern) == "**" else ""
    while glob.has_magic(pattern):
        pattern, name = os.path.split(pattern)
        if not glob.has_magic(name):
            continue
        for folder in glob.glob(f"{pattern}/", recursive=True) if pattern else ["."]:
            try:
                os.scandir(folder).close()
            except OSError as error:
                found[folder.rstrip("/")] = unlisted_reason(error)
    return found


def _standard_input() -> Sequence[str]:
    data = sys.stdin.buffer.read()
    return [os.fsdecode(line.rstrip(b"\r")) for line in data.split(b"\0" if b"\0" in data else b"\n")]


def _listed(file: Path) -> tuple[list[str], int]:
    """The paths of the videos in a list or a manifest, and the number of those in tar files."""
    if file.suffix.lower() == ".jsonl":
        manifest = Manifest.read(file)
        paths = [str(manifest.root / video.path) for video in manifest.videos if video.member is None]
        return paths, len(manifest) - len(paths)
    lines = (line for _, line in lines_of(file))
    return [line if is_remote(line) else os.path.join(file.parent, line) for line in lines], 0

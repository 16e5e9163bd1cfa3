"""Making a manifest: ``index`` reads new and changed files of a source, and takes the rest from earlier manifests."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import replace
from pathlib import Path

from ...files import full_disk, parse_json, require_regular
from ..decode.video import Video
from .manifest import VERSION, Manifest, checked, header_line, row_line
from .probing import file_status, look_all, real_folder
from .sources import Labels, read_source

log = logging.getLogger(__name__)

_Key = tuple[str, str | None, int | None]


def index(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str] | None = None,
    *,
    labels: Labels | None = None,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    format: str | None = None,
    reuse: Sequence[str | os.PathLike[str] | Manifest] = (),
    workers: int | None = None,
    timeout: float = 120.0,
    follow_links: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Read every video of a source once, write a manifest and return it.

    The source is a folder, a list or tar files, in one of the forms of `xclip_fast.data.manifest.sources`, which has
    examples. The content decides the form, or `format` names it: folder, flat, lines, kinetics, ucf101, hmdb51 or tar.

    out: the manifest's file. Default: `manifest.jsonl` in the folder, or `LIST.manifest.jsonl` next to a list.
    labels: names of the classes, if the source has ids or their order matters: a csv with id,name, a text file with
        one name on each line, or the names. A class that is not among them is an error.
    split: part of the source: a subfolder, "val" of Kinetics, "train1" to "test3" of UCF-101 and HMDB-51.
    root: the folder that the paths of a list are relative to, and may not lead out of. Default: the list's folder.
    reuse: other manifests with facts about the same files.
    workers: processes that read (default: one for each core; 0: this process). `timeout`: seconds for a file.
    follow_links: symbolic links may lead out of the root, and linked folders are entered.
    progress: called with (videos done, number of videos).

    A second run reads only files with a new size or time. A run that was killed goes on: its facts are in
    `OUT.partial`. A video that is missing or cannot be used is a row with an error. Raises ValueError for an unknown
    kind of source, and OSError if the source cannot be read or `out` cannot be written.
    """
    if (workers is not None and workers < 0) or not timeout > 0:
        raise ValueError(f"workers is {workers} and timeout is {timeout}; at least 0 and above 0 wanted")
    out = default_out(Path(source), split) if out is None else Path(out)
    if out.exists():
        try:
            reuse = (*reuse, Manifest.read(out))
        except ValueError as error:
            raise ValueError(f"{error}. Indexing would overwrite it: move it or choose another --out") from None
    partial = out.with_name(f"{out.name}.partial")
    _check_writable(out, partial)
    listing = read_source(source, labels=labels, split=split, root=root, format=format, follow_links=follow_links)
    for note in listing.notes:
        log.warning("%s", note)

    home = str(listing.root)
    real_folder.cache_clear()
    wanted = {_key(home, entry): entry for entry in listing.entries}  # a list may name a video twice
    facts = {key: replace(entry, label=None) for key, entry in wanted.items()}
    facts.update(_still_true(home, facts, _known(reuse, partial), follow_links))
    todo = [key for key, row in facts.items() if row.error is None and not row.frames]
    done = len(facts) - len(todo)
    with full_disk(partial, ". What was read before is kept"), open(partial, "a", encoding="ascii") as file:
        file.write("\n" + header_line(home, ()))  # the last line may be unfinished
        if progress:
            progress(done, len(facts))
        rows = [facts[key] for key in todo]
        found = look_all(home, rows, workers=workers, timeout=timeout, follow_links=follow_links)
        with closing(found):
            for number, video in found:
                facts[todo[number]] = video
                file.write(row_line(video))
                file.flush()
                done += 1
                if progress:
                    progress(done, len(facts))
    classes = len(listing.classes)
    videos = (checked(replace(facts[_key(home, entry)], label=entry.label), classes) for entry in listing.entries)
    manifest = Manifest(listing.root, listing.classes, tuple(videos))
    manifest.write(out)
    partial.unlink(missing_ok=True)
    return manifest


def _check_writable(out: Path, partial: Path) -> None:
    """Raises OSError before the work starts if the manifest cannot be written."""
    there = partial.exists()
    if there:
        require_regular(partial)
    try:
        with open(partial, "a", encoding="ascii"):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"the manifest cannot be written here ({error.strerror}); choose another file with --out",
            os.fspath(out),
        ) from error
    if not there:
        partial.unlink()


def default_out(source: Path, split: str | None) -> Path:
    """The default place of the manifest that ``index`` writes."""
    if source.is_dir():
        if split is not None and not (source / split).is_dir():
            return source / f"{split}.manifest.jsonl"
        return source / (split or "") / "manifest.jsonl"
    name = source.name
    if not source.exists():  # a pattern of tar files
        name = re.split(r"[-_.]*\{", name)[0] or "shards"
    return source.with_name(f"{name}.{split}.manifest.jsonl" if split else f"{name}.manifest.jsonl")


def _known(reuse: Sequence[str | os.PathLike[str] | Manifest], partial: Path) -> dict[_Key, Video]:
    """All known facts; later ones replace earlier ones."""
    known: dict[_Key, Video] = {}
    for each in reuse:
        manifest = each if isinstance(each, Manifest) else Manifest.read(each)
        known.update((_key(str(manifest.root), video), video) for video in manifest.videos)
    root = ""
    for line in partial.open("rb") if partial.exists() else ():
        try:
            row = parse_json(line)
            if "xclip_fast_manifest" in row:
                root = row["root"] if row["xclip_fast_manifest"] == VERSION else ""
            elif root:
                video = Video(**row)
                known[_key(root, video)] = video
        except (ValueError, TypeError, KeyError):
            log.info("%s: skipped an unfinished line", partial)
    return known


def _still_true(
    root: str, wanted: dict[_Key, Video], known: dict[_Key, Video], follow_links: bool
) -> dict[_Key, Video]:
    """The known rows whose files have not changed since; bad ones too, unless the process that read them died."""
    rows = [(key, known[key]) for key, row in wanted.items() if row.error is None and key in known]

    def unchanged(some: list[tuple[_Key, Video]]) -> list[tuple[_Key, Video]]:
        return [(key, row) for key, row in some if _unchanged(root, wanted[key], row, follow_links)]

    chunks = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    with ThreadPoolExecutor(16) as pool:  # threads, since they wait for the file system
        found = [pair for some in pool.map(unchanged, chunks) for pair in some]
    return {key: replace(row, path=wanted[key].path, label=None) for key, row in found}


def _unchanged(root: str, wanted: Video, row: Video, follow_links: bool) -> bool:
    if not row.mtime_ns or (row.error is None and not row.frames):
        return False
    try:
        row.plan  # noqa: B018  with a damaged plan the row is not used
        status = file_status(root, wanted.path, follow_links)
    except (OSError, ValueError):
        return False
    size = status.st_size if wanted.offset is None else wanted.size
    return (status.st_mtime_ns, size) == (row.mtime_ns, row.size)


def _key(root: str, video: Video) -> _Key:
    return os.path.join(root, video.path), video.member, video.offset

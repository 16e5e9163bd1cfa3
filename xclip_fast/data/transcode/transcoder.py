"""Copies of videos that decode fast: small, with a keyframe every few frames and no B frames.

Training reads a few frames of each video again and again. From such a copy it decodes a fraction of the original's
frames, and a GPU's decoder can read every copy: H.264, 4:2:0, 8 bits, upright, BT.601 colors in limited range, closed
groups of pictures, the index at the front. Frame i of the copy is frame i of the source, at the same time after the
first frame. Audio and metadata are left out.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import av

from ...files import parse_json, replaced
from ..decode.reading import ESCAPED
from ..decode.source import Source, VideoError
from ..manifest.listing import videos_below
from ..threads import usable_cores
from .reencode import CannotWrite, Settings, check, finish, reencode

_MAKER = "xclip-fast transcode"
_HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS}  # errors that every later file would meet, too

Purpose = Literal["any", "training"]
KEYFRAME_EVERY: dict[str, int] = {"any": 12, "training": 1}
"""Frames from one keyframe to the next, by purpose. With 1, eight frames of a video cost eight frames."""


@dataclass
class Summary:
    """The outcome for each source, by its given path.

    Each source is in one of `done`, `skipped` (a copy exists already) and `failed` (with the reason). `damaged`:
    sources of the first two that are damaged, with the damage. Their copies hold every decodable frame.
    """

    done: list[str] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    damaged: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        text = f"{len(self.done)} transcoded, {len(self.skipped)} exist already, {len(self.failed)} failed"
        return text + (f"; {len(self.damaged)} from damaged sources" if self.damaged else "")


def transcode(
    source: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    short_side: int = 256,
    keyframe_every: int | None = None,
    crf: float = 20,
    preset: str = "veryfast",
    workers: int | None = None,
    overwrite: bool = False,
    purpose: Purpose = "any",
    progress: Callable[[int, int], None] | None = None,
) -> Summary:
    """Writes a fast copy of a video, or of every video of a folder, into the folder `out`.

    `a/b.avi` becomes `out/a/b.mp4`, relative to the given folder. In a folder, hidden files and folders, symbolic links
    to folders, and `out` itself are skipped.

    A copy appears when it is complete, so a run may be killed and started again. A copy of the same content with the
    same settings is skipped. A source that was replaced, also by one of equal size, is copied again. A file of another
    origin or with other settings is replaced only with `overwrite`. A source is never replaced, through no name or
    link.

    `crf` is x264's quality (18: hard to tell from the source, 23: visibly softer), `preset` its effort. `purpose` sets
    the default of `keyframe_every`: 12 for "any", 1 for "training" (every frame decodes by itself, for two to three
    times the bytes). `workers` is the number of threads (default: one for each core). `progress(done, total)` is called
    after each source.

    A video that cannot be used is listed with the reason and does not stop the others. Raises ValueError for a bad
    argument, FileNotFoundError for a missing folder, and OSError if no file can be written (disk full).
    """
    if purpose not in KEYFRAME_EVERY:
        raise ValueError(f"purpose is {purpose!r}; it must be one of {', '.join(KEYFRAME_EVERY)}")
    every = KEYFRAME_EVERY[purpose] if keyframe_every is None else keyframe_every
    settings = Settings(short_side, every, crf, preset)  # type: ignore[arg-type]  # it checks the preset
    if workers is not None and workers < 1:
        raise ValueError(f"workers is {workers}; it must be at least 1")
    out = Path(out)
    summary = Summary()
    names = dict(_targets(Path(source), out, summary.failed))
    if not names:
        return summary
    out.mkdir(parents=True, exist_ok=True)
    by_target: dict[Path, list[str]] = {}
    for name, target in names.items():
        by_target.setdefault(target, []).append(name)
    originals = set(filter(None, map(_identity, names)))
    stop = threading.Event()

    def one(name: str, target: Path) -> tuple[list[str], str | None]:
        """The list of the summary that the source belongs to, and its damage, if any. Raises VideoError and OSError."""
        shown, goal = str(Source(name)), str(Source(str(target)))
        rivals = [str(Source(other)) for other in by_target[target] if other != name]
        if rivals:
            raise VideoError(f"{shown}: would become {goal}, as would {', '.join(rivals)}; rename one of them")
        there = _identity(target)
        if there in originals:
            raise VideoError(f"{shown}: its copy would replace {goal}, which is a source; choose another out folder")
        if there and not overwrite:
            made = _made(target)
            if made is None:
                raise VideoError(f"{shown}: {goal} exists and is not a copy by xclip-fast; --overwrite replaces it")
            if made["settings"] != asdict(settings):
                changed = ", ".join(f"{key} {value}" for key, value in made["settings"].items())
                raise VideoError(f"{shown}: {goal} was made with other settings ({changed}); --overwrite replaces it")
            status = os.stat(name)
            if made["size"] == status.st_size and (
                made["mtime_ns"] == status.st_mtime_ns or made["digest"] == _digest(name)
            ):
                with contextlib.suppress(OSError), replaced(target):
                    pass  # this removes what a killed run left; a disk that cannot be written has nothing to remove
                return summary.skipped, made["damage"]
        target.parent.mkdir(parents=True, exist_ok=True)
        with replaced(target) as whole:
            return summary.done, _copy(name, whole, settings, stop)

    workers = usable_cores() if workers is None else workers
    waiting: dict[Future[tuple[list[str], str | None]], str] = {}
    left = iter(names.items())
    pool = ThreadPoolExecutor(workers, thread_name_prefix="transcode")
    try:
        finished = 0
        while finished < len(names):
            for name, target in left:
                waiting[pool.submit(one, name, target)] = name
                if len(waiting) >= 2 * workers:
                    break
            for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                name = waiting.pop(future)
                try:
                    outcome, damage = future.result()
                except VideoError as error:
                    summary.failed[name] = str(error)
                except OSError as error:
                    if error.errno in _HOPELESS:
                        raise
                    place = f" ({error.filename})" if error.filename and error.filename != name else ""
                    summary.failed[name] = f"{Source(name)}: {error.strerror or error}{place}"
                else:
                    outcome.append(name)
                    if damage:
                        summary.damaged[name] = damage
                finished += 1
                if progress:
                    progress(finished, len(names))
    except OSError as error:
        if error.errno in _HOPELESS:
            why = f"{os.strerror(error.errno)}, after {finished} of {len(names)} videos"
            mend = "mend it and run the same command to go on"
            raise OSError(error.errno, f"{why}; {mend}", os.fspath(out)) from error
        raise
    finally:
        stop.set()
        pool.shutdown(cancel_futures=True)
    return summary


def _targets(source: Path, out: Path, failed: dict[str, str]) -> Iterator[tuple[str, Path]]:
    """Each source with the path of its copy. Subfolders that cannot be listed are added to ``failed``."""
    if not source.exists():
        raise FileNotFoundError(errno.ENOENT, "no such file or folder", os.fspath(source))
    if not source.is_dir():
        yield os.fspath(source), (out / source.name).with_suffix(".mp4")
        return
    if out.exists() and out.samefile(source):
        raise ValueError(f"{out} is the folder of the sources; choose another one for the copies")
    copies = out.resolve()
    is_inside = copies.is_relative_to(source.resolve())  # then what lies in it is no source
    paths, unlisted = videos_below(source)
    failed.update(unlisted)
    for found in paths:
        if not (is_inside and Path(found).parent.resolve().is_relative_to(copies)):
            yield found, (out / os.path.relpath(found, source)).with_suffix(".mp4")


def _identity(path: str | Path) -> tuple[int, int] | None:
    """The device and inode of a file, which are the same through every link; None if there is no file."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _made(target: Path) -> dict[str, Any] | None:
    """The note that `transcode` stores in a copy: "settings", and of the source "size", "mtime_ns", "digest", "damage".

    None for a file that is not such a copy.
    """
    try:
        options = {"protocol_whitelist": "file"}
        with av.open(f"file:{target}", options=options, **ESCAPED) as container:
            comment = container.metadata.get("comment", "")
    except (av.FFmpegError, OSError):
        return None
    maker, _, text = comment.partition(": ")
    if maker != _MAKER:
        return None
    try:
        made = parse_json(text)
    except ValueError:
        return None
    complete = isinstance(made, dict) and {"settings", "size", "mtime_ns", "digest", "damage"} <= made.keys()
    return made if complete and isinstance(made["settings"], dict) else None


def _digest(name: str) -> str:
    """A hash of the file's content: a source that was only touched or moved need not be copied again."""
    with open(name, "rb") as file:
        return hashlib.file_digest(file, partial(hashlib.blake2b, digest_size=16)).hexdigest()


def _copy(name: str, whole: Path, settings: Settings, stop: threading.Event) -> str | None:
    """Transcodes one file. Returns its damage, if any. Raises VideoError and OSError."""
    source = os.stat(name)
    draft = whole.with_name("draft")  # a name that no copy has
    try:
        found, clock = reencode(name, draft, settings, stop.is_set)
        damage = "; ".join(found) or None
        made = {"settings": asdict(settings), "size": source.st_size, "mtime_ns": source.st_mtime_ns}
        made["digest"] = _digest(name)
        # The damage is known only now, and the note stands before the packets.
        finish(draft, whole, clock, f"{_MAKER}: {json.dumps(made | {'damage': damage})}")
    except CannotWrite as error:
        if error.errno in _HOPELESS:
            raise OSError(error.errno, os.strerror(error.errno), os.fspath(whole)) from error
        raise VideoError(f"{Source(name)}: cannot be encoded as H.264 ({error})") from error
    check(whole, clock)
    now = os.stat(name)
    if (now.st_size, now.st_mtime_ns) != (source.st_size, source.st_mtime_ns):
        raise VideoError(f"{Source(name)}: changed while it was read; run it again")
    return damage

"""The manifest: the videos of a data set and the facts that one pass over the files found.

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
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, get_args, get_type_hints

import numpy as np

from ...console import plain
from ...files import replaced
from ..decode.video import DamagedPlan, Video, one_line, video_name
from .listing import Entry
from .probing import file_status, look_all, real_folder
from .sources import Labels, read_source

if TYPE_CHECKING:  # plan imports PyAV, which a manifest can do without
    from ..decode.reading import Source

log = logging.getLogger(__name__)

VERSION = 2
_READABLE = (1, 2)
"""Version 1 took a read error for the end of a file, and a packet of field-coded video for a frame. Its decoding plans
are not used, and `index` looks at its videos again."""


_DEFAULTS = {field.name: field.default for field in fields(Video)}
_HINTS = {name: get_args(hint) or (hint,) for name, hint in get_type_hints(Video).items()}
_KINDS = {name: (*kinds, int) if float in kinds else kinds for name, kinds in _HINTS.items()}  # 25 for 25.0
_COUNTS = {"offset", "size", "frames", "width", "height"}


@dataclass(frozen=True)
class Manifest:
    """The videos of a data set, below one folder `root`, and the names of their classes. Immutable.

    `version`: of the file it was read from.
    """

    root: Path
    classes: tuple[str, ...]
    videos: tuple[Video, ...]
    version: int = VERSION

    def __len__(self) -> int:
        return len(self.videos)

    @staticmethod
    def read(path: str | os.PathLike[str], root: str | os.PathLike[str] | None = None) -> Manifest:
        """The manifest in this file; `root` says where the videos are now, if not where the file says.

        A damaged line is a video with an error, and is logged. Raises ValueError for a file that is not a manifest or
        has no good line, and OSError if it cannot be read.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder, not a manifest. To make one of it: xclip-fast index {path}")
        with open(path, "rb") as file:
            header = _header(path, file.readline())
            videos = tuple(_rows(path, enumerate(file, 2), len(header["classes"])))
        version = header["xclip_fast_manifest"]
        if version < VERSION:
            videos = tuple(replace(video, packed=None) for video in videos)
            log.warning(
                "%s: was made by an earlier version. Its decoding plans are not used, and decoding is slower, until "
                "`xclip-fast index` is run again",
                path,
            )
        if root is None:  # a relative one is seen from where the file really is
            root = os.path.join(os.path.dirname(os.path.realpath(path)), header["root"])
        return Manifest(Path(os.path.realpath(root)), tuple(header["classes"]), videos, version)

    def write(self, path: str | os.PathLike[str]) -> None:
        """Write the file, whole or not at all. A root above or below it is stored relative to it, to be moved along."""
        path = Path(path)
        with replaced(path) as part, open(part, "x", encoding="ascii") as file:
            file.write(_dump({"xclip_fast_manifest": self.version, "root": self._stored_root(path)}, self.classes))
            file.writelines(_line(video) for video in self.videos)

    def _stored_root(self, path: Path) -> str:
        root, home = Path(os.path.realpath(self.root)), Path(os.path.realpath(path)).parent
        if root == home or home in root.parents or root in home.parents:
            return Path(os.path.relpath(root, home)).as_posix()
        return str(root)

    def source(self, row: int) -> Source:
        """The source that the decoder opens for this row. Raises ValueError for a row with an error."""
        from ..decode.reading import Source

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

    def with_errors(self, bad: Mapping[int, str]) -> Manifest:
        """The same manifest with these rows marked as ones that cannot be used, and why.

        An index that reuses them looks at these files again.
        """
        videos = list(self.videos)
        for row, reason in bad.items():
            videos[row] = replace(videos[row], error=one_line(reason), mtime_ns=0)
        return replace(self, videos=tuple(videos))


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
    if version not in _READABLE:
        raise ValueError(
            f"{path}: is a manifest of version {version!r}; this program reads {' and '.join(map(str, _READABLE))}. "
            "Make it again with `xclip-fast index`"
        )
    classes = header.get("classes")
    if not isinstance(header.get("root"), str) or not isinstance(classes, list):
        raise ValueError(f"{path}: the header needs a root and classes; index anew")
    if not all(isinstance(name, str) for name in classes):
        raise ValueError(f"{path}: every class must have a name in the header; index anew")
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
            video = _video(row := json.loads(line))
            _check(video, classes)
            good += 1
        except (ValueError, RecursionError) as error:
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
        raise ValueError("wanted a JSON object with the path of a video and its facts")
    for name, value in row.items():
        kinds = _KINDS.get(name)
        if kinds is None:
            raise ValueError(f"{name!r} is not a field of a manifest's row; the file may be of a newer version")
        if type(value) not in kinds:
            wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
            raise ValueError(f"{name} is {value!r}; wanted is {wanted}")
        if name in _COUNTS and value is not None and not 0 <= value < 2**62:
            raise ValueError(f"{name} is {value}; it must be at least 0 and below 2**62")
    return Video(**row)


def _check(video: Video, classes: int) -> None:
    if video.label is not None and not 0 <= video.label < classes:
        raise ValueError(f"label {video.label} is not one of the {classes} classes")
    if video.error is None and (video.path.startswith("/") or ".." in video.path) and leaves(video.path):
        raise ValueError(f"{plain(video.path)} leads out of the root folder")


def leaves(path: str) -> bool:
    """True if a path, by its spelling alone, may lead out of its folder."""
    return os.path.isabs(path) or ".." in PurePosixPath(path).parts


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
    """Look at every video of a source once and write down what there is: a manifest, as a file and returned.

    The source is a folder or a list, in one of these forms (told by content, or by `format`):

    folder: a folder per class; "_" in its name stands for a space. data/riding_a_bike/001.mp4
    flat: a folder of videos without classes. data/001.mp4
    lines: path, space, id of the label, whose names `labels` gives. riding a bike/001.mp4 12
    kinetics: the official csv; the files are found by YouTube id. abseiling,0347ZoDXyP0,95,105,train
    ucf101: trainlist01.txt, testlist01.txt, ... beside classInd.txt; or their folder and split="train1".
    hmdb51: the folder of brush_hair_test_split1.txt, ... and split="train1".
    tar: uncompressed shards, as WebDataset makes them: one, a folder of them, or train-{0000..0099}.tar.

    `xclip_fast.data.manifest.sources` has examples.

    out: the manifest's file. By default `manifest.jsonl` in the folder, `LIST.manifest.jsonl` beside a list.
    labels: names of classes, where the source has ids or the order matters: a csv of id,name, a text file with a name
        a line, or the names. Videos of a class that is not among them are refused.
    split: which part of the source: a subfolder, "val" of Kinetics, "train1" to "test3" of UCF-101 and HMDB-51.
    root: the folder that a list's paths are relative to; none may lead out of it. Default: where the list is.
    reuse: other manifests, whose facts about the same files hold here, too.
    workers: processes that read (default: one per core; 0: in this process). `timeout`: seconds that a file may take.
    follow_links: symbolic links may lead out of the root, and are entered if they are folders.
    progress: called with (videos done, videos in all).

    Run again, it looks only at what is new or changed (size or time), also after it was killed: what it knew by then
    is in `OUT.partial`. A video that cannot be used is a row with an error; so is one that is listed but not there.
    Raises ValueError for a source that it does not understand, OSError for one it cannot read or `out` it cannot write.
    """
    if (workers is not None and workers < 0) or not timeout > 0:
        raise ValueError(f"workers is {workers} and timeout {timeout}; they must be at least 0, and above 0 seconds")
    out = default_out(Path(source), split) if out is None else Path(out)
    if out.exists():
        try:
            reuse = (*reuse, Manifest.read(out))
        except ValueError as error:
            raise ValueError(f"{error}. It would be overwritten: move it away, or choose another place") from None
    partial = out.with_name(f"{out.name}.partial")
    _check_writable(out, partial)
    listing = read_source(source, labels=labels, split=split, root=root, format=format, follow_links=follow_links)
    for note in listing.notes:
        log.warning("%s", note)

    home = str(listing.root)
    real_folder.cache_clear()
    wanted = {_key(home, entry): entry for entry in listing.entries}  # a list may name a video twice
    facts = {key: Video(entry.path, None, entry.member, entry.offset, entry.size) for key, entry in wanted.items()}
    facts.update({key: replace(facts[key], error=entry.error) for key, entry in wanted.items() if entry.error})
    facts.update(_still_true(home, facts, _known(reuse, partial), follow_links))
    todo = [key for key, row in facts.items() if row.error is None and not row.frames]
    done = len(facts) - len(todo)
    with open(partial, "a", encoding="ascii") as file:
        file.write("\n" + _dump({"xclip_fast_manifest": VERSION, "root": home}, ()))  # the last line may be torn
        if progress:
            progress(done, len(facts))
        rows = [facts[key] for key in todo]
        found = look_all(home, rows, workers=workers, timeout=timeout, follow_links=follow_links)
        with closing(found):
            for number, video in found:
                facts[todo[number]] = video
                file.write(_line(video))
                file.flush()
                done += 1
                if progress:
                    progress(done, len(facts))
    classes = len(listing.classes)
    videos = (_readable(replace(facts[_key(home, entry)], label=entry.label), classes) for entry in listing.entries)
    manifest = Manifest(listing.root, listing.classes, tuple(videos))
    manifest.write(out)
    partial.unlink(missing_ok=True)
    return manifest


def _check_writable(out: Path, partial: Path) -> None:
    """Says before the work if the manifest cannot be written."""
    there = partial.exists()
    try:
        with open(partial, "a", encoding="ascii"):
            pass
    except OSError as error:
        raise OSError(
            error.errno,
            f"the manifest cannot be written here ({error.strerror}); give it another place: --out FILE",
            os.fspath(out),
        ) from error
    if not there:
        partial.unlink()


def _readable(video: Video, classes: int) -> Video:
    """The row, or one with an error in place of facts that `Manifest.read` would refuse."""
    try:
        _video(json.loads(_line(video)))
        _check(video, classes)
    except ValueError as error:
        return Video(video.path, member=video.member, error=one_line(f"cannot be listed: {error}"))
    return video


_Key = tuple[str, str | None, int | None]


def _key(root: str, video: Video | Entry) -> _Key:
    return os.path.join(root, video.path), video.member, video.offset


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
    """Every fact at hand; later ones go before earlier ones."""
    known: dict[_Key, Video] = {}
    for each in reuse:
        manifest = each if isinstance(each, Manifest) else Manifest.read(each)
        if manifest.version < VERSION:
            continue
        known.update((_key(str(manifest.root), video), video) for video in manifest.videos)
    root = ""
    for line in partial.open("rb") if partial.exists() else ():
        try:
            row = json.loads(line)
            if "xclip_fast_manifest" in row:
                root = row["root"] if row["xclip_fast_manifest"] == VERSION else ""
            elif root:
                video = Video(**row)
                known[_key(root, video)] = video
        except (ValueError, TypeError):
            log.info("%s: skipped an unfinished line", partial)
    return known


def _still_true(
    root: str, wanted: dict[_Key, Video], known: dict[_Key, Video], follow_links: bool
) -> dict[_Key, Video]:
    """Those known rows whose files have not changed since; also the bad ones, unless their reader died."""
    rows = [(key, known[key]) for key, row in wanted.items() if row.error is None and key in known]

    def unchanged(some: list[tuple[_Key, Video]]) -> list[tuple[_Key, Video]]:
        return [(key, row) for key, row in some if _unchanged(root, wanted[key], row, follow_links)]

    chunks = [rows[start : start + 256] for start in range(0, len(rows), 256)]
    with ThreadPoolExecutor(16) as pool:  # they wait for the file system
        found = [pair for some in pool.map(unchanged, chunks) for pair in some]
    return {key: replace(row, path=wanted[key].path, label=None) for key, row in found}


def _unchanged(root: str, wanted: Video, row: Video, follow_links: bool) -> bool:
    if not row.mtime_ns or (row.error is None and not row.frames):
        return False
    try:
        row.plan  # noqa: B018  damaged, the row is no fact
    except DamagedPlan:
        return False
    try:
        status = file_status(root, wanted.path, follow_links)
    except (OSError, ValueError):
        return False
    size = status.st_size if wanted.offset is None else wanted.size
    return (status.st_mtime_ns, size) == (row.mtime_ns, row.size)


def summary(manifest: Manifest) -> str:
    """A few lines of text about a manifest, for people."""
    good = [video for video in manifest.videos if video.error is None]
    seconds = sum(video.duration for video in good)
    total, bad = len(manifest.videos), len(manifest.videos) - len(good)
    hours, rest = divmod(round(seconds), 3600)
    lines = [
        f"{total} videos, {len(manifest.classes)} classes, in {plain(str(manifest.root))}",
        f"{len(good)} usable: {sum(video.frames for video in good)} frames, {hours} h {rest // 60} min {rest % 60} s",
    ]
    if good:
        lines.append(f"codecs: {_counts(f'{video.codec} {video.pix_fmt}' for video in good)}")
        lines.append(f"sizes: {_counts(f'{video.width}x{video.height}' for video in good)}")
        lines.append(_on_the_cpu(good))
    unlabeled = sum(video.label is None for video in manifest.videos)
    if manifest.classes and unlabeled:
        lines.append(f"without a label: {unlabeled}")
    used = {video.label for video in good}
    empty = [name for number, name in enumerate(manifest.classes) if number not in used]
    if empty:
        lines.append(f"classes without a usable video: {len(empty)} ({_some(empty)})")
    if bad:
        lines.append(f"{bad} cannot be used:")
        by_reason: dict[str, list[str]] = {}
        for video in manifest.videos:
            if video.error is not None:
                by_reason.setdefault(video.error, []).append(video_name(video))
        for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1]))[:20]:
            lines.append(f"  {len(names)} x {reason}: {_some(names)}")
        if len(by_reason) > 20:
            lines.append(f"  ... and {len(by_reason) - 20} other reasons")
    return "\n".join(lines)


def _on_the_cpu(videos: Sequence[Video]) -> str:
    """The share of videos that a GPU can decode, and why not the others. Of over 5000, a random 5000 are counted."""
    from ..decode.dali_support import supported

    chosen = np.random.default_rng(0).permutation(len(videos))[:5000]
    reasons = Counter(reason.split(":")[0] for row in chosen if (reason := supported(videos[row])) is not None)
    shares = ", ".join(f"{reason} {count / len(chosen):.1%}" for reason, count in reasons.most_common())
    if not shares:
        return "a GPU with NVIDIA DALI can decode all of them"
    about = "about " if len(chosen) < len(videos) else ""
    total = reasons.total() / len(chosen)
    return f"a GPU with NVIDIA DALI can decode {about}{1 - total:.1%}; the CPU decodes the rest ({shares})"


def _counts(things: Iterable[str]) -> str:
    counts = Counter(things).most_common()
    more = f", {len(counts) - 5} others" if len(counts) > 5 else ""
    return ", ".join(f"{count} x {thing}" for thing, count in counts[:5]) + more


def _some(names: Sequence[str]) -> str:
    return ", ".join(map(plain, names[:3])) + (", ..." if len(names) > 3 else "")

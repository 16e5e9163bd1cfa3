"""Videos in uncompressed tar files, read in place: nothing is extracted.

The files of one sample share their name up to the first dot of the base name, as in WebDataset:

    clips/000017.mp4      the video (any suffix of a video)
    clips/000017.cls      its label: the id, or the name of the class
    clips/000017.json     or {"label": id or name}
    clips/000017.txt      or the name of the class as text

In shards without labels the top folders are the classes, if all videos lie in folders.
"""

from __future__ import annotations

import contextlib
import os
import re
import tarfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path

from ...files import parse_json
from ..decode.video import Video
from .listing import VIDEO_NAME, Listing, Request

_LABEL_SUFFIXES = ("cls", "json", "txt")  # the first one with a label counts
_LONGEST_LABEL = 65536  # bytes
_EXTENSIONS = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
_COMPRESSED = {b"\x1f\x8b": "gzip -d", b"BZh": "bzip2 -d", b"\xfd7zXZ": "xz -d", b"\x28\xb5\x2f\xfd": "zstd -d"}


class _Member(tarfile.TarInfo):
    """A header that refuses impossible sizes: at a negative size `tarfile` would go backwards without end."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> _Member:
        member = super().frombuf(buf, encoding, errors)
        if member.size < 0 or (member.type in _EXTENSIONS and member.size > _LONGEST_LABEL):
            raise tarfile.InvalidHeaderError(f"a size of {member.size} bytes")  # type: ignore[attr-defined]
        return member


@dataclass
class _Sample:
    videos: list[Video] = field(default_factory=list)
    labels: dict[str, int | str] = field(default_factory=dict)  # by suffix
    error: str | None = None  # what is wrong with a label


def read_shards(request: Request) -> Listing:
    """The videos in a tar file, in all tar files of a folder, or in those of a pattern like train-{0000..0099}.tar."""
    if request.root is not None:
        raise ValueError(f"{request.path}: the root of tar files is their folder; leave --root (root=) out")
    folder, names = _shard_names(request.path)
    for name in names:
        _refuse_compressed(folder / name)
    samples = [sample for name in names for sample in _read(folder, name)]
    labels: Sequence[int | str | None]
    if any(sample.labels for sample in samples):
        labels = [
            next((each.labels[kind] for kind in _LABEL_SUFFIXES if kind in each.labels), None) for each in samples
        ]
    else:
        labels = _top_folders(samples)
    numbers, classes = _classes(request, labels, samples)
    entries = [
        replace(entry, label=number, error=entry.error or sample.error)
        for sample, number in zip(samples, numbers, strict=True)
        for entry in sample.videos
    ]
    return Request(folder).listing(classes, entries)


def _shard_names(path: Path) -> tuple[Path, list[str]]:
    """The folder of the shards, and the names of the shards."""
    if path.is_dir():
        names = sorted(entry.name for entry in os.scandir(path) if re.search(r"\.(tar|tgz)(\.|$)", entry.name))
        names = [name for name in names if not name.startswith(".") and not name.endswith((".jsonl", ".partial"))]
        if not names:
            raise ValueError(f"{path}: holds no tar file")
        return path, names
    if path.exists():
        return path.parent, [path.name]
    return path.parent, list(_expand(path.name))


def _expand(pattern: str) -> Iterator[str]:
    """The names of a pattern: {0000..0099} counts and {a,b} lists, as in a shell."""
    parts = re.split(r"\{([^{}]*)\}", pattern)
    choices: list[Sequence[str]] = []
    for place, part in enumerate(parts):
        count = re.fullmatch(r"(\d+)\.\.(\d+)", part)
        if place % 2 == 0:
            choices.append([part])
        elif count:
            first, last = int(count[1]), int(count[2])
            if not first <= last < first + 1_000_000:
                raise ValueError(f"{pattern}: {{{part}}} must count upwards, by at most a million")
            choices.append([f"{number:0{len(count[1])}d}" for number in range(first, last + 1)])
        else:
            choices.append(part.split(","))
    if len(parts) == 1:
        raise ValueError(f"{pattern}: no such file, and no pattern like train-{{0000..0099}}.tar either")
    return map("".join, product(*choices))


def _refuse_compressed(path: Path) -> None:
    with contextlib.suppress(OSError), open(path, "rb") as file:  # `_read` names the error
        start = file.read(6)
        for magic, tool in _COMPRESSED.items():
            if start.startswith(magic):
                raise ValueError(f"{path}: is compressed and cannot be read in place; uncompress it first: {tool}")


def _read(folder: Path, name: str) -> list[_Sample]:
    """The samples of one shard, in its order. An error of the shard itself is a row, too."""
    path = folder / name
    samples: dict[str, _Sample] = {}
    try:
        at, length = -1, os.path.getsize(path)
        with tarfile.open(path, "r:", tarinfo=_Member) as tar:
            while tar.offset > at and (member := tar.next()) is not None:
                at = member.offset
                tar.members = []  # type: ignore[attr-defined]  # or it keeps every header
                _take(tar, member, name, length, samples)
            if tar.offset <= at:
                raise tarfile.TarError(f"the member at byte {at} has an impossible size")
            reason = _after(path, tar.offset, length)
    except (OSError, tarfile.TarError, ValueError, OverflowError) as error:
        reason = f"cannot be read to its end ({getattr(error, 'strerror', None) or error})"
    if reason:
        samples["/"] = _Sample([Video(name, error=f"the tar file {reason}")])
    return [sample for sample in samples.values() if sample.videos]


def _after(path: Path, offset: int, length: int) -> str | None:
    """The reason why reading stopped before the end, or None. `tarfile` stops silently at a damaged header."""
    with open(path, "rb") as file:
        file.seek(offset)
        rest = file.read(1 << 20)
    if offset >= length or (len(rest) < 512 and not any(rest)):
        return "ends without an end mark: it may have been cut off"
    if any(rest[:512]):
        return f"is damaged or cut off at byte {offset}; the rest is not read"
    return "goes on after its end mark. That part is not read: were files joined with cat?" if any(rest) else None


def _take(tar: tarfile.TarFile, member: tarfile.TarInfo, shard: str, length: int, samples: dict[str, _Sample]) -> None:
    folder, _, base = member.name.rpartition("/")
    key, _, suffix = base.partition(".")
    if member.isdir() or base.startswith("."):
        return
    sample = samples.setdefault(f"{folder}/{key}", _Sample())
    suffix = suffix.lower()
    if VIDEO_NAME.fullmatch(base):
        sample.videos.append(_member(member, shard, length))
    elif suffix in _LABEL_SUFFIXES and suffix not in sample.labels:
        try:
            label = _label(tar, member, suffix)
            if label is not None:
                sample.labels[suffix] = label
        except (ValueError, TypeError) as error:
            sample.error = f"its label in {member.name} cannot be read ({error})"


def _member(member: tarfile.TarInfo, shard: str, length: int) -> Video:
    if member.size < 0:
        return Video(shard, member=member.name, offset=0, error=f"has an impossible size of {member.size} bytes")
    entry = Video(shard, member=member.name, offset=member.offset_data, size=member.size)
    if not member.isfile():
        kind = "link" if member.issym() or member.islnk() else "device or pipe"
        return replace(entry, error=f"is a {kind} in the tar file, not a file")
    if member.issparse():
        return replace(entry, error="is stored in pieces (a sparse file); make the tar file again without --sparse")
    if member.offset_data + member.size > length:
        return replace(entry, size=0, error="is cut off: the tar file ends before its data does")
    if not member.size:
        return replace(entry, error="is empty (zero bytes)")
    return entry


def _label(tar: tarfile.TarFile, member: tarfile.TarInfo, suffix: str) -> int | str | None:
    if not member.isfile() or member.size > _LONGEST_LABEL:
        raise ValueError(f"it is not a file of up to {_LONGEST_LABEL} bytes")
    file = tar.extractfile(member)
    data = file.read() if file else b""
    if suffix != "json":
        text = data.decode().strip()
        return int(text) if re.fullmatch(r"[+-]?\d+", text) else text or None
    content = parse_json(data)
    label = content.get("label") if isinstance(content, dict) else None
    if label is not None and (isinstance(label, bool) or not isinstance(label, int | str)):
        raise ValueError(f"label is {label!r}; it must be a whole number or a name")
    return label


def _top_folders(samples: Sequence[_Sample]) -> list[str | None]:
    """For each sample the folder that names its class, below the folders that all samples share."""
    members = [sample.videos[0].member for sample in samples]
    paths = [None if name is None else name.removeprefix("./").split("/")[:-1] for name in members]
    known = [path for path in paths if path is not None]
    if not all(known):
        return [None] * len(paths)
    shared = 0
    while len({path[shared] for path in known}) == 1 and all(len(path) > shared + 1 for path in known):
        shared += 1
    return [None if path is None else path[shared] for path in paths]


def _classes(
    request: Request, labels: Sequence[int | str | None], samples: Sequence[_Sample]
) -> tuple[list[int | None], tuple[str, ...]]:
    """The class of each sample, by its label (an id or a name), and the names of the classes."""
    classes = request.classes or tuple(sorted({label for label in labels if isinstance(label, str)}))
    known: dict[int | str | None, int] = dict(zip(classes, range(len(classes)), strict=True))
    known.update((number, number) for number in range(len(classes)))
    numbers: list[int | None] = []
    wrong: list[str] = []
    for label, sample in zip(labels, samples, strict=True):
        where = f"{request.path}: {sample.videos[0].path}:{sample.videos[0].member}"
        if isinstance(label, int) and request.classes is None:
            raise ValueError(
                f"{where} has the id {label} for a label; give the names too, as a csv of id,name: --labels (labels=)"
            )
        readable = label.replace("_", " ") if isinstance(label, str) else label
        numbers.append(known.get(label, known.get(readable)))
        if label is not None and numbers[-1] is None:
            sample.error = sample.error or f"its label {label!r} is not one of the {len(classes)} classes"
            wrong.append(f"{where}: label {label!r} is not one of the {len(classes)} classes")
    if wrong and len(wrong) == sum(label is not None for label in labels):
        raise ValueError(wrong[0])
    return numbers, classes

"""The forms in which data sets come: folders, lists and tar files. The result is a list of files with their classes.

folder: a folder for each class; "_" in its name stands for a space; folders inside belong to the same class.

    data/riding_a_bike/001.mp4
    data/archery/indoors/007.webm

flat: a folder of videos without classes.

    data/001.mp4
    data/002.mp4

lines: a path and the id of its label on each line; a csv of id,name gives the names. The path is all but the last
field, so it may contain spaces. A list of paths alone has no labels.

    riding a bike/001.mp4 12
    archery/indoors/007.webm 3

kinetics: the official csv files. Videos are found by their names, {youtube_id}_{start:06d}_{end:06d} or {youtube_id},
in any folder below the root. Missing videos are listed with an error.

    label,youtube_id,time_start,time_end,split
    abseiling,0347ZoDXyP0,95,105,train

ucf101: trainlist01.txt, testlist01.txt and so on, beside classInd.txt. ApplyEyeMakeup becomes "Apply Eye Makeup".

    ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.avi 1
    YoYo/v_YoYo_g08_c01.avi 101

hmdb51: the folder of brush_hair_test_split1.txt and the others; 1 is training, 2 test, 0 neither.

    April_09_brush_hair_u_nm_np1_ba_goo_0.avi 1
    Blonde_being_brushed_brush_hair_f_nm_np2_ri_med_0.avi 2

tar: uncompressed tar files, one, a folder of them, or a pattern like train-{0000..0099}.tar (see shards.py).

    000017.mp4
    000017.cls

Nothing here opens a video. A file that a list names is listed even if it is missing.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

from ...files import errors_name, require_regular
from ..decode.video import Video
from .labels import Labels, read_labels
from .listing import VIDEO_NAME, Listing, Place, Request, class_numbers, is_folder, lines_of, walk
from .official import HMDB_LIST, hmdb51, kinetics, ucf101
from .shards import read_shards

# The last field is the id; the path is all before it.
_LINE = re.compile(r"[ \t]*(.*[^\s,;])(?:[ \t]*[,;][ \t]*|[ \t]+)([+-]?\d+)[ \t\r]*", re.DOTALL)

_SPLIT_NAMES = {"train", "training", "val", "valid", "validation", "validate", "test", "testing"}


def read_source(
    source: str | os.PathLike[str],
    *,
    labels: Labels | None = None,
    split: str | None = None,
    root: str | os.PathLike[str] | None = None,
    format: str | None = None,
    follow_links: bool = False,
) -> Listing:
    """The videos of a source, with the arguments of `index`.

    Raises ValueError, with file and line, for a source of another form, and OSError if the source cannot be read.
    """
    path = Path(source)
    if root is not None and not os.path.isdir(root):
        raise ValueError(f"root is {str(root)!r}; it must be an existing folder")
    if format is not None and format not in READERS:
        raise ValueError(f"format is {format!r}; it must be one of {', '.join(READERS)}")
    if split is not None and path.is_dir() and (path / split).is_dir() and format in (None, "folder", "flat", "tar"):
        path, split = path / split, None
    request = Request(
        path, None if labels is None else read_labels(labels), split, None if root is None else str(root), follow_links
    )
    kind = format or _kind(path)
    if split is not None and kind not in ("kinetics", "ucf101", "hmdb51"):
        raise ValueError(f"{path}: has no split {split!r}, because it has no folder of that name (read as: {kind})")
    listing = READERS[kind](request)
    if not listing.entries:
        raise ValueError(f"{path}: has no video{f' in split {split!r}' if split else ''} (read as: {kind})")
    return listing


def _kind(path: Path) -> str:
    """The format, by content."""
    if path.is_dir():
        names = [entry for entry in os.scandir(path) if not entry.name.startswith(".")]
        if any(HMDB_LIST.fullmatch(entry.name) for entry in names):
            return "hmdb51"
        if any(entry.name == "classInd.txt" for entry in names):
            return "ucf101"
        if any(re.search(r"\.(tar|tgz)(\.|$)", entry.name) for entry in names) and not any(map(is_folder, names)):
            return "tar"
        return "folder" if any(map(is_folder, names)) else "flat"
    if not path.exists() and re.search(r"\{.*\}", path.name):
        return "tar"
    require_regular(path)
    with errors_name(path), open(path, "rb") as file:
        start = file.read(65536)
    if start[257:262] == b"ustar" or re.search(r"\.(tar|tgz)(\.|$)", path.name):
        return "tar"
    if start.startswith(b'{"xclip_fast_manifest"'):
        raise ValueError(f"{path}: is a manifest already; give the folder or list that it was made from")
    if b"\0" in start or VIDEO_NAME.fullmatch(path.name):
        raise ValueError(f"{path}: is not a list of videos; give a folder, a text file, a csv file or a tar")
    first = start.split(b"\n", 1)[0].decode("utf-8", "replace").lower()
    if "youtube_id" in first:
        return "kinetics"
    if (path.parent / "classInd.txt").exists() and re.match(r"(train|test)list", path.name):
        return "ucf101"
    if path.suffix.lower() in (".csv", ".tsv") and not (VIDEO_NAME.fullmatch(first.strip()) or _LINE.fullmatch(first)):
        raise ValueError(
            f"{path}: is not a csv of Kinetics, whose header has youtube_id; this header is {first.strip()[:80]!r}. In "
            "other lists each line is a path and the id of a label"
        )
    return "lines"


def _folder(request: Request) -> Listing:
    """A folder for each class. Folders inside it belong to the same class."""
    _needs_folder(request)
    found, notes, _ = walk(request.path, request.follow_links)
    tops = sorted(
        entry.name for entry in os.scandir(request.path) if not entry.name.startswith(".") and is_folder(entry)
    )
    loose = [entry for entry in found if "/" not in entry.path and entry.path not in tops]
    found = [entry for entry in found if entry not in loose]
    if len(loose) > len(found):
        raise ValueError(
            f"{request.path}: has {len(found)} videos in class folders and {len(loose)} outside of them "
            f"({loose[0].path!a}); move these into folders, or read all videos without classes: --format flat"
        )
    if len(tops) > 0 and {top.lower() for top in tops} <= _SPLIT_NAMES:
        raise ValueError(
            f"{request.path}: its folders are splits ({', '.join(tops)}), not classes; choose one: --split {tops[0]}"
        )
    number_of, classes = class_numbers(request, tops, [top.replace("_", " ") for top in tops])
    used = {entry.path.split("/", 1)[0] for entry in found}
    notes += [f"{request.path}: the folder of class {top!r} holds no video" for top in tops if top not in used]
    numbers = [number_of[entry.path.split("/", 1)[0]] for entry in found]
    entries = [Video(entry.path, label, error=entry.error) for entry, label in zip(found, numbers, strict=True)]
    entries += [Video(entry.path, error="lies outside of the class folders") for entry in loose]
    return request.listing(classes, sorted(entries, key=lambda entry: entry.path), notes)


def _needs_folder(request: Request) -> None:
    if not request.path.is_dir():
        raise ValueError(f"{request.path}: is not a folder")
    if request.root is not None:
        raise ValueError(f"{request.path}: the root of a folder is the folder itself; leave --root (root=) out")


def _flat(request: Request) -> Listing:
    """A folder of videos without classes."""
    _needs_folder(request)
    found, notes, _ = walk(request.path, request.follow_links)
    return request.listing(request.classes or (), found, notes)


def _lines(request: Request) -> Listing:
    """A path and the id of its label on each line. The path may contain spaces. Lines of paths alone have no label."""
    entries: list[Video] = []
    place = Place(request)
    numbered = lines_of(request.path)
    bare = [VIDEO_NAME.fullmatch(line.strip()) is not None for _, line in numbered]
    for (number, line), alone in zip(numbered, bare, strict=True):
        match = _LINE.fullmatch(line)
        where = f"{request.path}, line {number}"
        if alone != bare[0] or (match is None and not alone):
            raise ValueError(f"{where}: a path, a space and the id of a label wanted; got {line[:200]!r}")
        if match is None or alone:
            entries.append(place.entry(line.strip(), None))
            continue
        path = match[1].strip('"')
        more = re.match(r"(.*?\.\w+)[ \t,;]+[+-]?[\d.]+$", path)
        if more and VIDEO_NAME.fullmatch(more[1]) and not VIDEO_NAME.fullmatch(path):
            raise ValueError(f"{where}: two fields wanted, a path and the id of a label; got a third: {line[:200]!r}")
        entries.append(place.entry(path, _known_id(int(match[2]), request.classes, where)))
    return request.listing(request.classes or (), entries)


def _known_id(label: int, classes: Sequence[str] | None, where: str) -> int:
    if classes is None:
        raise ValueError(
            f"{where}: has the id {label} for a label; give the names too, as a csv of id,name: --labels (labels=)"
        )
    if not 0 <= label < len(classes):
        raise ValueError(f"{where}: label {label} is not one of the {len(classes)} classes (0 to {len(classes) - 1})")
    return label


READERS = {
    "folder": _folder,
    "flat": _flat,
    "lines": _lines,
    "kinetics": kinetics,
    "ucf101": ucf101,
    "hmdb51": hmdb51,
    "tar": read_shards,
}

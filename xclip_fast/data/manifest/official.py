"""The official annotation and split files of Kinetics, UCF-101 and HMDB-51."""

from __future__ import annotations

import os
import posixpath
import re
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from ...text.labels import readable
from ..decode.video import Video
from .listing import VIDEO_NAME, Listing, Place, Request, class_numbers, csv_of, lines_of, walk

HMDB_LIST = re.compile(r"(.+)_test_split(\d+)\.txt", re.DOTALL)
_SAME_SPLIT = {"val": "validate", "valid": "validate", "validation": "validate", "training": "train", "testing": "test"}


def kinetics(request: Request) -> Listing:
    """The csv of label,youtube_id,time_start,time_end,split.

    Files are found by name anywhere below the root: {id}_{start:06d}_{end:06d}.mp4 or {id}.mp4.
    """
    (number, head), *rows = csv_of(request.path) or [(1, [])]
    column = {name.strip().lower(): place for place, name in enumerate(head)}
    missing = [name for name in ("youtube_id", "time_start", "time_end") if name not in column]
    if missing:
        raise ValueError(f"{request.path}, line {number}: the header of a Kinetics csv must have {', '.join(missing)}")
    if request.split is not None and "split" not in column:
        raise ValueError(f"{request.path}: has no column split; leave --split (split=) out")
    by_name, notes, why = _kinetics_files(request)
    wanted = _SAME_SPLIT.get(request.split or "", request.split)
    raw = sorted({row[column["label"]] for _, row in rows if len(row) == len(head)}) if "label" in column else []
    number_of, classes = class_numbers(request, raw, [name.replace("_", " ") for name in raw])
    entries: list[Video] = []
    for number, row in rows:
        try:
            cells = {name: row[place].strip() for name, place in column.items()}
            start, end = (int(float(cells[name])) for name in ("time_start", "time_end"))
        except (IndexError, ValueError):
            raise ValueError(f"{request.path}, line {number}: {','.join(head)} wanted; got {','.join(row)!r}") from None
        split = cells.get("split", "")
        if wanted is None or _SAME_SPLIT.get(split, split) == wanted:
            label = number_of.get(row[column["label"]]) if "label" in column else None
            video = cells["youtube_id"]
            name = f"{video}_{start:06d}_{end:06d}"
            paths = by_name.get(name) or by_name.get(f"{video}_{start}_{end}") or by_name.get(video)
            if paths is None:
                entries.append(Video(f"{name}.mp4", label, error=why))
                continue
            # a copy may lie in the folder of another split
            hints = {word.replace("_", " ") for word in (split, cells.get("label")) if word}
            folders = [{part.replace("_", " ") for part in path.split("/")[:-1]} for path in paths]
            best = max(range(len(paths)), key=lambda at: len(hints & folders[at]))
            entries.append(Video(paths[best], label))
    return request.listing(classes, entries, notes)


def _kinetics_files(request: Request) -> tuple[dict[str, list[str]], list[str], str]:
    """The files below the root by name, without suffix; notes; and the reason why a file is not among them."""
    found, notes, _ = walk(Path(request.top), request.follow_links)
    by_name: dict[str, list[str]] = defaultdict(list)
    for entry in found:
        if entry.error is None:
            by_name[posixpath.splitext(posixpath.basename(entry.path))[0]].append(entry.path)
    links = sum(entry.error is not None for entry in found)
    why = f"no file of that name below {request.top}" + (f" ({links} folders not entered)" if links else "")
    return by_name, notes, why


def ucf101(request: Request) -> Listing:
    """classInd.txt, trainlist0N.txt (path and id, counted from 1), testlist0N.txt (path)."""
    path = request.path
    if path.is_dir():
        match = re.fullmatch(r"(train|test)0?([1-9])", request.split or "")
        if match is None:
            raise ValueError(f"{path}: a split of UCF-101 is wanted, train1 to test3: --split train1 (split='train1')")
        path = path / f"{match[1]}list0{match[2]}.txt"
    elif request.split is not None:
        raise ValueError(
            f"{path}: is the list of one split; leave --split (split=) out, or give the folder of the lists"
        )
    index = path.parent / "classInd.txt"
    raw: list[str] = []
    for number, line in lines_of(index):
        key, _, name = line.strip().partition(" ")
        if key != str(number) or not name:
            raise ValueError(f"{index}, line {number}: {number} and a class name wanted; got {line!r}")
        raw.append(name.strip())
    number_of, classes = class_numbers(request, raw, [readable(name) for name in raw], str(index))
    root = request.root or _first_with(path.parent, raw, "UCF-101")
    place = Place(Request(path, root=root))
    entries: list[Video] = []
    for number, line in lines_of(path):
        match = re.fullmatch(r"\s*((?:\S+/)?([^/\s]+)/\S.*?)(?:\s+(\d+))?\s*", line)
        if match is None or match[2] not in number_of or (match[3] and match[3] != str(raw.index(match[2]) + 1)):
            raise ValueError(f"{path}, line {number}: Class/file.avi and its id in classInd.txt wanted; got {line!r}")
        entries.append(place.entry(match[1], number_of[match[2]]))
    return Request(path, root=root).listing(classes, entries)


def _first_with(folder: Path, classes: Sequence[str], *names: str) -> str:
    """The parent of the class folders: beside the lists, or a folder of one of these names, as archives unpack."""
    places = [folder, folder.parent, *(base / name for name in names for base in (folder.parent, folder))]
    return str(next((place for place in places if any((place / each).is_dir() for each in classes)), folder))


def hmdb51(request: Request) -> Listing:
    """A folder of <class>_test_split<N>.txt. Each line is a name and 1 (training), 2 (test) or 0 (neither)."""
    match = re.fullmatch(r"(train|test)([1-9])", request.split or "")
    if match is None or not request.path.is_dir():
        raise ValueError(
            f"{request.path}: HMDB-51 is read from the folder of its split files, with a split from train1 to test3: "
            "--split train1 (split='train1')"
        )
    wanted = "1" if match[1] == "train" else "2"
    found = ((HMDB_LIST.fullmatch(name), name) for name in os.listdir(request.path))
    lists = sorted((each[1], name) for each, name in found if each and each[2] == match[2])
    raw = [each for each, _ in lists]
    number_of, classes = class_numbers(request, raw, [readable(name) for name in raw])
    root = request.root or _first_with(request.path, raw, "hmdb51_org", "hmdb51", "HMDB51", "videos")
    place = Place(Request(request.path, root=root))
    below = {entry.name: entry.is_dir() for entry in os.scandir(root)}
    flat = not any(below.get(each) for each in raw) and any(map(VIDEO_NAME.fullmatch, below))
    entries: list[Video] = []
    for each, name in lists:
        for number, line in lines_of(request.path / name):
            file, _, use = line.strip().rpartition(" ")
            if use not in ("0", "1", "2") or not file.strip():
                raise ValueError(f"{request.path / name}, line {number}: name.avi and 0, 1 or 2 wanted; got {line!r}")
            if use == wanted:
                entries.append(place.entry(file.strip() if flat else f"{each}/{file.strip()}", number_of[each]))
    return Request(request.path, root=root).listing(classes, entries)

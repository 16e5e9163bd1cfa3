"""Lists of class names: one reader for every command.

A text file has a name a line. A csv file has commas, semicolons or tabs, as spreadsheets write them, and one of

    a column with the heading name, label or class, and perhaps one with the heading id
    no heading, and two columns: id and name
    one column: the names
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from .listing import csv_of, lines_of

Labels = str | os.PathLike[str] | Sequence[str]

SUFFIXES = (".csv", ".tsv", ".txt")
_NAME = {"name", "label", "labels", "class", "classname", "class_name"}
_ID = {"id", "index", "label_id", "class_id"}


def read_labels(labels: Labels) -> tuple[str, ...]:
    """The names of the classes; the place of a name is its id. `labels`: a file as above, or the names themselves.

    Raises ValueError for a file that it does not understand, for names that are there twice, and for ids that do not
    count from 0 without gaps.
    """
    if not isinstance(labels, (str, os.PathLike)):
        names, where = list(labels), "labels"
    else:
        path, where = Path(labels), str(labels)
        rows = label_rows(path)
        ids = [key for key, _ in rows]
        if any(key is not None for key in ids):
            missing = next((key for key in range(len(ids)) if key not in ids), None)
            if missing is not None:
                raise ValueError(f"{where}: ids must count from 0 without gaps; {missing} is missing of {len(ids)}")
            rows.sort()
        names = [name for _, name in rows]
    if not names:
        raise ValueError(f"{where}: has no names of classes")
    twice_named = [name for name, count in Counter(names).items() if count > 1]
    if twice_named:
        raise ValueError(f"{where}: the class {twice_named[0]!r} is there twice; names of classes must differ")
    return tuple(names)


def label_rows(path: str | os.PathLike[str]) -> list[tuple[int | None, str]]:
    """(id or None, name) of each label in a file, in its order."""
    path = Path(path)
    if path.suffix.lower() not in (".csv", ".tsv"):
        rows: list[tuple[int | None, str]] = [(None, line.strip()) for _, line in lines_of(path)]
    else:
        rows = _csv_rows(path)
    for _, name in rows:
        if "\0" in name or any("\ud800" <= character <= "\udfff" for character in name):
            raise ValueError(f"{path}: is not UTF-8 text; save it as UTF-8")
    return rows


def _csv_rows(path: Path) -> list[tuple[int | None, str]]:
    rows = [(number, [cell.strip() for cell in row]) for number, row in csv_of(path) if any(map(str.strip, row))]
    if not rows:
        return []
    (_, head), *_ = rows
    headings = [cell.lower() for cell in head]
    name_at = next((place for place, cell in enumerate(headings) if cell in _NAME), None)
    id_at = next((place for place, cell in enumerate(headings) if cell in _ID), None)
    if name_at is not None and (len(head) > 1 or len(rows) > 1):
        rows = rows[1:]
    elif len(head) == 2 and head[0].isdecimal():
        id_at, name_at = 0, 1
    elif len(head) == 1 and id_at is None:
        name_at = 0
    else:
        raise ValueError(
            f"{path}, line 1: wanted the header id,name, a column called name, label or class, or one column only; "
            f"got {','.join(head)!r}"
        )
    found: list[tuple[int | None, str]] = []
    seen: set[int] = set()
    for number, row in rows:
        if len(row) != len(head):
            raise ValueError(
                f"{path}, line {number}: has {len(row)} columns and the first line {len(head)}; put a name with a "
                "separator in it between quotes"
            )
        key = None if id_at is None else row[id_at]
        if not row[name_at] or (key is not None and not key.isdecimal()):
            raise ValueError(f"{path}, line {number}: wanted a whole number and a name; got {row}")
        if key is not None and int(key) in seen:
            raise ValueError(f"{path}, line {number}: the id {int(key)} is there twice")
        seen.update(() if key is None else (int(key),))
        found.append((None if key is None else int(key), row[name_at]))
    return found

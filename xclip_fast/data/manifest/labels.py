"""Lists of class names: one reader for every command.

A text file has one name on each line. A csv file is separated by commas, semicolons or tabs, as spreadsheets write
them. It has one of these forms:

    a header with a column name, label or class, and perhaps a column id
    no header, and two columns: id and name
    one column of names
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
    """The names of the classes, in the order of their ids. `labels`: a file as above, or the names themselves.

    Raises ValueError if the file has another form, if a name occurs twice, or if the ids are not 0, 1, 2 and so on.
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
                raise ValueError(
                    f"{where}: ids must count from 0 without gaps; of {len(ids)} ids, {missing} is missing"
                )
            rows.sort()
        names = [name for _, name in rows]
    if not names:
        raise ValueError(f"{where}: has no class names")
    twice_named = [name for name, count in Counter(names).items() if count > 1]
    if twice_named:
        raise ValueError(f"{where}: the class {twice_named[0]!r} occurs twice; class names must differ")
    return tuple(names)


def label_rows(path: str | os.PathLike[str]) -> list[tuple[int | None, str]]:
    """(id or None, name) of each label in a file, in the file's order."""
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
            f"{path}, line 1: the header id,name, a column called name, label or class, or a single column is wanted; "
            f"got {','.join(head)!r}"
        )
    found: list[tuple[int | None, str]] = []
    seen: set[int] = set()
    for number, row in rows:
        if len(row) != len(head):
            raise ValueError(
                f"{path}, line {number}: has {len(row)} columns and the first line {len(head)}; put quotes around a "
                "name that contains the separator"
            )
        key = None if id_at is None else row[id_at]
        if not row[name_at] or (key is not None and not key.isdecimal()):
            raise ValueError(f"{path}, line {number}: a whole number and a name are wanted; got {row}")
        if key is not None and int(key) in seen:
            raise ValueError(f"{path}, line {number}: the id {int(key)} occurs twice")
        seen.update(() if key is None else (int(key),))
        found.append((None if key is None else int(key), row[name_at]))
    return found

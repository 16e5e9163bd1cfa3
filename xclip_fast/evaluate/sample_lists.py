"""The videos and the classes that a protocol draws from a seed, and the files of drawn classes.

A file names classes, so it stays valid after their order changes.
"""

from __future__ import annotations

import json
import os
import re
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..data.manifest.labels import label_rows
from ..data.manifest.manifest import Manifest
from ..data.sampling import sample_rng
from ..files import load_json, write_text
from ..text.labels import plain_name

DRAWS = "xclip_fast draws"


def few_shot(manifest: Manifest, shots: int, seed: int = 0) -> np.ndarray:
    """Rows of ``shots`` random videos of every class, int64, ascending (paper, section 4.4).

    The choice in a class depends on the seed, the name of the class and the paths of its videos alone. With the same
    seed, a draw of fewer shots is part of a draw of more. Videos that cannot be read are not chosen.

    Raises:
        ValueError: if a class has fewer usable videos, or the manifest has no classes.
    """
    if shots < 1:
        raise ValueError(f"shots {shots}: at least 1 wanted")
    if not manifest.classes:
        raise ValueError("the manifest has no classes to draw from; index the videos with labels")
    rows_of: list[list[int]] = [[] for _ in manifest.classes]
    for row in manifest.usable.tolist():
        label = manifest.videos[row].label
        if label is not None:
            rows_of[label].append(row)
    few = [f"{name} has {len(rows)}" for name, rows in zip(manifest.classes, rows_of, strict=True) if len(rows) < shots]
    if few:
        more = f", and {len(few) - 5} more" if len(few) > 5 else ""
        raise ValueError(f"{shots} usable videos of each class wanted: {', '.join(few[:5])}{more}")
    chosen: list[int] = []
    for name, rows in zip(manifest.classes, rows_of, strict=True):
        rows.sort(key=lambda row: (manifest.videos[row].path, manifest.videos[row].member or ""))
        # the checksum of the name, not its number: the order of the classes does not matter
        order = sample_rng(seed, 0, zlib.crc32(name.encode("utf-8", "surrogatepass"))).permutation(len(rows))
        chosen += [rows[index] for index in order[:shots]]
    return np.array(sorted(chosen), np.int64)


def new_classes(larger: Sequence[str], smaller: Sequence[str]) -> list[str]:
    """The classes of ``larger`` that ``smaller`` does not have in any spelling (``plain_name``), in order."""
    known = {plain_name(name) for name in smaller}
    return [name for name in larger if plain_name(name) not in known]


def draw_classes(classes: Sequence[str], size: int = 160, draws: int = 3, seed: int = 0) -> list[list[str]]:
    """``draws`` random draws of ``size`` classes each (Kinetics-600, supplement of the paper).

    They depend on the seed and the names alone, not on the order of the names.
    """
    names = sorted(classes)
    return [
        [names[index] for index in sorted(sample_rng(seed, 1, draw).permutation(len(names))[:size])]
        for draw in range(draws)
    ]


def write_draws(
    draws: Sequence[Sequence[str]], path: str | os.PathLike[str], *, about: Mapping[str, Any] | None = None
) -> None:
    """Writes the classes of each draw as JSON."""
    content = {"kind": DRAWS, **(about or {}), "draws": [list(names) for names in draws]}
    write_text(path, json.dumps(content, indent=1) + "\n")


def read_draws(paths: Sequence[str | os.PathLike[str]]) -> list[list[str]]:
    """The draws of each file: those of ``write_draws``, those of a JSON list of lists, or one by ``read_classes``."""
    found: list[list[str]] = []
    for path in map(Path, paths):
        content: Any = load_json(path) if path.suffix == ".json" else None
        ours = isinstance(content, dict) and content.get("kind") == DRAWS
        draws: Any = content.get("draws") if ours else content
        several = isinstance(draws, list) and any(isinstance(names, list) for names in draws)
        if ours or several:
            found += [_class_names(path, names) for names in (draws if several else [draws])]
        else:
            found.append(read_classes(path))
    return found


def read_classes(path: str | os.PathLike[str]) -> list[str]:
    """The class names of a file.

    The file is a manifest, a JSON list or object (its keys), a CSV as for ``--labels`` (``data.manifest.labels``), or a
    text file with one name on each line, with or without a number before it.
    """
    path = Path(path)
    if path.suffix == ".jsonl":
        return list(Manifest.read(path).classes)
    if path.suffix == ".json":
        return _class_names(path, load_json(path), '"')
    names = [name for _, name in label_rows(path)]
    if path.suffix not in (".csv", ".tsv"):
        names = [re.sub(r"^\d+\s+", "", name) for name in names]
    return _class_names(path, names, '"')


def _class_names(path: Path, names: Any, around: str = "") -> list[str]:
    """The names, without blanks and the characters ``around`` them, empty ones and repetitions."""
    if not isinstance(names, list | dict) or not all(isinstance(name, str) for name in names):
        raise ValueError(f"{path}: {names!r:.80} found; a list of class names wanted")
    names = list(dict.fromkeys(name for each in names if (name := each.strip().strip(around))))
    if not names:
        raise ValueError(f"{path}: holds no class names")
    return names

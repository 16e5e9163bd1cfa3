"""Class names as data sets spell them, and which label of a list is meant."""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

logger = logging.getLogger("xclip_fast")

LABELS = "labels.txt"  # beside the weights that training keeps: the texts they were trained with, one a line


def readable(name: str) -> str:
    """A class name as words: underscores are blanks, and ``ApplyEyeMakeup`` is "Apply Eye Makeup"."""
    words = " ".join(name.replace("_", " ").split())
    return words if " " in words else re.sub(r"(?<=[a-z])(?=[A-Z])", " ", words)


def trained_texts(
    checkpoint: str | os.PathLike[str], classes: Sequence[str], linear_head: bool
) -> list[str] | dict[str, str] | None:
    """The ``labels`` of ``evaluate`` that a checkpoint was trained with, as its ``labels.txt`` says.

    A class that it does not name has the text in its place, if there are as many lines as classes and those named are
    in their places; otherwise, and without that file: ``readable``. For a linear head the names of its outputs in
    order, or None without the file: then the classes' order must be that of the training.
    """
    texts: list[str] = []
    path = Path(checkpoint)
    if path.is_dir() and (path / LABELS).is_file():
        texts = (path / LABELS).read_text(encoding="utf-8").splitlines()
    if linear_head:
        return texts or None
    known = {plain_name(text): text for text in texts}
    found = {name: known.get(plain_name(name)) for name in classes}
    unnamed = [name for name, text in found.items() if text is None]
    in_order = len(texts) == len(classes) and all(
        text in (None, line) for text, line in zip(found.values(), texts, strict=True)
    )
    if unnamed and in_order:
        logger.warning(
            "%s does not name %d of %d classes: its lines stand for the classes in their order",
            path / LABELS,
            len(unnamed),
            len(classes),
        )
        return dict(zip(classes, texts, strict=True))
    return {name: text or readable(name) for name, text in found.items()}


def plain_name(name: str) -> str:
    """A class name without what lists of classes differ in: case, blanks, underscores, punctuation.

    ``ApplyEyeMakeup``, ``apply_eye_makeup`` and ``Apply Eye Makeup`` are one. A name of punctuation alone stays.
    """
    return "".join(letter for letter in name.casefold() if letter.isalnum()) or name


def candidates(
    classes: Sequence[str], labels: Sequence[str] | Mapping[str, str] | None
) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The labels' names, the texts that stand for them, and for each class the index of its label, -1 for none."""
    if isinstance(labels, str):
        raise ValueError(f"labels {labels!r} is one string; a list of strings wanted")
    names = tuple(classes if labels is None else labels)
    texts = list(labels.values()) if isinstance(labels, Mapping) else list(names)
    repeated = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if not names or repeated:
        what = f"{', '.join(map(repr, repeated[:3]))} more than once" if repeated else "none"
        where = "the manifest's classes" if labels is None else "labels"
        raise ValueError(f"{where}: {what}; at least one name wanted, and each once (labels=[...] gives others)")
    if labels is None:
        return names, texts, list(range(len(names)))
    exact = {name: index for index, name in enumerate(names)}
    loose: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        loose.setdefault(plain_name(name), []).append(index)
    truth_of_class = []
    for name in classes:
        found = [exact[name]] if name in exact else loose.get(plain_name(name), [])
        if len(found) > 1:
            raise ValueError(f"class {name!r} could be {' or '.join(repr(names[i]) for i in found)}; spell it the same")
        truth_of_class.append(found[0] if found else -1)
    taken = [index for index in truth_of_class if index >= 0]
    if classes and not taken:
        raise ValueError(
            f"none of the {len(classes)} classes ({', '.join(classes[:3])}, ...) is among the {len(names)} labels "
            f"({', '.join(names[:3])}, ...); name them the same, or give a mapping from class to text"
        )
    twice = next((index for index in taken if taken.count(index) > 1), None) if len(set(taken)) < len(taken) else None
    if twice is not None:
        which = [name for name, index in zip(classes, truth_of_class, strict=True) if index == twice]
        raise ValueError(f"classes {', '.join(map(repr, which))} are all the label {names[twice]!r}; one class wanted")
    return names, texts, truth_of_class

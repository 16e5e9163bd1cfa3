"""The files of an evaluation: summary, predictions, confusion matrix, accuracy of each class."""

from __future__ import annotations

import contextlib
import csv
import json
import logging
import os
from collections.abc import Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import plain
from ..files import locked, staged
from .result import Evaluation, percent

logger = logging.getLogger("xclip_fast")

SUMMARY = "summary.json"  # written last: a folder without it is incomplete
FILES = (SUMMARY, "per_class.csv", "confusion.csv", "confusion.png", "predictions.jsonl")
NAMES_UP_TO = 51  # classes (HMDB-51); with more, names in the picture would be unreadable
COUNTS_UP_TO = 15


def write(evaluation: Evaluation, folder: str | os.PathLike[str], *, overwrite: bool = False) -> list[Path]:
    """Write ``FILES`` into the folder and return their paths.

    Without matplotlib there is no ``confusion.png``, and the ``notes`` in the summary say so. All files appear in one
    step (``files.staged``). Other files in the folder stay.

    Raises:
        FileExistsError: if the folder holds an evaluation and ``overwrite`` is not set.
    """
    folder = Path(folder)
    check_folder(folder, overwrite)
    with staged(folder, FILES, SUMMARY) as part:
        notes: list[str] = []
        _per_class(evaluation, part / "per_class.csv")
        counts = zip(evaluation.labels, evaluation.confusion.tolist(), strict=True)
        rows = [("truth \\ prediction", *evaluation.labels), *((label, *row) for label, row in counts)]
        _write_csv(part / "confusion.csv", rows)
        _confusion_png(evaluation, part / "confusion.png", notes)
        _predictions(evaluation, part / "predictions.jsonl")
        text = json.dumps({**evaluation.summary(), "notes": notes}, indent=1, allow_nan=False)
        (part / SUMMARY).write_text(text + "\n", encoding="utf-8")
        for note in notes:
            logger.warning("%s: %s", folder, note)
    return [folder / name for name in FILES if (folder / name).exists()]


@contextlib.contextmanager
def reserved(folder: str | os.PathLike[str] | None, overwrite: bool, names: Collection[str] = FILES) -> Iterator[None]:
    """Reserves the folder while the block lasts: no other evaluation may write to it. None reserves nothing.

    Raises:
        FileExistsError: if another evaluation has reserved the folder, or if it holds one of ``names`` and
            ``overwrite`` is not set.
        OSError: if the folder cannot be written.
    """
    if folder is None:
        yield
        return
    target = Path(os.path.realpath(folder))
    home = target if target.is_dir() else target.parent
    with contextlib.ExitStack() as held:
        try:
            check_folder(folder, overwrite, names)
            home.mkdir(parents=True, exist_ok=True)
            held.enter_context(locked(home / f".{target.name}.evaluating", folder))
        except OSError as error:
            if error.strerror is None:  # said by us
                raise
            raise type(error)(f"{folder}: cannot be written ({error.strerror}); choose another folder") from error
        check_folder(folder, overwrite, names)  # again: another evaluation may have ended meanwhile
        yield


def check_folder(folder: str | os.PathLike[str], overwrite: bool, names: Collection[str] = FILES) -> None:
    """Raises FileExistsError if the folder holds one of ``names``, NotADirectoryError if it cannot be a folder."""
    folder = Path(folder)
    above = next((parent for parent in folder.parents if parent.exists()), None)
    if above is not None and not above.is_dir():
        raise NotADirectoryError(f"{folder}: {above} is a file; choose another folder")
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"{folder}: is a file; give a folder")
    there = [name for name in names if (folder / name).exists()]
    if there and not overwrite:
        raise FileExistsError(f"{folder}: already holds {', '.join(there)}; choose another folder or add --overwrite")


def _write_csv(path: Path, rows: Iterable[Sequence[Any]]) -> None:
    with open(path, "w", encoding="utf-8", errors="backslashreplace", newline="") as file:
        csv.writer(file).writerows(rows)


def _per_class(evaluation: Evaluation, path: Path) -> None:
    confusion_KK = evaluation.confusion
    rows: list[Sequence[Any]] = [("label", "videos", "correct", "top1", "mostly_taken_for")]
    for index, label in enumerate(evaluation.labels):
        count, correct = int(confusion_KK[index].sum()), int(confusion_KK[index, index])
        wrong_K = confusion_KK[index].copy()
        wrong_K[index] = 0
        other = evaluation.labels[int(wrong_K.argmax())] if wrong_K.any() else ""
        rows.append((label, count, correct, f"{correct / count:.4f}" if count else "", other))
    _write_csv(path, rows)


def _confusion_png(evaluation: Evaluation, path: Path, notes: list[str]) -> None:
    try:
        import matplotlib
    except ImportError:
        notes.append("no confusion.png: matplotlib is not installed (pip install 'xclip-fast[plot]')")
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    labels, count_KK = evaluation.labels, evaluation.confusion
    total_K1 = count_KK.sum(1, keepdims=True)
    share_KK = np.where(total_K1 > 0, 100 * count_KK / np.maximum(total_K1, 1), np.nan)
    K = len(labels)
    named = K <= NAMES_UP_TO
    names = [_short(label) for label in labels]
    side = max(3.5, 0.19 * K) if named else 8.0  # of the matrix, in inches; names need room beside it
    room = 0.5 + (0.07 * max(map(len, names)) if named else 0.3)
    with matplotlib.rc_context({"font.size": 8}):
        figure = Figure(figsize=(side + room + 1.0, side + room), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        colors = matplotlib.colormaps["Blues"].with_extremes(bad="0.93")
        picture = axes.imshow(share_KK, cmap=colors, vmin=0, vmax=100, interpolation="nearest")
        if named:
            axes.set_xticks(range(K), names, rotation=90)
            axes.set_yticks(range(K), names)
            axes.tick_params(length=0)
        if K <= COUNTS_UP_TO:
            for row, column in np.argwhere(count_KK > 0):
                color = "white" if share_KK[row, column] > 55 else "black"
                axes.text(column, row, str(count_KK[row, column]), ha="center", va="center", color=color)
        axes.set(xlabel="prediction" if named else "prediction (number of the label)", ylabel="true label")
        views = f"{evaluation.clips} x {evaluation.crops} views" if evaluation.views > 1 else "1 view"
        axes.set_title(f"top-1 {percent(evaluation.top1)} of {evaluation.counted} videos, {K} labels, {views}")
        figure.colorbar(picture, ax=axes, label="% of the true label's videos (gray: none)", fraction=0.046, pad=0.03)
        figure.savefig(path, dpi=120, bbox_inches="tight")


def _short(label: str) -> str:
    """The label for matplotlib: short, without unprintable characters, and with dollar signs that start no formula."""
    label = plain(label)
    return (label if len(label) <= 32 else label[:31] + "…").replace("$", r"\$")


def _predictions(evaluation: Evaluation, path: Path) -> None:
    """One JSON object on each line. ASCII, because a class may have the name of a file, which need not be UTF-8."""
    with open(path, "w", encoding="ascii") as file:
        for each in evaluation.predictions:
            labels, probabilities = zip(*each.top, strict=True)
            row = {
                "sample": each.sample,
                "path": each.path,
                "label": each.label,
                "counted": each.counted,
                "prediction": labels[0],
                "correct": labels[0] == each.label if each.counted else None,
                "top5": labels,
                "probabilities": probabilities,
            }
            file.write(json.dumps(row) + "\n")

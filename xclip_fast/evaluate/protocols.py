"""The paper's zero-shot and few-shot protocols, and the paper's results (Tables 3 to 5).

Zero-shot: a model trained on Kinetics-400 alone is tested on HMDB-51 and UCF-101 (mean over the three test splits) and
on Kinetics-600 (mean over three draws of 160 of the 220 classes that are not in Kinetics-400). Few-shot: a model
trained on K videos of each class is tested on the first test split. All protocols take one view of 32 frames.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..console import Bar, print_rows
from ..data.manifest.manifest import Manifest
from ..files import write_text
from ..inference.placement import load_model, placed
from ..text.labels import candidates
from ..weights.recipe import Trained
from .command import joined, named
from .loop import Evaluation, evaluate
from .paper import PROTOCOLS, SHOTS, Reported, paper_rows
from .report import write
from .sample_lists import draw_classes, few_shot, new_classes, read_classes, read_draws, write_draws

logger = logging.getLogger("xclip_fast")

NEW_CLASSES, DRAWN, DRAWS, FRAMES = 220, 160, 3, 32


def of_classes(manifest: Manifest, number: int, names: Sequence[str]) -> Manifest:
    """The manifest's videos of the classes in draw ``number``.

    Raises:
        ValueError: if the manifest has no videos of a drawn class.
    """
    label_of_class = candidates(manifest.classes, names)[2]
    labels = np.array([*label_of_class, -1])[manifest.labels]  # the last entry is for videos without a class
    if missing := [name for index, name in enumerate(names) if index not in labels]:
        raise ValueError(
            f"draw {number}: no videos of {len(missing)} of its {len(names)} classes: "
            f"{', '.join(map(repr, missing[:5]))}; check the spelling and the data set"
        )
    return manifest.select(np.flatnonzero(labels >= 0))


def sample(
    manifest: str | os.PathLike[str],
    shots: int,
    out: str | os.PathLike[str],
    *,
    seed: int = 0,
    overwrite: bool = False,
) -> int:
    """Draws few-shot training videos of a manifest and writes their manifest. Returns their number."""
    if Path(out).suffix != ".jsonl":
        raise ValueError(f"{out}: a name with .jsonl wanted, for a manifest")
    if os.path.exists(out) and os.path.samefile(manifest, out):
        raise ValueError(f"{out}: the videos are drawn from this manifest; choose another name for --out")
    if os.path.exists(out) and not overwrite:
        raise FileExistsError(f"{out}: already exists; choose another name or add --overwrite")
    videos = Manifest.read(manifest)
    rows = few_shot(videos, shots, seed)
    videos.select(rows).write(out)
    return len(rows)


def kinetics600_draws(classes: Sequence[str], kinetics400: Sequence[str], seed: int = 0) -> list[list[str]]:
    """Three draws of 160 of the classes that are not in Kinetics-400. Logs a warning if these are not 220."""
    new = new_classes(classes, kinetics400)
    if len(new) != NEW_CLASSES:
        logger.warning(
            "%d classes of %d are not among Kinetics-400's %d by name. The paper counts %d: some may only be renamed. "
            "Give released class lists with --draws (draws=[...])",
            len(new),
            len(classes),
            len(kinetics400),
            NEW_CLASSES,
        )
    if len(new) < DRAWN:
        raise ValueError(f"only {len(new)} new classes, and a draw has {DRAWN}; is this the list of Kinetics-600?")
    return draw_classes(new, DRAWN, DRAWS, seed)


def main(
    protocol: str,
    checkpoint: str | os.PathLike[str],
    manifests: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    shots: int | None = None,
    draws: Sequence[str | os.PathLike[str]] = (),
    kinetics400: str | os.PathLike[str] | None = None,
    seed: int = 0,
    variant: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    **settings: Any,
) -> dict[str, Any] | None:
    """Runs a protocol on a checkpoint and prints the result beside the paper's.

    Args:
        protocol: one of ``PROTOCOLS``.
        manifests: of HMDB-51 and UCF-101 the test splits (zero-shot: three, few-shot: the first); of Kinetics-600 one.
        out: a folder for the evaluation of every part (``evaluate.write``), the draws and ``protocol.json``.
        shots: for few-shot, the training videos of each class.
        draws: for Kinetics-600, files of released class lists (``read_draws``). Without them, classes are drawn by
            ``kinetics400`` (a file of its class names, see ``read_classes``) and ``seed``.
        variant, device, dtype, settings: as for ``evaluate.main``.

    Returns:
        the content of ``protocol.json``; None in all processes but the first.
    """
    if protocol not in PROTOCOLS:
        raise ValueError(f"protocol {protocol!r}: one of {', '.join(PROTOCOLS)} wanted")
    what = PROTOCOLS[protocol]
    if len(manifests) != what.manifests:
        plural = "s" if what.manifests > 1 else ""
        raise ValueError(f"{protocol} takes {what.manifests} manifest{plural}, and {len(manifests)} are given")
    if what.table == 5 and shots is None:
        raise ValueError(f"{protocol} needs the number of training videos of each class: --shots 2 (shots=2)")
    if what.table != 5 and shots is not None:
        raise ValueError(f"{protocol} takes no --shots; leave it out")
    if what.table != 4 and (draws or kinetics400 is not None):
        raise ValueError(f"{protocol} takes no --draws or --kinetics400; leave it out")
    if what.table == 4 and not draws and kinetics400 is None:
        raise ValueError(
            f"{protocol} needs the class names of Kinetics-400 (--kinetics400 FILE, kinetics400=), or --draws (draws=)"
        )
    videos = [Manifest.read(path) for path in manifests]
    chosen: list[list[str]] = []
    if what.table == 4:
        chosen = read_draws(draws)
        if not draws and kinetics400 is not None:
            chosen = kinetics600_draws(videos[0].classes, read_classes(kinetics400), seed)
        manifests = [manifests[0]] * len(chosen)
        videos = [of_classes(videos[0], number, names) for number, names in enumerate(chosen, 1)]
    trained = Trained.read(checkpoint)
    parts = [f"part{number}" for number in range(1, len(videos) + 1)]
    with joined(device, out, overwrite, ["protocol.json", *parts]) as process:
        model = load_model(checkpoint, variant).to(**placed(process.device, dtype))
        # zero-shot: the model was not trained on these classes, so their names are the texts
        known, linear_head = trained if what.table == 5 else Trained(), model.config.num_classes is not None
        labels: list[Any] = chosen or [known.texts(each.classes, linear_head) for each in videos]
        with Bar(hidden=process.rank > 0) as bar:
            settings = {"progress": bar.update, **trained.choose(**settings)}
            results = [
                named(evaluate(model, each, labels=names, **settings), checkpoint, path)
                for each, names, path in zip(videos, labels, manifests, strict=True)
            ]
        if process.rank:
            return None
        report = _report(protocol, results, shots, None if draws or not chosen else seed)
        show(report)
        if out is not None:
            folder = Path(out)
            folder.mkdir(parents=True, exist_ok=True)
            for part, result in zip(parts, results, strict=True):
                write(result, folder / part, overwrite=overwrite)
            if chosen:
                write_draws(chosen, folder / "draws.json", about={"protocol": protocol, "seed": report["seed"]})
            write_text(folder / "protocol.json", json.dumps(report, indent=1, allow_nan=False) + "\n")
            _note(f"written: {out}")
        return report


def _report(protocol: str, results: Sequence[Evaluation], shots: int | None, seed: int | None) -> dict[str, Any]:
    what = PROTOCOLS[protocol]
    figures: dict[str, Any] = {}
    for name in ("top1", "top5"):
        values = [100 * getattr(result, name) for result in results]
        figures[name] = {
            "mean": _number(np.mean(values)),
            "std": _number(np.std(values, ddof=1)) if len(values) > 1 else None,
            "parts": [_number(value) for value in values],
        }
    return {
        "kind": "xclip_fast protocol",
        "protocol": protocol,
        "title": what.title if shots is None else f"{what.title}, {shots} shots",
        "shots": shots,
        "seed": seed,
        "unit": "%",
        **figures,
        "std_is": "of the sample, divided by n - 1",
        "frames": results[0].frames,
        "views": results[0].views,
        "videos": [result.videos for result in results],
        "failed": [len(result.failed) for result in results],
        "paper_table": what.table,
        "paper": {
            method: {name: dataclasses.asdict(value) for name, value in row.items()}
            for method, row in paper_rows(protocol, shots).items()
        },
        "model": dict(results[0].model),
    }


def show(report: dict[str, Any]) -> None:
    """Prints a report: the row of this checkpoint, then the paper's. In a pipe, tabs separate the cells."""
    names = ["top1", "top5"] if report["paper_table"] == 4 else ["top1"]

    def cell(found: dict[str, Any]) -> str:
        return "-" if found["mean"] is None else str(Reported(found["mean"], found["std"]))

    rows = [("this checkpoint, measured", *(cell(report[name]) for name in names))]
    for method, row in report["paper"].items():
        rows.append((f"{method}, paper", *(cell(row[name]) for name in names)))
    head = (report["title"], *(f"{name[:3]}-{name[3:]} %" for name in names))
    print_rows(None, head, rows, header_in_pipe=True)
    parts = ", ".join("-" if value is None else f"{value:.1f}" for value in report["top1"]["parts"])
    views = f"{report['views']} view{'s' * (report['views'] > 1)}"
    _note(f"top-1 of the parts: {parts}; {report['frames']} frames, {views}")
    if sum(report["failed"]):
        _note(f"{sum(report['failed'])} of {sum(report['videos'])} videos could not be evaluated")
    if report["frames"] != FRAMES or report["views"] != 1:
        _note(f"the paper tests with {FRAMES} frames and 1 view")
    if not report["paper"]:
        _note(f"the paper has no row for {report['shots']} shots, only for {', '.join(map(str, SHOTS))}")


def _number(value: float | np.floating[Any]) -> float | None:
    return None if np.isnan(value) else round(float(value), 4)


def _note(text: str) -> None:
    print(text, file=sys.stderr)

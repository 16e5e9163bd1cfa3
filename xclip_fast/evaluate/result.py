"""The result of an evaluation: predictions, confusion matrix, accuracies."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping
from typing import Any

import numpy as np

from ..console import print_rows


@dataclasses.dataclass(frozen=True)
class Prediction:
    """The model's prediction for one video."""

    sample: int  # row of the manifest
    path: str
    label: str | None  # the true label; None if the manifest has none
    counted: bool  # the true label is one of the labels to choose from
    top: tuple[tuple[str, float], ...]  # the min(5, K) most probable labels, best first


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The result of an evaluation. Accuracies are fractions of the ``counted`` videos, NaN if there is none."""

    labels: tuple[str, ...]  # K
    videos: int  # m: rows of the manifest; predictions + failed
    predictions: tuple[Prediction, ...]  # n, in the manifest's order
    failed: Mapping[int, str]  # row: reason
    failed_names: Mapping[int, str]
    confusion: np.ndarray  # int64 (K, K): true label, prediction
    top5_hits: int  # of the min(5, K) most probable
    loss: float  # mean of -log of the true label's probability over the counted videos; NaN if there is none
    clips: int
    crops: int
    frames: int
    seconds: float  # decoding and forward together, of the slowest process
    model: Mapping[str, Any]  # variant, FLOPs per view and so on, JSON-ready
    data: Mapping[str, Any]
    environment: Mapping[str, Any]

    @property
    def views(self) -> int:
        return self.clips * self.crops

    @property
    def counted(self) -> int:
        return int(self.confusion.sum())

    @property
    def top1(self) -> float:
        return int(self.confusion.trace()) / self.counted if self.counted else float("nan")

    @property
    def top5(self) -> float:
        """With fewer than five labels all of them are in the top 5, so it is 1."""
        return self.top5_hits / self.counted if self.counted else float("nan")

    @property
    def per_class(self) -> np.ndarray:
        """Top-1 accuracy of each label's videos, float64 (K,); NaN for a label without videos."""
        count_K = self.confusion.sum(1)
        return np.where(count_K > 0, self.confusion.diagonal() / np.maximum(count_K, 1), np.nan)

    @property
    def mean_class_accuracy(self) -> float:
        """The mean of ``per_class`` over the labels that have videos."""
        known = self.per_class[~np.isnan(self.per_class)]
        return float(known.mean()) if len(known) else float("nan")

    @property
    def views_per_second(self) -> float:
        return len(self.predictions) * self.views / self.seconds if self.seconds else float("nan")

    def summary(self) -> dict[str, Any]:
        """The figures for JSON. NaN becomes None. Accuracies are fractions."""
        figures = ("top1", "top5", "loss", "mean_class_accuracy", "views_per_second")
        counts = ("videos", "counted", "clips", "crops", "views", "frames", "seconds")
        return {
            "kind": "xclip_fast evaluation",
            **{name: None if np.isnan(value := getattr(self, name)) else float(value) for name in figures},
            **{name: getattr(self, name) for name in counts},
            "top5_is_top": min(5, len(self.labels)),
            "predicted": len(self.predictions),
            "failed": [
                {"sample": row, "path": self.failed_names[row], "reason": reason}
                for row, reason in sorted(self.failed.items())
            ],
            "labels": len(self.labels),
            **{name: dict(getattr(self, name)) for name in ("model", "data", "environment")},
        }


def show(result: Evaluation) -> None:
    """Prints the figures: a table on a terminal, otherwise lines of name, tab and value."""
    rows = [
        ("top-1", percent(result.top1)),
        *([("top-5", percent(result.top5))] if len(result.labels) > 5 else []),  # else it is 100 %
        ("mean class accuracy", percent(result.mean_class_accuracy)),
        ("videos", f"{len(result.predictions)} of {result.videos}, {result.counted} counted"),
        ("labels", str(len(result.labels))),
        ("views", f"{result.clips} x {result.crops} of {result.frames} frames, {result.model['sampling']}"),
        ("GFLOPs", f"{result.model['gflops_per_view']:.4g} a view, {result.views} view{'s' * (result.views > 1)}"),
        ("views/s", f"{result.views_per_second:.3g} on {result.environment['device']}, decoding included"),
    ]
    print_rows(None, (), rows)
    for failed, reason in sorted(result.failed.items()):
        print(f"error: {result.failed_names[failed]}: {reason}", file=sys.stderr)


def percent(fraction: float | None) -> str:
    return "-" if fraction is None or np.isnan(fraction) else f"{100 * fraction:.1f} %"

"""Accuracy on the videos of a manifest, and the paper's protocols."""

from .loop import evaluate, main
from .report import write
from .result import Evaluation, Prediction

__all__ = ["Evaluation", "Prediction", "evaluate", "main", "write"]

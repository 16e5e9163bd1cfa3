"""Accuracy on the videos of a manifest, and the paper's protocols."""

from .command import main
from .loop import evaluate
from .report import write
from .result import Evaluation, Prediction

__all__ = ["Evaluation", "Prediction", "evaluate", "main", "write"]

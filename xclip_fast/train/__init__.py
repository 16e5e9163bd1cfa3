"""Training and fine-tuning."""

from .loop import main, train

__all__ = ["main", "train"]

"""Training and fine-tuning."""

from typing import Any

__all__ = ["train"]


def __getattr__(name: str) -> Any:
    """``train`` on first use: it reads videos, which takes av, and ``optim`` does not."""
    if name != "train":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from .loop import train

    return train

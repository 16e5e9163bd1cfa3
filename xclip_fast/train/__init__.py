"""Training and fine-tuning."""

from typing import Any

__all__ = ["main", "train"]


def __getattr__(name: str) -> Any:
    """``main`` and ``train`` on first use: they read videos, which takes av, and ``optim`` does not."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loop

    return getattr(loop, name)

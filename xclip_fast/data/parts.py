"""Unfinished files. The run that writes a file locks it, so the next run can tell leftovers of killed runs."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # not on Windows: what a killed run leaves there stays until somebody removes it
    fcntl = None  # type: ignore[assignment]


def lock(file: IO[str] | IO[bytes] | int) -> None:
    """Locks an open file until it is closed. Some network file systems have no locks: there it does nothing."""
    if fcntl is not None:
        with contextlib.suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)


def remove_unlocked(part: Path) -> None:
    """Removes a file that a killed run left: one that nobody has locked."""
    if fcntl is None or part.is_symlink():
        return
    with contextlib.suppress(OSError), open(part, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        part.unlink()

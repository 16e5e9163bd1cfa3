"""Output of the commands: answers on standard output, everything else on standard error.

Answers are tables on a terminal and tab-separated lines in a pipe; a bar shows progress, on a terminal only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def complain(error: object, bar: Bar | None = None) -> bool:
    """One line on standard error; True, for ``failed |= complain(...)``."""
    message = " ".join(line.strip() for line in str(error).splitlines()) or type(error).__name__
    with bar.aside() if bar else contextlib.nullcontext():
        print(f"error: {plain(message)}", file=sys.stderr, flush=True)
    return True


def plain(text: str) -> str:
    """Text without control characters: a file's name may hold tabs, newlines, or what commands a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def print_rows(
    title: str | None, header: Sequence[str], rows: Sequence[Sequence[str]], *, header_in_pipe: bool = False
) -> None:
    """A table on a terminal; otherwise a line for each row, its cells and first the title between tabs."""
    if not sys.stdout.isatty():
        for row in [header, *rows] if header_in_pipe else rows:
            print("\t".join(plain(cell) for cell in ([title] if title else []) + list(row)), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*header, box=None, padding=(0, 2), title=Text(plain(title)) if title else None, title_justify="left")
    for row in rows:
        table.add_row(*(Text(plain(cell), overflow="fold") for cell in row))
    Console(highlight=False).print(table)


class Bar:
    """A progress bar on standard error while the block lasts; nothing if that is no terminal."""

    def __init__(self, total: int | None = None, *, hidden: bool = False) -> None:
        self._progress: Any = None
        if sys.stderr.isatty() and not hidden:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            # redirected, what we print would land on standard error
            self._progress = Progress(
                *(TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task("videos", total=total)

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def begin(self, total: int) -> None:
        """The total is known now."""
        if self._progress:
            self._progress.update(self._task, total=total)

    def advance(self) -> None:
        if self._progress:
            self._progress.advance(self._task)

    def update(self, done: int, total: int) -> None:
        """For functions that take ``progress(done, total)``."""
        if self._progress:
            self._progress.update(self._task, completed=done, total=total)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Without the bar on the screen: for printing."""
        self.__exit__()
        yield
        self.__enter__()

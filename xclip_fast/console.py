"""Output of the commands: answers go to standard output, everything else to standard error.

An answer is a table on a terminal and tab-separated lines in a pipe. Progress bars appear on a terminal only.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any


def complain(error: object, bar: Bar | None = None) -> bool:
    """Prints one line on standard error. Returns True, for ``failed |= complain(...)``."""
    text = str(error)
    if isinstance(error, OSError) and error.strerror:  # without Python's "[Errno 2]"
        text = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    message = " ".join(line.strip() for line in text.splitlines()) or type(error).__name__
    with contextlib.nullcontext() if bar is None else bar.aside():
        print(f"error: {plain(message)}", file=sys.stderr, flush=True)
    return True


def plain(text: str) -> str:
    """Text without control characters: a file's name may hold tabs, newlines, or escape sequences for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def first_line(error: BaseException) -> str:
    """The first line of an error's message; its type if it has none."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def print_rows(
    title: str | None, header: Sequence[str], rows: Sequence[Sequence[str]], *, header_in_pipe: bool = False
) -> None:
    """Prints a table on a terminal, and in a pipe a line for each row: title, if any, and cells, separated by tabs.

    ``header``: may be empty. ``header_in_pipe``: in a pipe, too, the first line is the header.
    """
    if not sys.stdout.isatty():
        for row in [header, *rows] if header_in_pipe else rows:
            print("\t".join(plain(cell) for cell in ([title] if title else []) + list(row)), flush=True)
        return
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    text = Text(plain(title)) if title else None
    table = Table(*header, box=None, padding=(0, 2), show_header=bool(header), title=text, title_justify="left")
    for row in rows:
        table.add_row(*(Text(plain(cell), overflow="fold") for cell in row))
    Console(highlight=False).print(table)


class Bar:
    """A progress bar on standard error while the block lasts. If standard error is not a terminal, it does nothing.

    ``name``: of the counted things. ``text=True``: it shows the text of ``update`` instead of the remaining time.
    """

    def __init__(self, total: int | None = None, *, name: str = "videos", text: bool = False, hidden: bool = False):
        self._progress: Any = None
        if sys.stderr.isatty() and not hidden:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            last = TextColumn("{task.fields[text]}") if text else TimeRemainingColumn()
            # redirected, what we print would land on standard error
            self._progress = Progress(
                *(TextColumn("{task.description}"), BarColumn(8 if text else 40), MofNCompleteColumn(), last),
                console=Console(stderr=True),
                transient=True,
                redirect_stdout=False,
                redirect_stderr=False,
            )
            self._task = self._progress.add_task(name, total=total, text="")

    def __bool__(self) -> bool:
        """Whether there is a bar to see."""
        return self._progress is not None

    def __enter__(self) -> Bar:
        if self._progress:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._progress:
            self._progress.stop()

    def advance(self) -> None:
        if self._progress:
            self._progress.advance(self._task)

    def update(self, done: int, total: int, text: str = "") -> None:
        """For functions that take ``progress(done, total)``."""
        if self._progress:
            self._progress.update(self._task, completed=done, total=total, text=text)

    @contextlib.contextmanager
    def aside(self) -> Iterator[None]:
        """Take the bar off the screen while the block prints."""
        self.__exit__()
        yield
        self.__enter__()

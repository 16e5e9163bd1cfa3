"""Many files at once: threads decode ahead of the reader, and hand over one window after the other.

`_AHEAD` windows of each file in work bound the memory, whatever the number and length of the files.
"""

from __future__ import annotations

import contextlib
import queue
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, TypeVar

from ..threads import Job, Threads, progress, usable_cores
from .source import ReadError, limit
from .windows import Window

_AHEAD = 4  # windows of one file that may wait for the reader

Path = TypeVar("Path")


def decode_ahead(
    paths: Iterable[Path], windows: Callable[[Path, int], Generator[Window, None, None]], workers: int | None
) -> Generator[tuple[Path, Window | ValueError | None], None, None]:
    """For each path in order: its windows, then None or an error. Paths are read from `paths` one at a time.

    `windows(path, threads)` decodes a file. `workers`: files at once; by default one for each core. A file whose
    decoding stops for XCLIP_FAST_MAX_SECONDS (environment variable, default 120) is a bad file; its thread is left
    behind.
    """
    workers = usable_cores() if workers is None else workers
    # of the decoder of one file
    threads = max(1, workers // len(paths)) if isinstance(paths, Sequence) and paths else 1

    def put(target: queue.Queue[Any], item: Any) -> None:
        while True:
            progress()  # ends the thread once the reader has gone
            try:
                return target.put(item, timeout=0.1)
            except queue.Full:
                continue

    def read(path: Path, target: queue.Queue[Any], _: None) -> None:
        try:
            with contextlib.closing(windows(path, threads)) as found:
                for window in found:
                    put(target, window)
        except BaseException as error:  # raised where the windows are used
            put(target, error)
        else:
            put(target, None)

    # A decoder that hangs keeps its thread; neither Ctrl-C nor the other files wait for it.
    pool = Threads(workers, "decode", lambda: None, limit("XCLIP_FAST_MAX_SECONDS"))
    ahead: deque[tuple[Path, queue.Queue[Any], Job]] = deque()

    def take(path: Path, source: queue.Queue[Any], job: Job) -> Any:
        while True:
            with contextlib.suppress(queue.Empty):
                return source.get(timeout=0.2)
            pool.check()
            if job.future.done() and (late := job.future.exception()) and source.empty():
                return ReadError(f"{path}: {late}; the environment variable XCLIP_FAST_MAX_SECONDS allows more")

    def drain() -> Iterator[tuple[Path, Window | ValueError | None]]:
        path, source, job = ahead.popleft()
        while True:
            item = take(path, source, job)
            if isinstance(item, MemoryError):
                item = ReadError(f"{path}: not enough memory to decode it")
            if isinstance(item, BaseException) and not isinstance(item, ValueError):
                raise item
            yield path, item
            if not isinstance(item, Window):
                return

    try:
        for path in paths:
            waiting: queue.Queue[Any] = queue.Queue(_AHEAD)
            ahead.append((path, waiting, pool.submit(Job(partial(read, path, waiting)))))
            if len(ahead) >= 2 * workers:
                yield from drain()
        while ahead:
            yield from drain()
    finally:
        pool.close(patience=1)

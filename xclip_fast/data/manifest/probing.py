"""Reads many files once, in worker processes. A file that crashes or hangs its worker costs one row."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import stat
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from multiprocessing.connection import Connection, wait
from typing import Any

from ..decode.decoder import probe
from ..decode.source import ReadError, Source, VideoError
from ..decode.video import Video, one_line
from ..threads import usable_cores

_OF_ROW = ("path", "label", "member", "offset", "size", "mtime_ns")  # not of the video itself


def look(root: str, row: Video, follow_links: bool) -> Video:
    """The row with the facts about its file, or with an error. `root` has no symbolic links.

    After an error that is not a fact about the file (a read error, too little memory, an error of this program)
    `mtime_ns` is 0, and the next index looks at the file again.
    """
    source = Source(os.path.join(root, row.path), row.offset, row.size if row.offset is not None else None)
    try:
        before = file_status(root, row.path, follow_links)
        row = replace(row, mtime_ns=before.st_mtime_ns, size=row.size if row.offset is not None else before.st_size)
        video = probe(source)
        after = os.stat(source.path)
    except VideoError as error:
        passing = isinstance(error, ReadError)
        text = one_line(str(error).removeprefix(f"{source}: "))
        return replace(row, error=text, mtime_ns=0 if passing else row.mtime_ns)
    except FileNotFoundError:
        return replace(row, error="no such file", mtime_ns=0)
    except Exception as error:  # one odd file in a million must not stop the others
        text = one_line(getattr(error, "strerror", None) or f"{type(error).__name__}: {error}")
        return replace(row, error=text, mtime_ns=0)
    if (after.st_mtime_ns, after.st_size) != (before.st_mtime_ns, before.st_size):
        return replace(row, error="changed while it was read; index again", mtime_ns=0)
    return replace(video, **{name: getattr(row, name) for name in _OF_ROW})


def file_status(root: str, path: str, follow_links: bool) -> os.stat_result:
    """The file's status. Raises VideoError if links lead out of the root."""
    whole = os.path.join(root, path)
    status = os.lstat(whole)
    if stat.S_ISLNK(status.st_mode):
        status = os.stat(whole)
        real = os.path.realpath(whole)
    else:
        real = real_folder(os.path.dirname(whole))
    if not follow_links and real != root and not real.startswith(os.path.join(root, "")):
        raise VideoError(
            f"is a link that leads out of the root folder, to {real}; --follow-links (follow_links=True) allows it"
        )
    return status


@lru_cache(4096)
def real_folder(folder: str) -> str:
    return os.path.realpath(folder)


@dataclass
class _Worker:
    process: Any
    connection: Connection
    number: int | None = None  # its row
    deadline: float = 0.0


def look_all(
    root: str, rows: Sequence[Video], *, workers: int | None, timeout: float, follow_links: bool
) -> Generator[tuple[int, Video], None, None]:
    """Calls `look` for every row, in parallel. Yields (number of the row, row) as the rows get done.

    A worker that dies, or takes longer than `timeout` seconds for one file, is replaced. Its row gets an error, and the
    next index looks at the file again. `workers=0` reads in this process and catches neither.
    """
    if workers == 0:
        yield from ((number, look(root, row, follow_links)) for number, row in enumerate(rows))
        return
    workers = usable_cores() if workers is None else workers
    crew = [_start(root, follow_links, timeout) for _ in range(min(workers, len(rows)))]
    waiting = iter(enumerate(rows))
    try:
        for worker in crew:
            _give(worker, next(waiting, None), timeout)
        while busy := [worker for worker in crew if worker.number is not None]:
            soonest = min(worker.deadline for worker in busy)
            ready = wait([worker.connection for worker in busy], max(0.0, soonest - time.monotonic()))
            for place, worker in enumerate(crew):
                if worker.number is None:
                    continue
                answer: Video | None = None
                failure = ""
                if worker.connection in ready:
                    try:
                        answer = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join(1)
                        failure = f"the process that read it died (exit status {worker.process.exitcode})"
                elif time.monotonic() >= worker.deadline:
                    failure = f"reading it took longer than {timeout:g} seconds; --timeout (timeout=) allows more"
                else:
                    continue
                number = worker.number
                if answer is None:
                    answer = replace(rows[number], error=failure)
                    _stop(worker)
                    crew[place] = worker = _start(root, follow_links, timeout)
                _give(worker, next(waiting, None), timeout)
                yield number, answer
    finally:
        for worker in crew:
            _stop(worker)


def _start(root: str, follow_links: bool, timeout: float) -> _Worker:
    # A forked process starts in milliseconds and needs no `if __name__ == "__main__"` in the caller's script.
    fork = "fork" in multiprocessing.get_all_start_methods() and sys.platform != "darwin"
    context = multiprocessing.get_context("fork" if fork else "spawn")
    ours, theirs = context.Pipe()
    process = context.Process(  # type: ignore[attr-defined]
        target=_serve, args=(theirs, root, follow_links, timeout, os.getpid()), daemon=True
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking beside threads: the child uses none of theirs
        process.start()
    theirs.close()
    return _Worker(process, ours)


def _stop(worker: _Worker) -> None:
    worker.connection.close()
    worker.process.kill()
    worker.process.join(1)  # not forever: the kernel may hold it, in a network file system


def _give(worker: _Worker, job: tuple[int, Video] | None, timeout: float) -> None:
    worker.number = None if job is None else job[0]
    worker.deadline = time.monotonic() + timeout
    if job is not None:
        with suppress(OSError):  # it died between two files; receiving will say so
            worker.connection.send(job[1])


def _serve(connection: Connection, root: str, follow_links: bool, timeout: float, parent: int) -> None:
    """Answers rows until the other end closes or its process is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends this process
    logging.disable(logging.WARNING)  # the row says what matters
    alarm = getattr(signal, "alarm", lambda seconds: None)  # ends this process if it hangs and the parent is killed
    try:
        while os.getppid() == parent:
            if connection.poll(1):
                alarm(int(timeout) + 60)
                connection.send(look(root, connection.recv(), follow_links))
                alarm(0)
    except (EOFError, OSError):
        return

"""Decoding in processes that may die: torch's DataLoader, watched.

A file can crash a decoder or keep it busy forever, and no code can tell beforehand. So every thread of every worker
writes the row that it decodes into shared memory. If a worker dies or a video takes too long, that table names the
suspects. All workers are restarted, and each suspect is tried alone in a process of its own. A suspect that fails
there, or is suspected a second time, is given up. The missing batches are then requested again.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import shutil
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..decode.video import one_line
from .tasks import Decoder, Result, Task

log = logging.getLogger(__name__)

_POLL = 1  # seconds between two looks at the workers while a batch is awaited
_FRUITLESS = 3  # restarts in a row without a batch and without a video to blame
_START = 120.0  # seconds that a process may take to start

MakeTask = Callable[[np.ndarray], Task]
"""From rows to the task that decodes them, without those that are known to be bad."""


class Workers:
    """Worker processes that decode tasks in order. With `workers=0` threads of this process decode, unwatched."""

    def __init__(self, decoder: Decoder, workers: int, prefetch: int, pin: bool, timeout: float) -> None:
        self.decoder, self.workers, self.prefetch, self.pin, self.timeout = decoder, workers, prefetch, pin, timeout
        self.table = decoder.table
        self.restarts = 0
        self._loader: DataLoader[Any] | None = None
        self._batches: Any = None  # torch's iterator over the workers' results, one for the life of the workers
        self._tasks: Callable[[], Iterator[Task]] = lambda: iter(())
        self._is_new = False  # whether the tasks are those of another epoch than the workers'
        self._suspected: set[int] = set()

    def results(
        self, batches: Sequence[np.ndarray], make: MakeTask, give_up: Callable[[int, str], None]
    ) -> Generator[Result, None, None]:
        """The results of these batches of rows, in order, each once.

        `make` makes a task when there is room for it. `give_up(row, reason)` is called for a video that killed or hung
        its worker; later tasks must leave it out.

        Raises RuntimeError if workers keep dying without a video to blame, or with the traceback of another error.
        """
        done, fruitless = 0, 0
        self._tasks = lambda: (make(rows) for rows in batches[done:])
        self._is_new = True
        try:
            while done < len(batches):
                try:
                    result = self._next() if self.workers else self.decoder.decode(make(batches[done]))
                except _TROUBLE as error:
                    if not self.workers:
                        raise
                    fruitless = 0 if self._recover(error, make, give_up) else fruitless + 1
                    if fruitless > _FRUITLESS:
                        raise RuntimeError(self._hopeless(error)) from error
                    continue
                if result.failure is not None:
                    raise RuntimeError(f"decoding failed, and no video is the cause:\n{result.failure}")
                done, fruitless = done + 1, 0
                yield result
        finally:
            if done < len(batches):  # Ctrl-C, too, in the middle of the workers' queue: its state is unknown
                self.close()
            self._tasks = lambda: iter(())  # `make` may refer to the loader that owns this

    def __iter__(self) -> Iterator[Task]:
        """The tasks of this epoch, for DataLoader."""
        return self._tasks()

    def _next(self) -> Result:
        """The next result. Raises one of _TROUBLE if a worker died or hangs."""
        if self._loader is None:
            self._loader = self._start()
        if self._batches is None or self._is_new:
            self._batches = iter(self._loader)  # workers of an earlier epoch have _POLL seconds to answer
            self._is_new = False
        quiet, begun = time.monotonic(), -1
        while True:
            try:
                return next(self._batches)
            except StopIteration:
                raise RuntimeError("the workers ran out of tasks early") from None
            except RuntimeError as error:
                if "timed out" not in str(error):
                    raise
            if any(not worker.is_alive() for worker in self.processes):
                raise RuntimeError("a worker died")
            if any(self.table.busy(worker, self.timeout) for worker in range(self.workers)):
                raise RuntimeError(f"a worker has decoded one video for more than {self.timeout:g} s")
            now = int(self.table.counts.sum())
            if now != begun or any(self.table.busy(worker) for worker in range(self.workers)):
                quiet, begun = time.monotonic(), now
            starting = bool((self.table.counts == 0).any())
            if time.monotonic() - quiet > (max(self.timeout, _START) if starting else self.timeout):
                raise RuntimeError(f"the workers have done nothing for {time.monotonic() - quiet:.0f} s")

    @property
    def processes(self) -> list[Any]:
        return getattr(self._batches, "_workers", [])

    def _start(self) -> DataLoader[Any]:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(1)  # a worker that runs a script without its guard: the parent says so, once
        self.table.cells.fill_(-1)  # here, because Ctrl-C may interrupt `close`
        self.table.counts.zero_()
        self.table.ended.fill_(False)
        return DataLoader(
            self.decoder,  # type: ignore[arg-type]  # only __getitems__ is used
            batch_sampler=self,  # type: ignore[arg-type]  # only __iter__ is used
            num_workers=self.workers,
            collate_fn=_same,  # type: ignore[arg-type]  # __getitems__ gives a batch
            pin_memory=self.pin,
            timeout=_POLL,
            worker_init_fn=_settle,
            multiprocessing_context=context(),
            generator=torch.Generator(),  # or each epoch would draw from the program's own random numbers
            prefetch_factor=self.prefetch,
            persistent_workers=True,
        )

    def _recover(self, error: BaseException, make: MakeTask, give_up: Callable[[int, str], None]) -> bool:
        """Ends all workers and looks for the video that is to blame. Returns False if this found nothing."""
        suspects: list[int] = []
        for number, process in enumerate(self.processes):
            suspects += self.table.busy(number, 0.0 if not process.is_alive() else self.timeout)
        codes = [process.exitcode for process in self.processes if process.exitcode]
        self.close(kill=True)
        self.restarts += 1
        reason = f"{one_line(str(error))}{f' ({_exit(codes[0])})' if codes else ''}"
        log.warning("%s; the workers are restarted; %d videos are suspected", reason, len(suspects))
        # Only the system or a person sends SIGKILL (9) here: the cause is lack of memory, not a bad video.
        killed = -9 in codes
        given_up = 0
        for row in suspects:
            verdict = f"the worker that decodes it died or hung, twice ({reason})" if row in self._suspected else ""
            verdict = verdict or self._alone(make(np.array([row], np.int64)))
            if verdict:
                give_up(row, verdict)
                given_up += 1
            elif not killed:
                self._suspected.add(row)
        return given_up > 0 or (bool(suspects) and not killed)

    def _alone(self, task: Task) -> str:
        """Decodes one video in a process of its own. Returns "", or how that process failed."""
        here, there = context().Pipe(duplex=False)
        process = context().Process(target=_decode_alone, args=(self.decoder, task, there), daemon=True)
        process.start()
        there.close()
        try:
            started = here.poll(_START) and bool(here.recv())
        except EOFError:
            started = False
        process.join(self.timeout if started else 0)
        try:
            if process.is_alive():
                return f"decoding it takes longer than {self.timeout:g} s (tried twice)"
            return f"it crashes the decoder ({_exit(process.exitcode)})" if (process.exitcode or 0) < 0 else ""
        finally:
            process.kill()
            process.join()
            process.close()
            here.close()

    def _hopeless(self, error: BaseException) -> str:
        shared = f" ({shutil.disk_usage('/dev/shm').free >> 20} MiB free)" if os.path.isdir("/dev/shm") else ""
        return (
            f"the workers that decode videos died {_FRUITLESS + 1} times in a row, and no video is to blame "
            f"({one_line(str(error))}). A script that starts workers needs `if __name__ == '__main__':` around its "
            "code. If memory is short, use fewer workers, a smaller batch, prefetch=1, or more room in "
            f"/dev/shm{shared}. workers=0 decodes in this process and shows the error"
        )

    def close(self, kill: bool = False) -> None:
        """Ends the workers, each after its videos in work. They start again when they are needed.

        One that has decoded a single video for a second is killed; with `kill`, all are.
        """
        batches, processes = self._batches, self.processes
        self._batches = self._loader = None
        if batches is None:
            return
        self.table.ended.fill_(True)
        for worker, process in enumerate(processes):
            if kill or self.table.busy(worker, 1.0):
                process.kill()
        batches._shutdown_workers()  # a pending error still refers to it, so it would not be deleted now
        for process in processes:
            process.kill()
            process.join(5.0)


_TROUBLE = (RuntimeError, OSError, EOFError, AssertionError)


def check_shared_memory(batch: int, workers: int, prefetch: int) -> None:
    """Checks that /dev/shm can hold the batches of the workers, `batch` bytes each.

    Raises RuntimeError if it cannot hold one batch. Logs a warning if it cannot hold all that may wait at once.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    wanted = batch * (workers * prefetch + 1)
    if wanted <= free:
        return
    mend = (
        "give the container more shared memory (docker run --shm-size=8g, or --ipc=host), or use a smaller batch, "
        "fewer workers or prefetch=1; workers=0 needs none"
    )
    if batch > free:
        raise RuntimeError(
            f"a batch takes {batch >> 20} MiB, and /dev/shm, through which workers send it, has {free >> 20} MiB free: "
            f"{mend}"
        )
    log.warning(
        "%d batches of %d MiB may wait at once in /dev/shm, which has %d MiB free. If it fills up, the workers die: %s",
        workers * prefetch + 1,
        batch >> 20,
        free >> 20,
        mend,
    )


def context() -> Any:
    """The multiprocessing context. It never forks this process, which may use CUDA and have threads.

    With a fork server, workers start in milliseconds, also after a crash. If a child of this process dies, torch's
    signal handler raises an error in the middle of other work; if a child of the fork server dies, it does not.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "xclip_fast.data.decode"])  # no effect once the server runs
    return server


def _same(result: Result) -> Result:
    return result


def _settle(worker: int) -> None:
    """Sets up a new worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends this one
    # A PyAV frame whose side data was read refers to itself, so only the garbage collector frees it. The collector
    # counts objects, not megabytes. With the imported modules frozen it is quick enough to run every few videos.
    gc.collect()
    gc.freeze()
    gc.set_threshold(100, 3, 3)
    parent = multiprocessing.parent_process()
    if parent is not None:
        # DataLoader's own watch is on the fork server, which lives as long as its children do.
        threading.Thread(target=_end_with, args=(parent.sentinel,), name="watch the parent", daemon=True).start()


def _end_with(sentinel: int) -> None:
    multiprocessing.connection.wait([sentinel])
    os._exit(1)


def _decode_alone(decoder: Decoder, task: Task, pipe: Any) -> None:
    _settle(0)
    torch.set_num_threads(1)
    importlib.import_module("xclip_fast.data.decode")
    pipe.send(True)
    with contextlib.suppress(Exception):  # a worker finds an error of this kind again and reports it
        decoder.one(task, 0, np.empty(decoder.shape, np.uint8))


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"

"""Decoding in processes that may die: torch's DataLoader, watched.

A file can crash a decoder or keep it busy forever, and no code can tell beforehand. So every thread of every worker
writes the row that it decodes into shared memory. If a worker dies or a video takes too long, that table names the
suspects. All workers are restarted, and each suspect is tried alone in a process of its own. A suspect that fails
there, or is suspected a second time, is given up. The missing batches are then requested again.

A task holds the rows of its videos (some hundred bytes each), so workers need no manifest.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import logging
import multiprocessing
import multiprocessing.connection
import os
import queue
import shutil
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, get_worker_info

from ..decode.video import DamagedPlan, one_line
from ..manifest.manifest import Manifest
from ..sampling import sample_rng
from .cache import FrameCache

log = logging.getLogger(__name__)

_POLL = 1  # seconds between two looks at the workers while a batch is awaited
_FRUITLESS = 3  # restarts in a row without a batch and without a video to blame
_START = 120.0  # seconds that a process may take to start

Decode = Callable[..., Any]
"""(source, views, *, out), as `decode.decode_views`."""


class Task(NamedTuple):
    """A batch to decode. `rows` are numbers in the whole manifest; `manifest` holds just these videos, in order."""

    turn: int
    number: int
    epoch: int
    rows: np.ndarray
    manifest: Manifest


class Result(NamedTuple):
    """A batch: frames uint8 (B, V, T, S, S, 3) of `rows`, the reasons for missing rows (`bad`), and `notes` for people.

    `failure` is the traceback of an error that is not a video's fault. `number` is -1 if the batch is no longer wanted.
    """

    number: int
    frames: torch.Tensor
    rows: np.ndarray
    bad: dict[int, str]
    notes: list[str]
    failure: str | None


class Table:
    """The video that each thread of each worker is decoding. It lies in shared memory and outlives the worker.

    `cells`: int64 (workers, threads, 2), the row or -1, and the start (monotonic ns, one clock for all processes).
    `counts`: int64 (1 + workers,), the present turn, and the number of videos that each worker has begun.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.cells = torch.full((workers, threads, 2), -1, dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(1 + workers, dtype=torch.int64).share_memory_()

    def begin(self, worker: int, thread: int, row: int) -> None:
        cells = self.cells.numpy()
        cells[worker, thread, 1] = time.monotonic_ns()
        cells[worker, thread, 0] = row
        self.counts.numpy()[1 + worker] += 1

    def end(self, worker: int, thread: int) -> None:
        self.cells.numpy()[worker, thread, 0] = -1

    def busy(self, worker: int, seconds: float = 0.0) -> list[int]:
        """The rows that this worker has been decoding for at least so many seconds."""
        rows, since = self.cells[worker].unbind(1)
        return rows[(rows >= 0) & (since <= time.monotonic_ns() - int(seconds * 1e9))].tolist()

    @property
    def turn(self) -> int:
        return int(self.counts.numpy()[0])

    @turn.setter
    def turn(self, value: int) -> None:
        self.counts.numpy()[0] = value


class Decoder:
    """The dataset for torch's DataLoader: it turns a task into a result. It is pickled once for each worker."""

    def __init__(
        self,
        transform: Any,
        seed: int,
        shape: tuple[int, ...],
        threads: int,
        workers: int,
        cache: FrameCache | None = None,
        decode: Decode | None = None,
    ) -> None:
        self.transform, self.seed, self.shape, self.threads = transform, seed, shape, threads
        self.cache, self.decode = cache, decode
        self.table = Table(max(1, workers), threads)
        self._pool: ThreadPoolExecutor | None = None
        self._slots: queue.SimpleQueue[int] = queue.SimpleQueue()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in vars(self).items() if name not in ("_pool", "_slots")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state, _pool=None, _slots=queue.SimpleQueue())

    def __getitem__(self, task: Task) -> Result:
        return self.__getitems__(task)

    def __getitems__(self, task: Task) -> Result:
        if self._pool is None:
            self._pool = ThreadPoolExecutor(self.threads, thread_name_prefix="decode")
            for slot in range(self.threads):
                self._slots.put(slot)
        info = get_worker_info()
        worker = info.id if info else 0
        frames = torch.empty(len(task.rows), *self.shape, dtype=torch.uint8)
        out, none = frames.numpy(), frames[:0]
        try:
            # A list, so that no thread still writes to `out` if an error leaves this function.
            found = list(self._pool.map(lambda place: self._one(task, place, out[place], worker), range(len(out))))
        except Exception:  # the parent raises it, with this traceback
            return Result(task.number, none, task.rows[:0], {}, [], traceback.format_exc())
        if None in found:
            return Result(-1, none, task.rows[:0], {}, [], None)
        bad = {int(row): reason for row, reason in zip(task.rows, found, strict=True) if reason}
        notes: list[str] = []
        if self.cache is not None:
            notes, self.cache.notes = self.cache.notes, notes
        if not bad:
            return Result(task.number, frames, task.rows, bad, notes, None)
        good = np.array([not reason for reason in found])
        return Result(task.number, frames[torch.from_numpy(good)], task.rows[good], bad, notes, None)

    def _one(self, task: Task, place: int, out: np.ndarray, worker: int) -> str | None:
        """Decodes one video of a task. Returns "", or the reason of a failure; None if the task is no longer wanted."""
        if self.table.turn != task.turn:
            return None
        slot = self._slots.get()
        self.table.begin(worker, slot, int(task.rows[place]))
        try:
            return self.one(task, place, out)
        finally:
            self.table.end(worker, slot)
            self._slots.put(slot)

    def one(self, task: Task, place: int, out: np.ndarray) -> str:
        """Decodes one video of a task into `out`, uint8 (V, T, S, S, 3). Returns "", or the reason of a failure."""
        from ..decode.decoder import VideoError, decode_views

        row, video = int(task.rows[place]), task.manifest.videos[place]
        if min(video.frames, video.width, video.height) < 1:
            return "the manifest has no facts about it; index the data again"
        rng = sample_rng(self.seed, task.epoch, row) if getattr(self.transform, "random", True) else None
        source = None
        try:
            source = task.manifest.source(place)
            views = self.transform.views(video.frames, video.width, video.height, rng)
            if self.decode is None and self.cache is not None:
                self.cache.decode_views(source, views, video=video, out=out)
            else:
                (self.decode or decode_views)(source, views, out=out)
        except (VideoError, DamagedPlan, IndexError, OSError, MemoryError) as error:
            return one_line(str(error).removeprefix(f"{source}: ")) or type(error).__name__
        return ""


class Workers:
    """Worker processes that decode tasks in order. With `workers=0` threads of this process decode, unwatched."""

    def __init__(self, decoder: Decoder, workers: int, prefetch: int, pin: bool, timeout: float) -> None:
        self.decoder, self.workers, self.prefetch, self.pin, self.timeout = decoder, workers, prefetch, pin, timeout
        self.table = decoder.table
        self.restarts = 0
        self._loader: DataLoader[Any] | None = None
        self._batches: Any = None  # torch's iterator over the workers' results, one for the life of the workers
        self._opened = 0  # the turn it is in
        self._feed = _Feed()
        self._turn = 0
        self._suspected: set[int] = set()

    def results(
        self,
        numbers: range,
        make: Callable[[int, int], Task],
        single: Callable[[int, int], Task],
        give_up: Callable[[int, str], None],
    ) -> Generator[Result, None, None]:
        """The results of the tasks with these numbers, in order, each once.

        `make(turn, number)` makes a task when there is room for it, `single(turn, row)` a task of one video.
        `give_up(row, reason)` is called for a video that killed or hung its worker; later tasks must leave it out.
        Raises RuntimeError if workers keep dying without a video to blame, or with the traceback of another error.
        """
        self._turn += 1
        turn = self.table.turn = self._turn
        self._feed.tasks = lambda: (make(turn, number) for number in numbers[done:] if self.table.turn == turn)
        done, fruitless = 0, 0
        try:
            while done < len(numbers):
                try:
                    result = self._next(turn) if self.workers else self.decoder[make(turn, numbers[done])]
                    if result.number != numbers[done] and result.failure is None:
                        raise RuntimeError(f"batch {result.number} came where {numbers[done]} was due")
                except _TROUBLE as error:
                    if not self.workers:
                        raise
                    fruitless = 0 if self._recover(error, turn, single, give_up) else fruitless + 1
                    if fruitless > _FRUITLESS:
                        raise RuntimeError(self._hopeless(error)) from error
                    continue
                except BaseException:  # Ctrl-C in the middle of the workers' queue: its state is unknown
                    self.close()
                    raise
                if result.failure is not None:
                    raise RuntimeError(f"decoding failed, and no video is the cause:\n{result.failure}")
                done, fruitless = done + 1, 0
                yield result
        finally:
            self.table.turn = 0
            if done < len(numbers) and not sys.is_finalizing():
                self._drain(5.0)
            self._feed.tasks = _no_tasks  # `make` may refer to the loader that owns this

    def _next(self, turn: int) -> Result:
        """The next result. Raises one of _TROUBLE if a worker died or hangs."""
        if self._loader is None:
            self._loader, self._opened = self._start(), 0
        if self._opened != turn:
            try:
                self._batches = iter(self._loader)  # workers of an earlier turn have _POLL seconds to answer
            except RuntimeError as error:
                log.info("the workers are restarted for the next epoch: %s", error)
                self._kill()
                self._loader = self._start()
                self._batches = iter(self._loader)
            self._opened = turn
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
            now = int(self.table.counts[1:].sum())
            if now != begun or any(self.table.busy(worker) for worker in range(self.workers)):
                quiet, begun = time.monotonic(), now
            starting = bool((self.table.counts[1:] == 0).any())
            if time.monotonic() - quiet > (max(self.timeout, _START) if starting else self.timeout):
                raise RuntimeError(f"the workers have done nothing for {time.monotonic() - quiet:.0f} s")

    @property
    def processes(self) -> list[Any]:
        return getattr(self._batches, "_workers", [])

    def _start(self) -> DataLoader[Any]:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(1)  # a worker that runs a script without its guard: the parent says so, once
        return DataLoader(
            self.decoder,  # type: ignore[arg-type]  # only __getitems__ is used
            batch_sampler=self._feed,  # type: ignore[arg-type]
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

    def _recover(
        self,
        error: BaseException,
        turn: int,
        single: Callable[[int, int], Task],
        give_up: Callable[[int, str], None],
    ) -> bool:
        """Ends all workers and looks for the video that is to blame. Returns False if this found nothing."""
        suspects: list[int] = []
        for number, process in enumerate(self.processes):
            suspects += self.table.busy(number, 0.0 if not process.is_alive() else self.timeout)
        codes = [process.exitcode for process in self.processes if process.exitcode]
        self._kill()
        self.restarts += 1
        reason = f"{one_line(str(error))}{f' ({_exit(codes[0])})' if codes else ''}"
        log.warning("%s; the workers are restarted; %d videos are suspected", reason, len(suspects))
        # Only the system or a person sends SIGKILL (9) here: the cause is lack of memory, not a bad video.
        killed = -9 in codes
        given_up = 0
        for row in suspects:
            verdict = f"the worker that decodes it died or hung, twice ({reason})" if row in self._suspected else ""
            verdict = verdict or self._alone(single(turn, row))
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

    def _drain(self, seconds: float) -> None:
        """Empties the workers' queues after an abandoned epoch. Workers that take too long are killed."""
        end = time.monotonic() + seconds
        while self._batches is not None:
            try:
                next(self._batches)
            except StopIteration:
                return
            except _TROUBLE as error:
                if "timed out" not in str(error) or time.monotonic() > end:
                    self._kill()
            if time.monotonic() > end:
                self._kill()

    def _kill(self) -> None:
        for process in self.processes:
            process.kill()
        self._shut_down()

    def _shut_down(self) -> None:
        batches, processes = self._batches, self.processes
        self._batches = self._loader = None
        if batches is not None:
            batches._shutdown_workers()  # a pending error still refers to it, so it would not be deleted now
        for process in processes:
            process.kill()
            process.join(5.0)
        self.table.cells.fill_(-1)
        self.table.counts[1:].zero_()

    def close(self) -> None:
        """Ends the workers. One that stays busy for a second is killed. They start again when they are needed."""
        self.table.turn = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end and any(self.table.busy(worker) for worker in range(self.workers)):
            time.sleep(0.01)
        for worker, process in enumerate(self.processes):
            if self.table.busy(worker):
                process.kill()
        self._shut_down()


def _no_tasks() -> Iterator[Task]:
    return iter(())


class _Feed:
    """The batch sampler that gives tasks to DataLoader."""

    def __init__(self) -> None:
        self.tasks = _no_tasks

    def __iter__(self) -> Iterator[Task]:
        return self.tasks()


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

"""Decoding in processes that may die: torch's DataLoader, watched.

A file can crash a decoder or keep it busy for ever, and no code can tell beforehand. So every thread of every worker
writes what it is decoding into memory that all processes see. When a worker dies or a video takes too long, that table
names the suspects. All workers are started anew, each suspect is tried alone in a process of its own, and the one that
fails there (or is suspected a second time) is given up. The batches not delivered yet are then asked for again.

A task carries all that a worker needs to know of its videos (some hundred bytes each), so workers hold no manifest.
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
_FRUITLESS = 3  # restarts in a row that neither deliver a batch nor find a video to blame
_START = 120.0  # seconds that a process may take to start

Decode = Callable[..., Any]
"""(source, views, *, out): as `decode.decode_views`."""


class Task(NamedTuple):
    """A batch to decode. `rows` are numbers in the whole manifest; `manifest` holds just these videos, in order."""

    turn: int
    number: int
    epoch: int
    rows: np.ndarray
    manifest: Manifest


class Result(NamedTuple):
    """A batch: frames uint8 (B, V, T, S, S, 3) of `rows`, why other rows are not in it, and what to tell people.

    `failure` is the traceback of an error that is not a video's fault; `number` is -1 if nobody wants it any more.
    """

    number: int
    frames: torch.Tensor
    rows: np.ndarray
    bad: dict[int, str]
    notes: list[str]
    failure: str | None


class Table:
    """The video that each thread of each worker is decoding. It lies in shared memory and outlives the worker.

    `cells`: int64 (workers, threads, 2), the row or -1, and since when (monotonic ns, one clock for all processes).
    `counts`: int64 (1 + workers,): the turn that is wanted, and how many videos each worker has begun.
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
        """The rows that this worker has been decoding for so long."""
        rows, since = self.cells[worker].unbind(1)
        return rows[(rows >= 0) & (since <= time.monotonic_ns() - int(seconds * 1e9))].tolist()

    @property
    def turn(self) -> int:
        return int(self.counts.numpy()[0])

    @turn.setter
    def turn(self, value: int) -> None:
        self.counts.numpy()[0] = value


class Decoder:
    """The data set that torch's DataLoader sees: a task in, its result out. Pickled once per worker."""

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
            # In a list, so that no thread writes to `out` any more when an error leaves this function.
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
        """Decode one video of a task. "" or, if it cannot be decoded, why; None if nobody wants it any more."""
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
        """Decode one video of a task into `out`, uint8 (V, T, S, S, 3). "" or, if it cannot be decoded, why."""
        from ..decode.decoder import VideoError, decode_views

        row, video = int(task.rows[place]), task.manifest.videos[place]
        if min(video.frames, video.width, video.height) < 1:
            return "the manifest has no facts about it: index the data again"
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
    """Worker processes that decode tasks, in order; with `workers=0`, threads of this process, unwatched."""

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
        """The results of the tasks of these numbers, in order, each once.

        `make(turn, number)` makes a task when there is room for it; `single(turn, row)` one of a single video;
        `give_up(row, reason)` hears of a video that killed or hung its worker, and tasks made later must not hold it.
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
                    raise RuntimeError(f"decoding failed, and not for a video's fault:\n{result.failure}")
                done, fruitless = done + 1, 0
                yield result
        finally:
            self.table.turn = 0
            if done < len(numbers) and not sys.is_finalizing():
                self._drain(5.0)
            self._feed.tasks = _no_tasks  # `make` may refer to whoever deletes us

    def _next(self, turn: int) -> Result:
        """The next result. Raises one of _TROUBLE if a worker died, or hangs."""
        if self._loader is None:
            self._loader, self._opened = self._start(), 0
        if self._opened != turn:
            try:
                self._batches = iter(self._loader)  # workers of an earlier turn have _POLL seconds to answer
            except RuntimeError as error:
                log.info("the workers are started anew for the next epoch: %s", error)
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
            if any(not worker.is_alive() for worker in self._processes):
                raise RuntimeError("a worker died")
            if any(self.table.busy(worker, self.timeout) for worker in range(self.workers)):
                raise RuntimeError(f"a worker has been at one video for more than {self.timeout:g} s")
            now = int(self.table.counts[1:].sum())
            if now != begun or any(self.table.busy(worker) for worker in range(self.workers)):
                quiet, begun = time.monotonic(), now
            starting = bool((self.table.counts[1:] == 0).any())
            if time.monotonic() - quiet > (max(self.timeout, _START) if starting else self.timeout):
                raise RuntimeError(f"the workers have done nothing for {time.monotonic() - quiet:.0f} s")

    @property
    def _processes(self) -> list[Any]:
        return getattr(self._batches, "_workers", [])

    def _start(self) -> DataLoader[Any]:
        if getattr(multiprocessing.current_process(), "_inheriting", False):
            raise SystemExit(1)  # a worker that runs a script without its guard: the parent says so, once
        return DataLoader(
            self.decoder,  # type: ignore[arg-type]  # it has __getitems__, which is all that is used
            batch_sampler=self._feed,  # type: ignore[arg-type]
            num_workers=self.workers,
            collate_fn=_same,  # type: ignore[arg-type]  # what __getitems__ gave is a batch
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
        """End all workers and find out which video is to blame. False if that brought nothing."""
        suspects: list[int] = []
        for number, process in enumerate(self._processes):
            suspects += self.table.busy(number, 0.0 if not process.is_alive() else self.timeout)
        codes = [process.exitcode for process in self._processes if process.exitcode]
        self._kill()
        self.restarts += 1
        reason = f"{one_line(str(error))}{f' ({_exit(codes[0])})' if codes else ''}"
        log.warning("%s; the workers are started anew; %d videos are suspected", reason, len(suspects))
        # Nothing but the system or a person sends SIGKILL (9) here: lack of memory, rather than a bad video.
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
        """Decode one video in a process of its own: "", or how that ended."""
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
            f"({one_line(str(error))}). If a script started them: its code must stand under "
            "`if __name__ == '__main__':`. If they lack memory: fewer workers, a smaller batch, prefetch=1, or more "
            f"room in /dev/shm{shared}. workers=0 decodes in this process and shows what fails"
        )

    def _drain(self, seconds: float) -> None:
        """Empty the workers' queues after an epoch was abandoned; workers that take too long are ended."""
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
        for process in self._processes:
            process.kill()
        self._shut_down()

    def _shut_down(self) -> None:
        batches, processes = self._batches, self._processes
        self._batches = self._loader = None
        if batches is not None:
            batches._shutdown_workers()  # an error on its way up still refers to it: it would not be deleted now
        for process in processes:
            process.kill()
            process.join(5.0)
        self.table.cells.fill_(-1)
        self.table.counts[1:].zero_()

    def close(self) -> None:
        """End the workers; one that is busy with a video for another second is killed. They start again when needed."""
        self.table.turn = 0
        end = time.monotonic() + 1.0
        while time.monotonic() < end and any(self.table.busy(worker) for worker in range(self.workers)):
            time.sleep(0.01)
        for worker, process in enumerate(self._processes):
            if self.table.busy(worker):
                process.kill()
        self._shut_down()


def _no_tasks() -> Iterator[Task]:
    return iter(())


class _Feed:
    """The batch sampler that DataLoader draws tasks from."""

    def __init__(self) -> None:
        self.tasks = _no_tasks

    def __iter__(self) -> Iterator[Task]:
        return self.tasks()


_TROUBLE = (RuntimeError, OSError, EOFError, AssertionError)


def check_shared_memory(batch: int, workers: int, prefetch: int) -> None:
    """Says at the start if /dev/shm cannot hold the batches that workers hand over, `batch` bytes each.

    Raises RuntimeError if it cannot hold one; else logs a warning if it cannot hold all that may wait at once.
    """
    if not workers or not os.path.isdir("/dev/shm"):
        return
    free = shutil.disk_usage("/dev/shm").free
    wanted = batch * (workers * prefetch + 1)
    if wanted <= free:
        return
    mend = (
        "give the container more (docker run --shm-size=8g, or --ipc=host), or take a smaller batch, fewer workers or "
        "prefetch=1; workers=0 needs none"
    )
    if batch > free:
        raise RuntimeError(
            f"a batch takes {batch >> 20} MiB, and /dev/shm, by which workers hand it over, has {free >> 20} MiB free: "
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

    With a fork server, workers start in milliseconds, also after a crash, and their death does not raise an error in
    whatever this process is doing at that moment, as that of its own children would (by torch's signal handler).
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload([__name__, "xclip_fast.data.decode"])  # does nothing once the server runs
    return server


def _same(result: Result) -> Result:
    return result


def _settle(worker: int) -> None:
    """Sets up a new worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all processes of a terminal; the parent ends these
    # A PyAV frame whose side data was looked at refers to itself, so only the collector frees it, and the collector
    # counts objects, not megabytes. Without all that was imported, it is so quick that it may run every few videos.
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
    with contextlib.suppress(Exception):  # an error that can be caught is found again, and reported, by a worker
        decoder.one(task, 0, np.empty(decoder.shape, np.uint8))


def _exit(code: int | None) -> str:
    if code is not None and code < 0:
        with contextlib.suppress(ValueError):
            return signal.Signals(-code).name
    return f"exit code {code}"

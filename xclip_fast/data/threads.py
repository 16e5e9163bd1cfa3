"""Threads that can be left behind, and the number of cores for them."""

from __future__ import annotations

import atexit
import contextlib
import os
import threading
import time
import weakref
from collections.abc import Callable
from concurrent.futures import Future, InvalidStateError, wait
from dataclasses import dataclass, field
from queue import Empty, SimpleQueue
from typing import Any

_progress: dict[int, float] = {}  # thread -> the time of its last call of `progress`
_open: weakref.WeakSet[Threads] = weakref.WeakSet()
_mine = threading.local()  # .threads: the `Threads` that the calling thread is of


def usable_cores() -> int:
    """The number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cores_of_rank() -> int:
    """This process's share of the usable cores, if torchrun started several processes on this machine."""
    return max(1, usable_cores() // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def processes_and_threads(processes: int | None, threads: int | None) -> tuple[int, int]:
    """Decoding processes, and threads in each. None: two threads for each core of this process, four in a process."""
    cores = cores_of_rank()
    if threads is None:
        threads = 4 if not processes else max(1, min(4, -(-2 * cores // processes)))
    return (-(-2 * cores // threads) if processes is None else processes), threads


def progress() -> None:
    """Tells that the calling thread is not stuck, as in a long video.

    Raises SystemExit in a thread of `Threads` if nobody waits for its job any more.
    """
    if (threads := getattr(_mine, "threads", None)) is not None and threads.gave_up():
        raise SystemExit
    _progress[threading.get_ident()] = time.monotonic()


@dataclass(eq=False)
class Job:
    """Work for a thread of `Threads`, called with that thread's state."""

    work: Callable[[Any], Any]
    future: Future[Any] = field(default_factory=Future)

    def finish(self, value: Any = None, error: BaseException | None = None) -> bool:
        """Settles the future. Returns False if it was settled before: a thread that was given up may come back."""
        try:
            if error is None:
                self.future.set_result(value)
            else:
                self.future.set_exception(error)
        except InvalidStateError:
            return False
        return True


class Threads:
    """Daemon threads that take jobs in order, each with a state of its own.

    Unlike in a thread pool, a thread that hangs is left behind and replaced. Nothing waits for it, not even the
    interpreter at its end. All others have ended by then: a thread inside torch would abort the process. `limit`:
    seconds that a job may take without a call of `progress`.
    """

    def __init__(self, count: int, name: str, state: Callable[[], Any], limit: float) -> None:
        self.name, self.state, self.limit = name, state, limit
        self.jobs: SimpleQueue[Job | None] = SimpleQueue()
        self.threads: list[threading.Thread] = []
        self.running: dict[threading.Thread, tuple[Job, float]] = {}  # with the time of its start
        self.closed = False
        _open.add(self)
        for _ in range(count):
            self._add()

    def _add(self) -> None:
        self.threads.append(threading.Thread(target=self._serve, name=self.name, daemon=True))
        self.threads[-1].start()

    def _serve(self) -> None:
        me, state, _mine.threads = threading.current_thread(), self.state(), self
        while (job := self.jobs.get()) is not None:
            self.running[me] = job, time.monotonic()
            try:
                in_time = job.finish(job.work(state))
            except BaseException as error:  # the caller that waits for the result gets it
                in_time = job.finish(error=error)
            del self.running[me], job  # an idle thread keeps no batch alive
            if not in_time:  # another thread has taken this one's place
                return

    def gave_up(self) -> bool:
        """Whether the job of the calling thread has been given up."""
        return self.closed or self.running[threading.current_thread()][0].future.done()

    def submit(self, job: Job) -> Job:
        self.jobs.put(job)
        return job

    def result(self, job: Job) -> Any:
        """The job's result, or its error. Raises TimeoutError if the job hangs, or if hung jobs block it."""
        while not job.future.done():
            progress()  # a thread that waits for another one is not stuck
            self.check()
            wait([job.future], timeout=min(0.5, self.limit / 4))
        return job.future.result()

    def check(self) -> None:
        """Gives up jobs that are stuck: their futures get a TimeoutError, and new threads take their place."""
        now = time.monotonic()
        for thread, (other, begun) in list(self.running.items()):
            since = max(begun, _progress.get(thread.ident or 0, 0.0))
            if now - since > self.limit and thread in self.threads:
                late = TimeoutError(f"decoding did not advance for {self.limit:g} seconds")
                if other.finish(error=late):
                    self.threads.remove(thread)
                    self._add()

    def close(self, patience: float = 5) -> None:
        """Gives up all jobs, and waits at most `patience` seconds for the threads to end."""
        self.closed = True
        with contextlib.suppress(Empty):
            while (job := self.jobs.get_nowait()) is not None:
                job.future.cancel()
        for _ in self.threads:
            self.jobs.put(None)
        end, me = time.monotonic() + patience, threading.current_thread()  # garbage may be collected in any thread
        # Not join: if Ctrl-C interrupts it, Python 3.11 takes the thread for ended.
        while any(thread.is_alive() for thread in self.threads if thread is not me) and time.monotonic() < end:
            time.sleep(0.001)
        _open.discard(self)  # after Ctrl-C, the interpreter waits at its end


@atexit.register
def _close_all() -> None:
    for threads in list(_open):
        threads.close(patience=1)

"""Runs cases, each in its own process with a time limit, and writes each row at once."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .case import Case, Row, live

LOG_BYTES = 6000  # of the end of a case's output that are kept
PRELOADED = (
    "torch",
    "numpy",
    "measuring",
    "xclip_fast",
    "triton.language",
    "transformers.models.x_clip.modeling_x_clip",
    "gpu.case",
)  # importing them does not start CUDA
HANG_SECONDS = 4.0  # time limit of a case that hangs in a rehearsal
PATIENCE = 3  # factor of the time limits in a rehearsal, on a machine that may be busy
TRIES = 4  # of a case, each without the contenders that ended the earlier ones


@dataclasses.dataclass
class _Process:
    """A running case."""

    case: Case
    stage: str
    process: Any
    pipe: multiprocessing.connection.Connection
    log: Path
    ends: float
    without: tuple[str, ...]
    began: float
    contender: str = ""
    ended: str | None = None  # None while it runs, "" if it finished, else why it did not
    waits: bool = False  # it has asked for its turn


class Rows:
    """The rows of a run, each written to the file at once."""

    def __init__(self, path: Path) -> None:
        self.all: list[Row] = []
        self.stamp: Row = {}  # added to every row
        self.begin = time.monotonic()
        self._file = path.open("a", encoding="utf-8")

    def add(self, row: Row) -> None:
        row = {**row, **self.stamp, "at_s": round(time.monotonic() - self.begin, 1)}
        row["date"] = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.all.append(row)
        self._file.write(json.dumps(row, default=str) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()


class Runner:
    """Runs the cases of a stage in order, or several at a time where they time nothing.

    Args:
        rows: takes the rows.
        scratch: a folder for the cases' output while they run.
        log: the file that keeps the end of each case's output.
        rehearse: run on the CPU.
        faults: case name -> "kill", "hang" or "wrong", to rehearse them.
        say: prints a line of progress.
    """

    def __init__(
        self, rows: Rows, scratch: Path, log: Path, rehearse: bool, faults: dict[str, str], say: Callable[[str], None]
    ) -> None:
        self.rows, self.scratch, self.log = rows, scratch, log
        self.rehearse, self.faults, self.say = rehearse, faults, say
        self.workers = min(os.cpu_count() or 1, 12)
        self.context: Any = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(list(PRELOADED))
        self.early: dict[str, _Process] = {}
        self.running: list[_Process] = []
        self._number = 0

    def start_anew(self) -> None:
        """From now on start each case as a new process instead of a fork."""
        self.context = multiprocessing.get_context("spawn")

    def start_early(self, stage: str, case: Case) -> None:
        """Start a case before its stage; it waits for its turn."""
        self.early[case.name] = self._start(stage, case, time.monotonic() + 3600, ())

    def run(self, stage: str, cases: list[Case], seconds: float) -> None:
        """Run a stage within about ``seconds``; a case that does not fit gets a row that says so."""
        deadline = time.monotonic() + seconds
        waiting, running = list(cases), self.running
        while waiting or running:
            while waiting and time.monotonic() < deadline and self._may_start(waiting[0], running):
                running.append(self._next(stage, waiting.pop(0), deadline))
            if waiting and time.monotonic() >= deadline:
                for case in waiting:
                    self._note(stage, case, f"not run: the stage's {seconds:.0f} s were over")
                waiting.clear()
            self._listen(running, deadline)
            for one in [one for one in running if one.ended is not None]:
                running.remove(one)
                again = self._finish(one, deadline)
                if again is not None:
                    running.append(again)

    def stop(self) -> None:
        """End all cases that still run: each leads a process group of its own, which would outlive this one."""
        for one in (*self.running, *self.early.values()):
            self._kill(one)
        self.running.clear()
        self.early.clear()

    def _may_start(self, case: Case, running: list[_Process]) -> bool:
        if not running:
            return True
        return case.together and all(one.case.together for one in running) and len(running) < self.workers

    def _next(self, stage: str, case: Case, deadline: float) -> _Process:
        ends = min(time.monotonic() + self._limit(case), deadline)
        one = self.early.pop(case.name, None)
        if one is None:
            return self._start(stage, case, ends, ())
        one.ends, one.began = ends, time.monotonic()
        if one.waits:  # else it gets its answer when it asks
            one.waits = False
            self._reply(one)
        else:
            self._signal(one, signal.SIGCONT)
        return one

    def _limit(self, case: Case) -> float:
        return PATIENCE * case.seconds if self.rehearse else case.seconds

    def _start(self, stage: str, case: Case, ends: float, without: tuple[str, ...]) -> _Process:
        mine, theirs = self.context.Pipe()
        self._number += 1
        log = self.scratch / f"{self._number}.txt"
        fault = self.faults.get(case.name, "")
        process = self.context.Process(
            target=live, args=(case, theirs, str(log), self.rehearse, without, fault, self._limit(case))
        )
        process.start()
        theirs.close()
        now = time.monotonic()
        if fault == "hang" and not without:
            ends = min(ends, now + HANG_SECONDS)
        return _Process(case, stage, process, mine, log, ends, without, now)

    def _listen(self, running: list[_Process], deadline: float) -> None:
        """Take messages of the cases, until one has ended or is out of time."""
        everyone = [*running, *self.early.values()]
        if not everyone:
            return
        soon = min([deadline, *(one.ends for one in running)]) - time.monotonic()
        by_pipe = {one.pipe: one for one in everyone}
        for pipe in multiprocessing.connection.wait(list(by_pipe), timeout=max(0.01, min(soon, 1.0))):
            self._hear(by_pipe[pipe], running)  # type: ignore[index]
        for one in running:
            if one.ended is None and time.monotonic() >= one.ends:
                one.ended = f"stopped after {time.monotonic() - one.began:.0f} s"
                self._kill(one)
        for name, one in list(self.early.items()):
            if one.ended is not None:  # it ended before its turn: write its row
                del self.early[name]
                self._finish(one, 0.0)

    def _hear(self, one: _Process, running: list[_Process]) -> None:
        try:
            what, given = one.pipe.recv()
        except (EOFError, OSError):
            one.process.join(5)
            code = one.process.exitcode
            one.ended = f"killed by signal {-code}" if code is not None and code < 0 else f"ended with exit code {code}"
            return
        if what == "row":
            self._add(one, given)
        elif what == "at":
            one.contender = given
        elif what == "turn":
            one.waits = one not in running
            if not one.waits:
                self._reply(one)
        elif what in ("quiet", "loud"):
            for early in self.early.values():
                self._signal(early, signal.SIGSTOP if what == "quiet" else signal.SIGCONT)
            self._reply(one)
        else:
            one.ended = "" if what == "done" else given

    def _finish(self, one: _Process, deadline: float) -> _Process | None:
        """Clean up after a case; if there is time, start it again without the contender that ended it."""
        self._kill(one)
        for early in self.early.values():  # the case may have ended while they were paused
            self._signal(early, signal.SIGCONT)
        if one.log.exists():
            text = one.log.read_bytes()[-LOG_BYTES:].decode(errors="replace")
            if text.strip():
                with self.log.open("a", encoding="utf-8") as file:
                    file.write(f"== {one.stage} / {one.case.name}\n{text.rstrip()}\n")
            one.log.unlink()
        if not one.ended:
            return None
        known = {key: value for key, value in one.case.options.items() if isinstance(value, (str, int))}
        self._add(one, {**known, "contender": one.contender, "note": one.ended})
        again = one.contender and len(one.without) + 1 < TRIES and time.monotonic() < deadline - 1
        if not again:
            return None
        ends = min(time.monotonic() + self._limit(one.case), deadline)
        return self._start(one.stage, one.case, ends, (*one.without, one.contender))

    def _add(self, one: _Process, row: Row) -> None:
        self.rows.add({"stage": one.stage, "case": one.case.name, **row})
        if row.get("note") or not one.case.together:
            self.say(f"{one.stage} / {one.case.name}: {short(row)}")

    def _note(self, stage: str, case: Case, note: str) -> None:
        one = self.early.pop(case.name, None)
        if one is not None:
            self._kill(one)
        self.rows.add({"stage": stage, "case": case.name, "note": note})
        self.say(f"{stage} / {case.name}: {note}")

    def _reply(self, one: _Process) -> None:
        with contextlib.suppress(OSError):
            one.pipe.send(None)

    def _signal(self, one: _Process, number: int) -> None:
        """Send a signal to the case and the processes it started: ``live`` made them a process group."""
        try:
            os.killpg(one.process.pid, number)
        except ProcessLookupError:  # it has not made its group yet
            with contextlib.suppress(ProcessLookupError):
                os.kill(one.process.pid, number)

    def _kill(self, one: _Process) -> None:
        self._signal(one, signal.SIGKILL)
        one.process.join(5)
        one.pipe.close()


def short(row: Row) -> str:
    """A row in a few words, for the lines of progress."""
    names = [str(row[key]) for key in ("op", "product", "contender", "dtype", "direction", "tile") if row.get(key)]
    figures = [f"{key} {row[key]:.4g}" for key in ("ms", "error", "over_limit") if isinstance(row.get(key), float)]
    return " ".join([*names, *figures, str(row.get("note") or "")]).strip()[:150] or "done"


def say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)

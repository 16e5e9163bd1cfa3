"""One case of gpu_check.py, and its side of the talk with the runner.

A case is a generator of rows. It runs in a process of its own, forked from a server that has imported torch already, so
its start costs a fraction of a second. Rows go to the runner as they come: a crash loses only what follows it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Case:
    """What to run.

    Attributes:
        name: unique in its stage.
        work: "module:function" of this folder.
        options: keyword arguments of that function.
        seconds: its time limit.
        together: nothing is timed, so it runs beside others of its kind.
        early: it starts with the first stage, prepares beside the others, and waits for its turn (``Job.turn``).
    """

    name: str
    work: str
    options: dict[str, Any]
    seconds: float
    together: bool = False
    early: bool = False


class Job:
    """What a case's function gets: the device, the clock, and a line to the runner.

    Args:
        pipe: to the runner.
        rehearse: run on the CPU, tiny.
        without: contenders that ended an earlier try of this case.
        fault: "kill", "hang" or "wrong": what to do to the first contender, to rehearse it. "" for nothing.
        seconds: the time limit.
    """

    def __init__(self, pipe: Connection, rehearse: bool, without: tuple[str, ...], fault: str, seconds: float) -> None:
        import torch

        self.pipe, self.tiny, self.without, self.fault = pipe, rehearse, without, fault
        self.device = "cpu" if rehearse else "cuda"
        self.dtype = torch.float32 if rehearse else torch.bfloat16  # Triton's interpreter has no bfloat16
        self.precision = "fp32" if rehearse else "bf16"
        self.contender = ""
        self.end = time.monotonic() + seconds

    def left(self) -> float:
        return self.end - time.monotonic()

    def at(self, contender: str) -> None:
        """Say what runs next: if this process dies, the runner tries the case again without it."""
        self.contender = contender
        self.pipe.send(("at", contender))
        fault = self.fault if contender and not self.without else ""
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            time.sleep(1)

    @contextlib.contextmanager
    def trying(self, contender: str, row: Row) -> Iterator[None]:
        """Note a contender's exception in its row and go on, unless the GPU is lost to this process."""
        import measuring

        self.at(contender)
        try:
            yield
        except Exception as error:
            traceback.print_exc()
            row["note"] = measuring.failure(error)
            if self.lost():
                raise
        self.at("")

    def lost(self) -> bool:
        """Whether an error of the GPU makes every later call of this process fail."""
        import torch

        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def wrong(self, result: Any) -> Any:
        """A result as it is; falsified if that is rehearsed."""
        if self.fault != "wrong":
            return result
        self.fault = ""
        return tuple(1.5 * part for part in result) if isinstance(result, (tuple, list)) else 1.5 * result

    def turn(self) -> None:
        """Wait until the runner has come to this case; an early one prepares before."""
        self._ask("turn")

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """Nothing else runs inside: the runner stops the case that prepares in the background."""
        self._ask("quiet")
        try:
            yield
        finally:
            self._ask("loud")

    def _ask(self, what: str) -> None:
        self.pipe.send((what, None))
        self.pipe.recv()

    def measure(self, contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
        """``measuring.measure`` of the contenders, in turn; each is announced before its first call."""
        import measuring

        announced: set[str] = set()

        def call_of(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
            def called() -> Any:
                if name not in announced:
                    announced.add(name)
                    self.at(name)
                return call()

            return called

        calls = {name: call_of(name, call) for name, call in contenders.items() if name not in self.without}
        with self.quiet():
            found = measuring.measure(calls, self.device, min(seconds, self.left()))
        if self.lost():
            raise RuntimeError(f"the GPU was lost at {self.contender}")
        self.at("")
        return found

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """Median time of one call, caches cold; on a CPU the time of one call."""
        if self.device == "cpu":
            begin = time.perf_counter()
            call()
            return 1e3 * (time.perf_counter() - begin)
        from triton.testing import do_bench

        with self.quiet():
            return float(do_bench(call, warmup=5, rep=20, return_mode="median"))


def live(
    case: Case, pipe: Connection, log: str, rehearse: bool, without: tuple[str, ...], fault: str, seconds: float
) -> None:
    """The whole life of a case, in its own process: its output goes to ``log``, its rows through the pipe."""
    with contextlib.suppress(OSError):
        os.setsid()  # so that the runner can end what it starts as well
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    job: Job | None = None
    try:
        import measuring
        import torch

        torch.manual_seed(0)
        measuring.SWIN_WARM_UPS, measuring.SWIN_RUNS, measuring.CPU_RUNS = 10, 20, 2
        if rehearse:
            torch.set_num_threads(1)
        job = Job(pipe, rehearse, without, fault, seconds)
        module, function = case.work.split(":")
        for row in getattr(importlib.import_module(f"gpu.{module}"), function)(job, **case.options):
            pipe.send(("row", row))
        pipe.send(("done", None))
    except Exception as error:
        traceback.print_exc()
        from measuring import failure

        pipe.send(("failed", failure(error)))
    finally:
        pipe.close()

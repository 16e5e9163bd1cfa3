"""One case of gpu_check.py, in its own process, and its side of the pipe to the runner.

A case is a generator of rows. Its process is forked from a server that has imported torch already, so it starts within
a fraction of a second. Each row goes to the runner at once: a crash loses only the rows after it.
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
    """A case to run.

    Attributes:
        name: unique in its stage.
        work: its function, as "module:function" in this folder.
        options: keyword arguments of that function.
        seconds: its time limit.
        together: it times nothing, so it runs together with others of this kind.
        early: it starts with the first stage, prepares in the background and waits for its turn (``Job.turn``).
    """

    name: str
    work: str
    options: dict[str, Any]
    seconds: float
    together: bool = False
    early: bool = False


class Job:
    """What a case's function gets: the device, the time left and the connection to the runner.

    Args:
        pipe: to the runner.
        rehearse: run on the CPU at tiny sizes.
        without: contenders that ended earlier tries of this case.
        fault: "kill", "hang" or "wrong", to rehearse that the first contender fails like this; "" for none.
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
        """Announce the next contender: if this process dies, the runner runs the case again without it."""
        self.contender = contender
        self.pipe.send(("at", contender))
        fault = self.fault if contender and not self.without else ""
        if fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        while fault == "hang":
            time.sleep(1)

    @contextlib.contextmanager
    def trying(self, contender: str, row: Row) -> Iterator[None]:
        """Write a contender's exception into its row and go on, unless this process can no longer use the GPU."""
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

    def attempt(self, contender: str, row: Row, call: Callable[..., Any], *args: Any) -> Any:
        """``call(*args)``; None if the contender ended an earlier try, or if it raises, which its row says."""
        if contender in self.without:
            return None
        with self.trying(contender, row):
            return call(*args)
        return None

    def lost(self) -> bool:
        """Whether a GPU error makes every later call of this process fail."""
        import torch

        if self.device != "cuda":
            return False
        try:
            torch.cuda.synchronize()
        except Exception:
            return True
        return False

    def wrong(self, result: Any) -> Any:
        """The result, or a false one if that fault is rehearsed."""
        if self.fault != "wrong":
            return result
        self.fault = ""
        return tuple(1.5 * part for part in result) if isinstance(result, (tuple, list)) else 1.5 * result

    def turn(self) -> None:
        """Wait for the turn of this case; an early case prepares before."""
        self._ask("turn")

    @contextlib.contextmanager
    def quiet(self) -> Iterator[None]:
        """A block in which nothing else runs: the runner pauses the case that prepares in the background."""
        self._ask("quiet")
        try:
            yield
        finally:
            self._ask("loud")

    def _ask(self, what: str) -> None:
        self.pipe.send((what, None))
        self.pipe.recv()

    def measure(self, contenders: dict[str, Callable[[], Any]], seconds: float) -> dict[str, dict[str, Any]]:
        """``measuring.measure``, with each contender announced before its first call."""
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
            raise RuntimeError(f"{self.contender} left the GPU unusable")
        self.at("")
        return found

    def milliseconds(self, call: Callable[[], Any]) -> float:
        """The median time of a call, replayed from a CUDA graph; on a CPU the time of one call."""
        from xclip_fast.kernels.tune import measuring

        measuring.DEVICE = self.device
        with self.quiet():
            return measuring.milliseconds(call)


def live(
    case: Case, pipe: Connection, log: str, rehearse: bool, without: tuple[str, ...], fault: str, seconds: float
) -> None:
    """Run a case in this process: its output goes to ``log``, its rows through the pipe."""
    with contextlib.suppress(OSError):
        os.setsid()  # so that the runner can also kill what the case starts
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

"""The measurements of training steps. They are copied to the host without waiting, summed, and logged.

B videos of a batch.
"""

from __future__ import annotations

import collections
import dataclasses
import math
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..inference.processes import Process
from . import log as training_log

LAG = 4  # steps from a measurement on a GPU to its reading, so that the host never waits; a CPU's is read at once


class Diverged(ValueError):
    """The loss or the gradient is not finite. The message names the step and the videos."""


class Measured:
    """The measurements of one step, on their way from the device to the host."""

    def __init__(self, step: int, rate: float) -> None:
        self.step, self.rate, self.waited = step, rate, 0.0
        self.norm: Tensor | None = None
        self.parts: list[tuple[Tensor, Tensor, Tensor]] = []
        self.event: Any = None

    def wait(self, batches: Iterator[Any]) -> Any:
        before = time.perf_counter()
        batch = next(batches)
        self.waited += time.perf_counter() - before
        return batch

    def add(self, losses_B: Tensor, correct_B: Tensor, samples_B: Tensor) -> None:
        self.parts.append((losses_B.detach(), correct_B, samples_B))

    def send(self, device: torch.device, world: int, wishes: tuple[bool, bool]) -> Measured:
        """Start the copies. Sums are over all processes, so all processes decide alike."""
        losses, correct, samples = (torch.cat(column) for column in zip(*self.parts, strict=True))
        self.parts.clear()
        norm = losses.new_zeros(()) if self.norm is None else self.norm.to(device) / world
        known = torch.tensor([len(losses), *wishes], dtype=torch.float32, pin_memory=device.type == "cuda")
        sums = torch.cat([torch.stack([losses.sum(), correct.sum(), norm]), known.to(device, non_blocking=True)])
        if world > 1:
            dist.all_reduce(sums)
        host = (values.to("cpu", non_blocking=True) for values in (sums, losses, samples))  # into pinned memory
        self.sums, self.losses, self.samples = host
        self.sent = time.monotonic()
        if device.type == "cuda":
            self.event = torch.cuda.Event()
            self.event.record()
        return self


@dataclasses.dataclass
class Meter:
    """Reads measurements, those of a GPU ``LAG`` steps late, and writes the records.

    ``save`` and ``stop`` say what all processes agreed on.
    """

    records: training_log.Log
    process: Process
    name_of: Callable[[int], str]  # the name of a training video, by its row
    _: dataclasses.KW_ONLY
    step: int  # steps done
    steps: int  # of the whole run
    epoch_steps: int  # of one epoch
    log_every: int  # steps from one record to the next
    save_minutes: float | None  # from one checkpoint to the next that ``wishes`` asks for; None: it asks for none
    with_norm: bool  # records have the gradient's norm

    def __post_init__(self) -> None:
        self.pending: collections.deque[Measured] = collections.deque()
        self.save = self.stop = self.asked = False
        self.signal = 0  # the number of the signal that asks to end
        self.saved_at = self.begun = time.monotonic()
        self.spent, self.counted = 0.0, 0  # seconds and steps of training so far
        self.restart()

    def restart(self) -> None:
        """Begin a new interval. The time since the last step (a validation, a checkpoint) does not count."""
        self.begun = time.monotonic()
        self.loss = self.correct = self.rows = self.waited = self.norm = 0.0
        self.n = 0

    def wishes(self) -> tuple[bool, bool]:
        """(save, stop) as this process wants them. They travel with a step's measurements."""
        minutes = self.save_minutes
        if minutes and self.process.rank == 0 and not self.asked and time.monotonic() - self.saved_at > 60 * minutes:
            self.asked = True
            return True, self.signal > 0
        return False, self.signal > 0

    def saved(self) -> None:
        self.save = self.asked = False
        self.saved_at = time.monotonic()

    def take(self, measured: Measured) -> None:
        self.pending.append(measured)
        # a single process need not agree with others: it reads all at once and ends after this step
        ends = self.signal and self.process.world == 1
        late = LAG if self.process.device.type == "cuda" and not ends else 0
        while len(self.pending) > late:
            self._read(self.pending.popleft())

    def read_all(self) -> None:
        while self.pending:
            self._read(self.pending.popleft())

    def _read(self, measured: Measured) -> None:
        if measured.event is not None:
            measured.event.synchronize()
        loss, correct, norm, rows, save, stop = measured.sums.tolist()
        self.save, self.stop = self.save or save > 0, self.stop or stop > 0
        if not (math.isfinite(loss) and math.isfinite(norm)):
            raise Diverged(self._diverged(measured, loss, norm))
        self.loss, self.correct, self.rows = self.loss + loss, self.correct + correct, self.rows + rows
        self.norm = norm
        self.waited, self.n, self.step = self.waited + measured.waited, self.n + 1, measured.step + 1
        if self.step % self.log_every and self.step % self.epoch_steps and self.step != self.steps:
            return
        elapsed = max(measured.sent - self.begun, 1e-9)
        self.spent, self.counted = self.spent + elapsed, self.counted + self.n
        record = {
            "kind": "train",
            "step": self.step,
            "epoch": measured.step // self.epoch_steps + 1,
            "loss": self.loss / max(1.0, self.rows),
            "correct": self.correct / max(1.0, self.rows),
            "lr": measured.rate,
            "clips_per_second": self.rows / elapsed,
            "data_wait": min(1.0, self.waited / elapsed),
            "memory": training_log.memory(self.process.device),
            "eta": (self.steps - self.step) * self.spent / self.counted,
        }
        self.records.write(record | ({"norm": self.norm} if self.with_norm else {}))
        self.restart()
        self.begun = measured.sent

    def _diverged(self, measured: Measured, loss: float, norm: float) -> str:
        bad = ~measured.losses.isfinite()
        rows = measured.samples[bad if bad.any() else ...].tolist()
        everywhere: list[Any] = [(bool(bad.any()), rows)]
        if self.process.world > 1:
            everywhere = [None] * self.process.world
            dist.all_gather_object(everywhere, (bool(bad.any()), rows))
        some = any(has for has, _ in everywhere)
        guilty = [row for has, found in everywhere if has or not some for row in found]
        names = ", ".join(f"{row} ({self.name_of(row)})" for row in guilty[:8])
        what = f"the loss is {loss}" if not math.isfinite(loss) else f"the gradient's norm is {norm}"
        return (
            f"step {measured.step + 1}: {what}; videos of that step: {names}"
            + (f" and {len(guilty) - 8} more" if len(guilty) > 8 else "")
            + ". Try a lower optim.lr, optim.clip_grad=1 or precision=fp32"
        )

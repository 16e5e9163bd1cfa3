"""Batches of decoded videos for training and evaluation: `loader`.

The videos of a batch, their frames, crops and colors depend on (seed, epoch, row) alone. So an epoch is the same with
any number of workers, on any number of ranks with the same global batch, and after a resume at any batch. Every usable
video comes exactly once an epoch. A video that cannot be decoded makes its batch shorter and is named in the report. No
other video replaces it.

Sizes: B videos, V views, T frames, S pixels a side.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import logging
import math
import os
import weakref
from collections.abc import Generator, Iterator
from typing import Any, Literal

import numpy as np
import torch

from ..decode.dali_support import missing
from ..manifest.manifest import Manifest
from ..sampling import epoch_batches, epoch_order
from ..threads import processes_and_threads
from .batches import Batch, DataError, Report, moved
from .tasks import Decoder, Task, sample_shape
from .workers import Workers, check_shared_memory

log = logging.getLogger(__name__)


class Loader:
    """The batches of a manifest's videos, by the fastest way of this machine.

    With a CUDA device and NVIDIA DALI, DALI decodes; otherwise PyAV decodes in processes. Iterating gives the batches
    of one epoch and then raises `epoch` by one. The length is in batches. If an iteration is broken off, `epoch` stays,
    and the next iteration starts that epoch over, unless a state of `state_dict` is loaded. A new iteration ends the
    one before. Workers live from epoch to epoch, until `close` or until an iteration is broken off.

    Args:
        manifest: the videos, or the path of their manifest (`manifest.index`).
        transform: `TrainTransform`, `TestTransform` or another object with `views`, best a dataclass: a resumed run
            compares the `repr`. With `random = False` it gets no random numbers.
        batch_size: videos of a batch on this rank.
        device: of the batches; "auto": CUDA if there is one.
        decoder: "dali" or "cpu" allows only that one.
        rank, world: this process takes every world-th of each batch_size * world videos, from number `rank` on. The
            last batch may be shorter, on some ranks perhaps empty.
        workers, threads: processes, and threads in each. By default there are two threads for each core of this process
            (the machine's cores over LOCAL_WORLD_SIZE), four in a process. workers=0 decodes in threads of this
            process, without prefetching and without protection from files that crash or hang the decoder.
        prefetch: the most batches that each worker prepares in advance. It bounds the memory.
        max_bad: share of the usable videos that may be unreadable; more raise DataError. One unreadable video is always
            allowed unless it is 0. Videos that the index lists as bad are never tried and do not count. An evaluation
            may take 1.0 and report "n of m" (`Report.summary`).
        timeout: seconds that one video may take before the decoder counts as hung.

    Raises:
        ValueError: for a bad argument. ImportError: for decoder="dali" without DALI. RuntimeError: if /dev/shm cannot
        hold a batch. Iterating raises DataError; see `max_bad`.
    """

    def __init__(
        self,
        manifest: Manifest | str | os.PathLike[str],
        transform: Any,
        batch_size: int,
        *,
        device: str | torch.device = "auto",
        decoder: Literal["auto", "dali", "cpu"] = "auto",
        seed: int = 0,
        shuffle: bool = False,
        rank: int = 0,
        world: int = 1,
        workers: int | None = None,
        threads: int | None = None,
        prefetch: int = 2,
        max_bad: float = 0.05,
        timeout: float = 60.0,
    ) -> None:
        if not isinstance(manifest, Manifest):
            manifest = Manifest.read(manifest)
        place = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        if place.type == "cuda" and not torch.cuda.is_available():
            raise ValueError(f"device is {str(device)!r}, and torch sees no CUDA device; use device='auto' or 'cpu'")
        counts = [("batch_size", batch_size, 1), ("prefetch", prefetch, 1), ("world", world, 1)]
        counts += [("workers", 0 if workers is None else workers, 0), ("threads", 1 if threads is None else threads, 1)]
        for name, value, least in counts:
            if value < least:
                raise ValueError(f"{name} is {value}; it must be at least {least}")
        if not 0 <= rank < world:
            raise ValueError(f"rank is {rank}; it must lie from 0 to world - 1 = {world - 1}")
        if not 0 <= max_bad <= 1:
            raise ValueError(f"max_bad is {max_bad}; a share from 0 to 1 is wanted")
        if not timeout > 0:
            raise ValueError(f"timeout is {timeout}; a positive number of seconds is wanted")
        if decoder not in ("auto", "dali", "cpu"):
            raise ValueError(f"decoder is {decoder!r}; it must be 'auto', 'dali' or 'cpu'")
        on_gpu = place.type == "cuda"
        refused = missing() if on_gpu else f"DALI is for CUDA devices, and the device is {place}"
        if decoder == "dali" and refused:
            raise (ImportError if on_gpu else ValueError)(f"decoder='dali': {refused}")
        if decoder == "auto" and refused and on_gpu:
            log.info("videos are decoded on the CPU: %s", refused)
        workers, threads = processes_and_threads(workers, threads)
        dali = decoder != "cpu" and not refused
        if not dali:
            check_shared_memory(batch_size * math.prod(sample_shape(transform)), workers, prefetch)
        make = Decoder(transform, seed, threads, workers)
        self.manifest, self.batch_size, self.device = manifest, batch_size, place
        self.decoder: Literal["dali", "cpu"] = "dali" if dali else "cpu"
        self.workers, self._max_bad = Workers(make, workers, prefetch, on_gpu, timeout), max_bad
        self._shuffle, self._rank, self._world = shuffle, rank, world
        self._usable = manifest.usable
        self._epoch, self._start, self._consumed = 0, 0, 0
        self._active: weakref.ref[Generator[Batch, None, None]] | None = None
        self._routes: dict[int, str | None] = {}  # row -> the reason why the CPU decodes it, or None
        self._reasons: dict[tuple[str, str | None], str] = {}  # of bad videos: (path, member) -> reason
        self._distinct = len({self._identify(row) for row in self._usable.tolist()})
        self.report = Report(manifest.name)
        for row, reason in manifest.bad.items():
            self._enter(row, reason)
        self._of_index = len(self._reasons)
        self._new_report(self._batches(0), 0)
        weakref.finalize(self, self.workers.close)

    @property
    def epoch(self) -> int:
        """The epoch of the present or next iteration. It may be set."""
        return self._epoch

    @epoch.setter
    def epoch(self, epoch: int) -> None:
        if epoch < 0:
            raise ValueError(f"epoch is {epoch}; it must not be negative")
        self._epoch, self._start, self._consumed = epoch, 0, 0

    def __len__(self) -> int:
        return -(-len(self._usable) // (self.batch_size * self._world))

    def __iter__(self) -> Iterator[Batch]:
        self._end()
        first, self._start = self._start, 0
        batches = self._batches(self._epoch)
        self._consumed = first
        self._new_report(batches, first)
        generator = self._iterate(self._epoch, batches, first)
        self._active = weakref.ref(generator)
        return generator

    def state_dict(self) -> dict[str, Any]:
        """The state to resume from, as plain data: the next batch is the one after the last that was delivered.

        It is the same on all ranks, except for `bad`. It fits any number of ranks with the same global batch.
        """
        return {**self._identity(), "epoch": self._epoch, "batches": self._consumed, "bad": dict(self.report.bad)}

    def seek(self, epoch: int, batch: int) -> None:
        """Makes the next iteration begin with this batch of this epoch. Both count from 0.

        Raises:
            ValueError: if the epoch is negative, or has fewer batches.
        """
        if not 0 <= batch <= len(self):
            raise ValueError(f"batch is {batch}; an epoch has {len(self)} batches")
        self.epoch = epoch
        self._start = self._consumed = batch
        self._new_report(self._batches(epoch), batch)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Resumes a saved state. Raises ValueError if it belongs to another dataset, seed, batch size or transform."""
        for name, here in self._identity().items():
            if state.get(name) != here:
                raise ValueError(
                    f"this state belongs to another dataset or order: its {name} is {state.get(name)!r}, here it is "
                    f"{here!r}. Resume with the old data and settings, or start a new run"
                )
        for row, reason in state.get("bad", {}).items():
            self._enter(int(row), reason)
        self._check()
        self.seek(state["epoch"], state["batches"])

    def quarantined(self) -> Manifest:
        """The manifest with an error at every video that was found bad. Write it to a file for the next run."""
        return self.manifest.with_errors(self.report.bad)

    def close(self) -> None:
        """Ends the iteration and the workers. Both start again when they are needed."""
        self._end()
        self.workers.close()

    def _end(self) -> None:
        iteration = None if self._active is None else self._active()
        if iteration is not None:
            iteration.close()

    def _identity(self) -> dict[str, Any]:
        make = self.workers.decoder
        kind = type(make.transform)
        known = dataclasses.is_dataclass(kind)
        return {
            "fingerprint": self._fingerprint,
            "transform": repr(make.transform) if known else f"{kind.__module__}.{kind.__qualname__}",
            "seed": make.seed,
            "global_batch": self.batch_size * self._world,
            "shuffle": self._shuffle,
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        # Rows that the index lists as bad are not in the order, so the order depends on them.
        usable = hashlib.blake2b(self._usable.tobytes(), digest_size=8)
        return f"{self.manifest.fingerprint} {usable.hexdigest()}"

    def _batches(self, epoch: int) -> list[np.ndarray]:
        order = epoch_order(len(self._usable), self.workers.decoder.seed, epoch, self._shuffle)
        return epoch_batches(self._usable[order], self.batch_size, self._rank, self._world)

    def _new_report(self, batches: list[np.ndarray], done: int) -> None:
        """Starts the report of an epoch of which `done` batches were delivered before, except for bad videos."""
        bad = self.report.bad
        of_index = range(self._rank, len(self.manifest) - len(self._usable), self._world)
        delivered = sum(int(row) not in bad for rows in batches[:done] for row in rows)
        self.report = Report(self.manifest.name, sum(map(len, batches)) + len(of_index), delivered, bad)

    def _iterate(self, epoch: int, batches: list[np.ndarray], first: int) -> Generator[Batch, None, None]:
        start = self._on_gpu if self.decoder == "dali" else self._on_cpu
        with contextlib.closing(start(epoch, batches[first:])) as stream:
            for batch in stream:
                self._consumed += 1  # before the step on it: a state saved in that step comes after it
                self.report.delivered += len(batch.samples)
                yield batch
        self.epoch = epoch + 1

    def _on_cpu(self, epoch: int, batches: list[np.ndarray]) -> Generator[Batch, None, None]:
        def make(rows: np.ndarray) -> Task:
            good = self._good(rows)
            return Task(epoch, good, self.manifest.select(good))

        copies = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        with contextlib.closing(self.workers.results(batches, make, self._bad)) as results:
            for result in results:
                for row, reason in result.bad.items():
                    self._bad(row, reason)
                frames = result.frames[:, 0] if result.frames.shape[1] == 1 else result.frames
                parts = (frames, torch.from_numpy(self.manifest.labels[result.rows]), torch.from_numpy(result.rows))
                yield Batch(*(parts if copies is None else moved(parts, self.device, copies)))

    def _on_gpu(self, epoch: int, batches: list[np.ndarray]) -> Generator[Batch, None, None]:
        from .dali import dali_batches

        make = self.workers.decoder
        return dali_batches(
            self.manifest,
            make.transform,
            [self._good(rows) for rows in batches],
            seed=make.seed,
            epoch=epoch,
            device=self.device,
            workers=max(1, self.workers.workers) * make.threads,
            time_limit=self.workers.timeout,
            routes=self._routes,
            on_bad=self._bad,
        )

    def _good(self, rows: np.ndarray) -> np.ndarray:
        """These rows without the known bad videos. Those are entered in the report."""
        if not self._reasons:
            return rows
        good: list[int] = []
        for row in rows.tolist():
            reason = self._reasons.get(self._identify(row))
            if reason is None:
                good.append(row)
            else:
                self._bad(row, reason)
        return np.array(good, np.int64)

    def _identify(self, row: int) -> tuple[str, str | None]:
        video = self.manifest.videos[row]
        return video.path, video.member

    def _bad(self, row: int, reason: str) -> None:
        """Enters a bad video and logs it the first time. Raises DataError if there are too many."""
        if self._enter(row, reason):
            log.warning("%s: left out: %s", self.manifest.name(row), reason)
            self._check()

    def _enter(self, row: int, reason: str) -> bool:
        """Enters a bad video in the report. Returns True if it is new."""
        video = self._identify(row)
        is_new = video not in self._reasons
        self.report.bad[row] = reason
        self._reasons.setdefault(video, reason)
        return is_new

    def _check(self) -> None:
        found = len(self._reasons) - self._of_index
        if found > max(1 if self._max_bad else 0, self._max_bad * self._distinct):
            raise DataError(
                f"{found} of {self._distinct} videos could not be read, more than the {self._max_bad:.1%} that max_bad "
                f"allows: {self.report.listed()}. Check that the data folder is complete and lies at "
                f"{self.manifest.root}. Run `xclip-fast index` again: videos that it lists as bad are left out. "
                "max_bad allows more"
            )


loader = Loader  # used as a function: `for batch in loader(...)`

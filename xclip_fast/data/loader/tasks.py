"""The work of one worker process: a task in, its decoded batch out, and a shared table of the videos in work.

A task holds the rows of its videos (some hundred bytes each), so workers need no manifest.
"""

from __future__ import annotations

import functools
import queue
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import get_worker_info

from ..decode.decoder import decode_views
from ..decode.source import VideoError
from ..decode.video import DamagedPlan, Video, one_line
from ..manifest.manifest import Manifest
from ..sampling import sample_rng
from ..transforms import View


def draw_views(transform: Any, video: Video, seed: int, epoch: int, row: int) -> list[View]:
    """The transform's views of the video in this row, in this epoch. Raises VideoError for a row without facts."""
    if min(video.frames, video.width, video.height) < 1:
        raise VideoError("the manifest has no facts about it; index the data again")
    rng = sample_rng(seed, epoch, row) if getattr(transform, "random", True) else None
    return transform.views(video.frames, video.width, video.height, rng)


def sample_shape(transform: Any) -> tuple[int, ...]:
    """(V, T, S, S, 3) of one sample. It is the same for every video, so it is asked for any."""
    views = draw_views(transform, Video("", frames=64, width=64, height=64), 0, 0, 0)
    return len(views), len(views[0].frames), views[0].size, views[0].size, 3


class Task(NamedTuple):
    """A batch to decode. `rows` are numbers in the whole manifest; `manifest` holds just these videos, in order."""

    epoch: int
    rows: np.ndarray
    manifest: Manifest


class Result(NamedTuple):
    """A batch: frames uint8 (B, V, T, S, S, 3) of `rows`, and the reasons for missing rows (`bad`).

    `failure` is the traceback of an error that is not a video's fault.
    """

    frames: torch.Tensor
    rows: np.ndarray
    bad: dict[int, str]
    failure: str | None


class Table:
    """The video that each thread of each worker is decoding. It lies in shared memory and outlives the worker.

    `cells`: int64 (workers, threads, 2), the row or -1, and the start (monotonic ns, one clock for all processes).
    `counts`: int64 (workers,), the number of videos that each worker has begun. `ended`: bool (1,), whether the workers
    should decode no further videos.
    """

    def __init__(self, workers: int, threads: int) -> None:
        self.cells = torch.full((workers, threads, 2), -1, dtype=torch.int64).share_memory_()
        self.counts = torch.zeros(workers, dtype=torch.int64).share_memory_()
        self.ended = torch.zeros(1, dtype=torch.bool).share_memory_()

    def begin(self, worker: int, thread: int, row: int) -> None:
        cells = self.cells.numpy()
        cells[worker, thread, 1] = time.monotonic_ns()
        cells[worker, thread, 0] = row
        self.counts.numpy()[worker] += 1

    def end(self, worker: int, thread: int) -> None:
        self.cells.numpy()[worker, thread, 0] = -1

    def busy(self, worker: int, seconds: float = 0.0) -> list[int]:
        """The rows that this worker has been decoding for at least so many seconds."""
        rows, since = self.cells[worker].unbind(1)
        return rows[(rows >= 0) & (since <= time.monotonic_ns() - int(seconds * 1e9))].tolist()


class Decoder:
    """The dataset for torch's DataLoader: it turns a task into a result. It is pickled once for each worker."""

    def __init__(self, transform: Any, seed: int, threads: int, workers: int) -> None:
        self.transform, self.seed, self.threads = transform, seed, threads
        self.shape = sample_shape(transform)
        self.table = Table(max(1, workers), threads)

    @functools.cached_property
    def _pool(self) -> ThreadPoolExecutor:
        """The threads of this process. With workers, the parent has none, so they are never pickled."""
        return ThreadPoolExecutor(self.threads, thread_name_prefix="decode")

    def decode(self, task: Task) -> Result:
        """Decodes a batch with threads of this process."""
        info = get_worker_info()
        worker = info.id if info else 0
        frames = torch.empty(len(task.rows), *self.shape, dtype=torch.uint8)
        out = frames.numpy()
        slots: queue.SimpleQueue[int] = queue.SimpleQueue()  # places in the table
        for slot in range(self.threads):
            slots.put(slot)

        def one(place: int) -> str:
            if self.table.ended:
                return ""  # nobody waits for this batch
            slot = slots.get()
            self.table.begin(worker, slot, int(task.rows[place]))
            try:
                return self.one(task, place, out[place])
            finally:
                self.table.end(worker, slot)
                slots.put(slot)

        try:
            found = list(self._pool.map(one, range(len(out))))
        except Exception:  # the parent raises it, with this traceback
            return Result(frames[:0], task.rows[:0], {}, traceback.format_exc())
        bad = {int(row): reason for row, reason in zip(task.rows, found, strict=True) if reason}
        if not bad:
            return Result(frames, task.rows, bad, None)
        good = np.array([not reason for reason in found])
        return Result(frames[torch.from_numpy(good)], task.rows[good], bad, None)

    __getitems__ = decode  # the name that DataLoader calls

    def one(self, task: Task, place: int, out: np.ndarray) -> str:
        """Decodes one video of a task into `out`, uint8 (V, T, S, S, 3). Returns "", or the reason of a failure."""
        source = None
        try:
            source = task.manifest.source(place)
            row, video = int(task.rows[place]), task.manifest.videos[place]
            decode_views(source, draw_views(self.transform, video, self.seed, task.epoch, row), out=out)
        except (VideoError, DamagedPlan, IndexError, OSError, MemoryError) as error:
            return one_line(str(error).removeprefix(f"{source}: ")) or type(error).__name__
        return ""

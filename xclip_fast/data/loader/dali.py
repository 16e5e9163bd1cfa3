"""Batches decoded and cropped on the GPU with NVIDIA DALI 2: H.264 and HEVC by the decoder chip, the rest by kernels.

DALI decodes only videos that it is known to decode correctly. `supported` gives the reason for the others: they are
decoded on the CPU by `decode_views` and take their places in the batch, as do the videos of a failed run. So the
samples, their order, frames, boxes, mirrors and colors are those of the CPU path. The pixels of DALI's CPU operators
differ from it by at most one level. NVDEC may enlarge the color planes in another way, which shows at sharp edges.

NVDEC conceals damage inside a file silently. The CPU path decodes such a file again from end to end.
"""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, MutableMapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from ..decode.dali_support import container, require, supported
from ..decode.decoder import decode_views
from ..decode.source import File, Source, VideoError
from ..decode.video import DamagedPlan
from ..manifest.manifest import Manifest
from ..threads import Job, Threads, cores_of_rank
from ..transforms import View
from .batches import Batch
from .dali_graph import inputs_of, make_pipeline
from .tasks import draw_views, sample_shape

log = logging.getLogger(__name__)

_AHEAD = 3  # batches that are prepared while one is used
_STREAMS = 2  # pipelines that take turns
_MEMORY = 2 << 30  # bytes of full-size frames in a run of a pipeline; larger batches are split
_GIVE_UP = 5  # failed runs in a row without a bad file: then DALI itself is broken

_Sample = dict[str, np.ndarray] | np.ndarray
"""A prepared row: the inputs of DALI, or the views as decoded on the CPU, uint8 (V, T, S, S, 3)."""


def dali_batches(
    manifest: Manifest,
    transform: Any,
    batches: Iterable[np.ndarray],
    *,
    seed: int = 0,
    epoch: int = 0,
    device: str | torch.device = "cuda",
    workers: int | None = None,
    time_limit: float = 60.0,
    routes: MutableMapping[int, str | None] | None = None,
    on_bad: Callable[[int, str], None] | None = None,
) -> Generator[Batch, None, None]:
    """The batches of these rows of the manifest, in this order, decoded by DALI. `device="cpu"`: by its CPU operators.

    `workers` threads read files and decode the videos that DALI cannot. `routes` is kept from epoch to epoch: row ->
    the reason for the CPU, or None for DALI.

    A video that cannot be decoded is left out of its batch and passed to `on_bad(row, reason)`, which may raise an
    error to stop. If a run fails or takes longer than `time_limit` seconds, its samples are decoded on the CPU. A hung
    pipeline is left behind and replaced. If all samples of a failed run are good, they stay on the CPU.

    A batch may be DALI's own memory without a copy. It is freed together with the tensor, after the device has finished
    the work queued by then. Raises ImportError without DALI, and RuntimeError if DALI fails on good files.
    """
    require()
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    cores = cores_of_rank()
    todo = deque(np.asarray(rows, np.int64) for rows in batches)
    shape = sample_shape(transform)
    make = partial(
        make_pipeline,
        views=shape[0],
        size=shape[2],
        batch_size=max((len(rows) for rows in todo), default=0) or 1,
        threads=max(1, min(8, cores // _STREAMS)),
        device_id=device.index if device.type == "cuda" else None,
    )
    run = _Epoch(
        manifest=manifest,
        views=lambda row: draw_views(transform, manifest.videos[row], seed, epoch, row),
        device=device,
        shape=shape,
        readers=Threads(workers or cores, "video reader", lambda: None, time_limit),
        engines=Threads(_STREAMS, "dali", lambda: _Pipe(make), time_limit),
        routes={} if routes is None else routes,
        on_bad=on_bad or (lambda row, why: log.warning("%s: left out: %s", manifest.name(row), why)),
    )
    waiting: deque[_Pending] = deque()
    try:
        while todo or waiting:
            while todo and len(waiting) <= _AHEAD:
                waiting.append(run.begin(todo.popleft()))
            yield run.finish(waiting.popleft())
    finally:
        run.engines.close()
        run.readers.close()


class _Pending(NamedTuple):
    """A batch in preparation: a job for each row, and the runs of DALI as (places in the batch, job)."""

    rows: np.ndarray
    samples: list[Job]
    runs: list[tuple[list[int], Job]]


@dataclass(eq=False)
class _Epoch:
    """The steps from rows to a batch. Only `prepare`, `decode` and `run` run in other threads."""

    manifest: Manifest
    views: Callable[[int], list[View]]
    device: torch.device
    shape: tuple[int, ...]
    readers: Threads
    engines: Threads
    routes: MutableMapping[int, str | None]
    on_bad: Callable[[int, str], None]
    kinds: set[str] = field(default_factory=set)
    failures: int = 0

    def route(self, row: int, why: str) -> None:
        """Send the row to the CPU. The first of each kind of reason is logged."""
        self.routes[row] = why
        kind = why.split(":")[0]
        level = logging.DEBUG if kind in self.kinds else logging.WARNING
        self.kinds.add(kind)
        log.log(level, "%s: decoded on the CPU: %s", self.manifest.name(row), why)

    def begin(self, rows: np.ndarray) -> _Pending:
        """Start the jobs of a batch."""
        pending, room = _Pending(rows, [], []), _MEMORY
        groups: list[list[int]] = [[]]
        for place, row in enumerate(rows.tolist()):
            video = self.manifest.videos[row]
            if row not in self.routes:
                why = supported(video, gpu=self.device.type == "cuda")
                self.routes[row] = None
                if why is not None:
                    self.route(row, why)
            if self.routes[row] is None:
                frames = min(video.frames, self.shape[0] * self.shape[1])
                need = frames * video.width * video.height * 3
                if need > room and groups[-1]:
                    groups.append([])
                    room = _MEMORY
                room -= need
                groups[-1].append(place)
            pending.samples.append(self.readers.submit(Job(partial(self.prepare, row))))
        for places in filter(None, groups):
            jobs = [pending.samples[place] for place in places]
            pending.runs.append((places, self.engines.submit(Job(partial(self.run, jobs)))))
        return pending

    def prepare(self, row: int, _: object) -> _Sample:
        """Read the file for DALI, or decode it here. Raises VideoError and DamagedPlan."""
        video = self.manifest.videos[row]
        if video.error is not None:
            raise VideoError(video.error)
        if self.routes[row] is None:
            path = os.path.join(self.manifest.root, video.path)
            try:
                with contextlib.closing(File(Source(path, video.offset, video.size))) as file:
                    data = file.read(video.size + 1)  # not mapped: a file that shrinks under a map kills the process
                why = container(data[:8]) if len(data) == video.size else "has changed since it was indexed"
            except OSError as error:  # the CPU decoder has the better error, if the file is bad
                why = f"cannot be read: {error}"
            if why is None:
                return inputs_of(np.frombuffer(data, np.uint8), self.views(row), video.colorspace)
            self.route(row, why)
        return self.decode(row)

    def decode(self, row: int, _: object = None) -> _Sample:
        return decode_views(self.manifest.source(row), self.views(row))

    def run(self, jobs: list[Job], pipe: _Pipe) -> Any:
        """The views of those samples that DALI decodes, once all are ready: a DALI tensor (n, ...), or None."""
        ready = []
        for job in jobs:
            with contextlib.suppress(Exception):  # `collect` names it
                if isinstance(sample := self.readers.result(job), dict):
                    ready.append(sample)
        return pipe.run({name: [inputs[name] for inputs in ready] for name in ready[0]}) if ready else None

    def finish(self, pending: _Pending) -> Batch:
        """Wait for a batch, decode failed samples on the CPU, and assemble it."""
        found = [self.collect(job) for job in pending.samples]
        parts: list[tuple[list[int], torch.Tensor]] = []
        for places, job in pending.runs:
            places = [place for place in places if isinstance(found[place], dict)]
            try:
                tensor = self.engines.result(job)
            except (RuntimeError, MemoryError, TimeoutError) as error:
                for place, sample in zip(places, self.mend(pending.rows[places].tolist(), error), strict=True):
                    found[place] = sample
                continue
            if tensor is not None:
                parts.append((places, torch.from_dlpack(tensor)))
                self.failures = 0
        for row, sample in zip(pending.rows.tolist(), found, strict=True):
            if isinstance(sample, str):
                self.on_bad(row, sample)
        kept = [place for place, sample in enumerate(found) if not isinstance(sample, str)]
        rows = pending.rows[kept]
        return Batch(self.assemble(found, kept, parts), *map(self.move, (self.manifest.labels[rows], rows)))

    def collect(self, job: Job) -> _Sample | str:
        """The sample of a job of the readers, or the reason why the video cannot be decoded."""
        try:
            return self.readers.result(job)
        except (VideoError, DamagedPlan, TimeoutError, MemoryError) as error:
            return str(error) or "not enough memory to decode it"

    def mend(self, rows: list[int], error: Exception) -> list[_Sample | str]:
        """The samples of a failed run, decoded on the CPU."""
        why = f"DALI failed: {_first_line(error)}"
        log.warning("a batch of %d videos is decoded on the CPU: %s", len(rows), why)
        jobs = [self.readers.submit(Job(partial(self.decode, row))) for row in rows]
        samples = [self.collect(job) for job in jobs]
        blamed = [row for row, sample in zip(rows, samples, strict=True) if isinstance(sample, str)]
        for row in blamed or rows:
            self.route(row, why)
        self.failures += not blamed
        if not blamed and self.failures >= _GIVE_UP:
            raise RuntimeError(
                f"DALI failed {self.failures} times in a row on videos that the CPU decodes; use decoder='cpu', or "
                f"repair DALI. The last error: {error}"
            ) from error
        return samples

    def assemble(
        self, found: list[_Sample | str], kept: list[int], parts: list[tuple[list[int], torch.Tensor]]
    ) -> torch.Tensor:
        """The frames of these places of a batch, in order, on the device."""
        if len(parts) == 1 and parts[0][0] == kept:
            return parts[0][1]
        shape = self.shape if self.shape[0] > 1 else self.shape[1:]
        frames = torch.empty((len(kept), *shape), dtype=torch.uint8, device=self.device)
        pixels = {place: sample.reshape(shape) for place, sample in enumerate(found) if isinstance(sample, np.ndarray)}
        if pixels:
            parts = [*parts, (list(pixels), self.move(np.stack(list(pixels.values()))))]
        where = {place: number for number, place in enumerate(kept)}
        for places, part in parts:
            frames.index_copy_(0, self.move(np.array([where[place] for place in places])), part)
        return frames

    def move(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        return tensor if self.device.type == "cpu" else tensor.pin_memory().to(self.device, non_blocking=True)


def _first_line(error: Exception) -> str:
    """DALI's reason, without the place in the graph and the advice."""
    text = str(error)
    _, found, rest = text.rpartition("encountered:")
    lines = (line.strip() for line in (rest if found else text).splitlines())
    return next(filter(None, lines), type(error).__name__)


@dataclass
class _Pipe:
    """A pipeline. It is built when first needed, and again if two of its runs fail in a row: then it may be dead."""

    make: Callable[[], Any]
    pipeline: Any = None
    failed: bool = False

    def run(self, inputs: dict[str, list[np.ndarray]]) -> Any:
        while True:
            fresh = self.pipeline is None
            try:
                if fresh:
                    pipeline = self.make()
                    pipeline.build()
                    self.pipeline = pipeline
                result = self.pipeline.run(**inputs)[0].as_tensor()
                self.failed = False
                return result
            except (RuntimeError, MemoryError):  # the errors that DALI raises for its operators
                if fresh or not self.failed:
                    self.failed = True
                    raise
                self.pipeline = None

"""The loop of `classify`, `embed` and the Python API: threads decode ahead and the model answers in batches.

A batch and a few windows of each file in work bound the memory, whatever the number and length of the files.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..data.decode.ahead import decode_ahead
from ..data.decode.source import as_source
from ..data.decode.windows import Span, Window, check_windows, decode_spans, window_spans
from ..data.remote import Limits, local_path
from ..data.sampling import Sampling
from ..data.transforms import TestTransform
from .labels import NOT_A_NUMBER

if TYPE_CHECKING:
    from ..model import XCLIP
    from ..nn.features import VideoFeatures

WINDOW, WHOLE_BELOW = 10.0, 30.0  # seconds; see `Reading.moments`


@dataclass(frozen=True)
class Reading:
    """How videos are read.

    Each window gives `frames` frames, which `sampling` and `frame_stride` choose, as squares of `size` pixels. `window`
    and `stride` are in seconds. A video of at most `whole_below` seconds is one window; so is every video if `window`
    is None.
    """

    frames: int
    size: int
    sampling: Sampling = "sparse"
    frame_stride: int = 1
    window: float | None = None
    stride: float | None = None
    whole_below: float | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        if self.window is not None:
            check_windows(self.window, self._stride(), self.whole_below or self.window)

    def _stride(self) -> float:
        assert self.window is not None
        return self.window / 2 if self.stride is None else self.stride

    @staticmethod
    def moments(window: float | None, stride: float | None) -> dict[str, float]:
        """The three times of a store: as given, or windows of 10 s in videos longer than 30 s.

        With a given window, every video longer than the window is cut.
        """
        length = WINDOW if window is None else window
        return {
            "window": length,
            "stride": length / 2 if stride is None else stride,
            "whole_below": WHOLE_BELOW if window is None else window,
        }

    def spans(self, duration: float) -> list[Span]:
        if self.window is None or duration <= (self.whole_below or self.window):
            return [(0.0, duration)]
        return window_spans(duration, self.window, self._stride())

    def windows(self, path: str, threads: int = 1) -> Generator[Window, None, None]:
        """The windows of one file, local or remote, in order. Raises VideoError."""
        test = TestTransform(self.frames, self.size, sampling=self.sampling, stride=self.frame_stride)
        with local_path(path, self.limits) as name:
            yield from decode_spans(as_source(name), self.spans, test, threads=threads)


class Answer(NamedTuple):
    """The model's answer for one window of a file: tensors on the CPU, without the batch dimension."""

    path: str
    start: float
    end: float
    values: list[Tensor]


class Finished(NamedTuple):
    """The end of a file's answers. If there is an `error`, its earlier answers do not count."""

    path: str
    error: ValueError | None


def answers(
    model: XCLIP,
    paths: Iterable[str],
    reading: Reading,
    answer: Callable[[VideoFeatures], Sequence[Tensor]],
    *,
    patches: bool = True,
    batch_size: int | None = None,
    workers: int | None = None,
) -> Iterator[Answer | Finished]:
    """For each path in order: an Answer for each of its windows, then Finished.

    `answer` gets the features of a batch, with those of patches if `patches`, and returns tensors whose first dimension
    is the batch. `batch_size` counts windows (default: 16 on a GPU, 1 on a CPU), `workers` decoding threads (default:
    one per core).
    """
    device = next(model.parameters()).device
    batch = batch_size or (1 if device.type == "cpu" else 16)
    waiting: list[tuple[str, Window | ValueError | None]] = []
    videos = 0
    failed: ValueError | None = None  # the error of the current file

    def compute() -> Iterator[Answer | Finished]:
        nonlocal failed
        windows = [item.frames for _, item in waiting if isinstance(item, Window)]
        with torch.inference_mode():
            parts = answer(model.encode_video(torch.stack(windows).to(device), patches)) if windows else []
            parts = [part.cpu() for part in parts]
        row = 0
        for path, item in waiting:
            if isinstance(item, Window):
                own, row = [part[row] for part in parts], row + 1
                if all(part.isfinite().all() for part in own):
                    yield Answer(path, item.start, item.end, own)
                else:
                    failed = ValueError(f"{path}: {NOT_A_NUMBER}")
                continue
            yield Finished(path, item or failed)
            failed = None

    with contextlib.closing(decode_ahead(paths, reading.windows, workers)) as decoded:
        for path, item in decoded:
            waiting.append((path, item))
            videos += isinstance(item, Window)
            if videos in (0, batch):
                yield from compute()
                waiting, videos = [], 0
        yield from compute()

"""One stage of a pipeline over many videos: it takes a batch of rows and returns a batch of rows.

This module does not depend on Ray. A batch is a dict of columns, as in Ray Data, Daft and others; a column is a NumPy
array or a list. A bad file is a row with an error, never an exception.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from ..inference.batches import Answer, Finished, Reading
    from ..model import XCLIP

Batch = dict[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """The model that a worker loads. The worker must be able to read `checkpoint`; None means random weights."""

    checkpoint: str | None
    variant: str | None = None
    device: str = "auto"
    dtype: str = "auto"

    def load(self) -> XCLIP:
        from ..inference.placement import load_model, placed

        return load_model(self.checkpoint, self.variant).to(**placed(self.device, self.dtype))


@dataclass
class VideoStage:
    """From paths to answers.

    `decode` turns rows with a `path` into rows of windows: `path`, `number` (0, 1, ... in the file), `start` and `end`
    (seconds), `frames` uint8 (T, S, S, 3), `error` (""). After the last window of a file comes a row whose `number` is
    -1 - (the number of windows). It has the file's error, or "", whether to read the file `again` in another run (as
    after a read error), and blank frames.

    Calling the stage turns rows of windows into answers: the same rows without `frames`, with `vector` float32 (E,)
    and, if chosen, `patches` float16 (N, E); with `labels`, `probabilities` float32 (K,) instead. It first decodes rows
    without `frames`, so one stage can do both.

    The worker loads the model at the first call.
    """

    spec: ModelSpec
    reading: Reading
    patches: bool = False
    labels: Sequence[str] | None = None
    templates: Sequence[str] | None = None
    _model: Any = field(default=None, init=False, repr=False)
    _logits: Any = field(default=None, init=False, repr=False)

    def decode(self, batch: Batch) -> Iterator[Batch]:
        """Yields batches of one row, so that a long film is never in memory as a whole."""
        from ..data.decode.source import ReadError

        for path in map(str, batch["path"]):
            count, error, again = 0, "", False
            try:
                for window in self.reading.windows(path):
                    frames = window.frames.numpy()
                    yield _row(path=path, number=count, start=window.start, end=window.end, frames=frames)
                    count += 1
            except (ValueError, OSError) as problem:
                error = " ".join(str(problem).split()) or type(problem).__name__
                again = isinstance(problem, (ReadError, OSError))
            blank = np.zeros((self.reading.frames, self.reading.size, self.reading.size, 3), np.uint8)
            yield _row(path=path, number=-1 - count, frames=blank, error=error, again=again)

    def __call__(self, batch: Batch) -> Batch:
        if "frames" not in batch:
            parts = list(self.decode(batch))
            batch = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
        if not batch:
            return {}
        import torch

        from ..inference.labels import NOT_A_NUMBER

        number = np.asarray(batch["number"])
        real = np.flatnonzero(number >= 0)
        answers: dict[str, np.ndarray] = {}
        errors = np.array([str(error) for error in batch["error"]], object)
        frames = np.asarray(batch["frames"])
        model = self.model  # outside: what is made of inference tensors is not kept
        with torch.inference_mode():
            # Run at least one row, so that every batch has the same columns.
            rows = real if len(real) else np.array([0])
            videos = torch.from_numpy(np.ascontiguousarray(frames[rows])).to(self._device)
            found = model.encode_video(videos, self.patches or self.labels is not None)
            for name, tensor in self._answer(found).items():
                value = tensor.cpu().numpy()
                answers[name] = np.zeros((len(number), *value.shape[1:]), value.dtype)
                answers[name][rows] = value
                bad = rows[~np.isfinite(value).reshape(len(rows), -1).all(1)]
                errors[bad[number[bad] >= 0]] = NOT_A_NUMBER
        kept = {name: batch[name] for name in ("path", "number", "start", "end", "again")}
        return {**kept, "error": errors, **answers}

    def _answer(self, found: Any) -> dict[str, Any]:
        from ..inference.labels import label_scorer

        if self.labels is None:
            vector = {"vector": found.video.float()}
            return {**vector, "patches": found.patches.half()} if self.patches else vector
        if self._logits is None:
            self._logits = label_scorer(self.model, self.labels, self.templates)
        return {"probabilities": self._logits(found).softmax(-1).float()}

    @property
    def model(self) -> XCLIP:
        if self._model is None:
            self._model = self.spec.load()
        return self._model

    @property
    def _device(self) -> Any:
        return next(self.model.parameters()).device

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_model": None, "_logits": None}  # each worker reads the weights itself


def _row(**given: Any) -> Batch:
    """A batch of one row."""
    row = {"start": 0.0, "end": 0.0, "error": "", "again": False, **given}
    kinds = {name: object if isinstance(value, str) else None for name, value in row.items()}
    return {name: np.asarray(value, kinds[name])[None] for name, value in row.items()}


def as_answers(batches: Iterable[Batch], columns: Sequence[str]) -> Iterator[Answer | Finished]:
    """The rows in the form of `inference.batches.answers`: an Answer for each window of a file, then Finished.

    Rows come in any order; a file is given once it is complete. The values of an answer are these columns, as float
    tensors.
    """
    import torch

    from ..data.decode.source import ReadError
    from ..inference.batches import Answer, Finished

    waiting: dict[str, dict[int, dict[str, Any]]] = {}
    ends: dict[str, tuple[int, str, bool]] = {}
    for batch in batches:
        for at in range(len(batch["path"]) if batch else 0):
            row = {name: column[at] for name, column in batch.items()}
            path, number = str(row["path"]), int(row["number"])
            if number < 0:
                ends[path] = -1 - number, str(row["error"]), bool(row["again"])
            else:
                waiting.setdefault(path, {})[number] = row
            if path not in ends or len(waiting.get(path, ())) < ends[path][0]:
                continue
            count, error, again = ends.pop(path)
            rows = [each for _, each in sorted(waiting.pop(path, {}).items())][:count]
            error = error or next((str(each["error"]) for each in rows if each["error"]), "")
            for each in [] if error else rows:
                values = [torch.from_numpy(np.array(each[name])).float() for name in columns]
                yield Answer(path, float(each["start"]), float(each["end"]), values)
            kind = ReadError if again else ValueError
            yield Finished(path, kind(error) if error else None)

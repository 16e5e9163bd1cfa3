"""Checkpoints of a training run. A run that resumes from one gives the weights of an unbroken run.

A checkpoint is a folder ``step-00001234``. It holds the tensors (weights, optimizer, moving average) as safetensors,
which ``torch.distributed.checkpoint`` writes from a thread while training goes on, and the run's counters
(``progress.json``). It holds no pickled Python. It is written as ``.step-00001234.part`` and renamed when it is
complete, so a folder of its final name is whole. The number of processes and the strategy may change between saving and
reading.
"""

from __future__ import annotations

import itertools
import json
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..console import first_line
from ..files import exchange, is_full, read_json, sync
from ..schema import ConfigError

_COMPLETE = re.compile(r"step-(\d{8,})")
_PART = re.compile(r"\.step-\d{8,}(\.old)?\.part")
_NUMBERS = "progress.json"
_FILE = 512 << 20  # bytes of tensors in a file, which is put together in memory

# A single process needs no process group.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class SaveError(OSError):
    """A checkpoint could not be written. The message gives the reason and the last good checkpoint."""


def complete(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, oldest first."""
    found = [path for path in folder.glob("step-*") if _COMPLETE.fullmatch(path.name) and (path / _NUMBERS).exists()]
    return sorted(found, key=lambda path: int(path.name[5:]))


def latest(folder: Path) -> Path | None:
    found = complete(folder)
    return found[-1] if found else None


def numbers(checkpoint: Path) -> dict[str, Any]:
    """The run's counters at the time of the checkpoint: step, best and so on; and the sizes of its files."""
    path = checkpoint / _NUMBERS
    try:
        found = read_json(path)
        step, best = found.get("step"), found.get("best")
        score = [0.0, 0.0] if best is None else best.get("score") if isinstance(best, dict) else None
        scored = isinstance(score, list) and [isinstance(each, float | int) for each in score] == [True, True]
        if type(step) is not int or step < 0 or not scored:
            raise ValueError(f"{path}: is damaged: its step or its best score is missing or has a wrong type")
    except ValueError as error:
        raise ValueError(f"{error}; delete that folder to go on from the one before it") from error
    return found


def resumed(checkpoint: Path, now: dict[str, Any]) -> dict[str, Any]:
    """The counters of a checkpoint. ``now``: those of this run at its start.

    Raises:
        ConfigError: if the checkpoint was trained on other data.
    """
    counted = numbers(checkpoint)
    for key, what in (("data", "other training videos or classes"), ("epoch_steps", "another number of videos")):
        if counted.get(key) != now[key]:
            raise ConfigError(f"{checkpoint} was trained on {what}; give those, another output folder, or --fresh")
    return counted


def state(model: nn.Module, optimizer: torch.optim.Optimizer, ema: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
    """Every tensor of the run by its name. There is nothing but tensors, so the files hold no pickled code."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in model.named_parameters():
        tensors[f"model.{name}"] = parameter.detach()
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{name}.{key}"] = value
    fixed = getattr(model, "fixed_KE", None)  # features of frozen labels; a resumed run uses the same
    if fixed is not None:
        tensors["labels"] = fixed
    return tensors | {f"ema.{name}": value for name, value in (ema or {}).items()}


def load(checkpoint: Path, tensors: dict[str, Tensor]) -> None:
    """Reads a checkpoint into the tensors of ``state``, in place. No code in the files runs.

    Raises:
        ValueError: if the checkpoint is damaged or does not hold these tensors.
    """
    import torch.distributed.checkpoint as dcp

    try:
        files = _files(checkpoint)
        if files != (wanted := read_json(checkpoint / _NUMBERS).get("files")):
            raise ValueError(
                f"its files have the sizes {files}, and {wanted} are wanted: it is damaged, or of an earlier version"
            )
        reader = dcp.HuggingFaceStorageReader(str(checkpoint))
        dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
    except (Exception, dcp.api.CheckpointException) as error:  # damaged bytes raise errors of many kinds
        first = next((cause for cause in _causes(error) if not hasattr(cause, "failures")), error)  # of all processes
        raise ValueError(
            f"{checkpoint}: cannot be read into this model ({first_line(first)}); delete that folder to go on from the "
            "one before it, or start over with --fresh"
        ) from error


def _files(folder: Path) -> dict[str, int]:
    """The sizes of the files of tensors, by name."""
    return {path.name: path.stat().st_size for path in sorted(folder.glob("*.safetensors"))}


class Checkpoints:
    """Writes checkpoints into ``folder``, one at a time, and deletes old ones. Every process must call every method."""

    def __init__(self, folder: Path, keep_last: int) -> None:
        self.folder, self.keep_last = folder, keep_last
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        # a group of its own: the thread's messages must not mix with those of the training
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.pending: tuple[Future[Any], Path, dict[str, Any]] | None = None
        if self.rank == 0:
            folder.mkdir(parents=True, exist_ok=True)
            for left_over in folder.iterdir():
                if _PART.fullmatch(left_over.name):
                    shutil.rmtree(left_over)

    def save(self, tensors: dict[str, Tensor], counted: Mapping[str, Any]) -> None:
        """Copies the tensors and writes them in the background. If the last save is not finished, it waits for it.

        ``counted``: the ``step`` and other values (JSON) that ``numbers`` gives back.
        """
        import torch.distributed.checkpoint as dcp

        self.finish()
        part = self.folder / f".step-{counted['step']:08d}.part"
        try:
            ends = itertools.accumulate(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            numbers = {name: 1 + end // _FILE for name, end in zip(tensors, ends, strict=True)}
            writer = dcp.HuggingFaceStorageWriter(str(part), numbers, save_distributed=True)
            alone = self.group is None
            future: Any = dcp.async_save(tensors, storage_writer=writer, process_group=self.group, no_dist=alone)
        except OSError as error:
            raise self._failed(part, error) from error
        self.pending = (future, part, dict(counted))

    def poll(self) -> None:
        """Completes the pending save if its files are written. Does not wait."""
        if self.pending and self.pending[0].done():
            self.finish()

    def finish(self) -> None:
        """Waits for the pending save and completes it.

        Raises:
            SaveError: if it failed. Earlier checkpoints stay.
        """
        import torch.distributed.checkpoint as dcp

        if self.pending is None:
            return
        (future, part, counted), self.pending = self.pending, None
        try:
            future.result()
            if self.rank == 0:
                self._complete(part, counted)
        except (Exception, dcp.api.CheckpointException) as error:  # the thread may raise many kinds of errors
            raise self._failed(part, error) from error

    def _complete(self, part: Path, counted: dict[str, Any]) -> None:
        (part / _NUMBERS).write_text(json.dumps(counted | {"files": _files(part)}), encoding="utf-8")
        sync(part / _NUMBERS)
        target = self.folder / part.name.removeprefix(".").removesuffix(".part")
        if exchange(part, target):  # one of the same step, from before a resume or a validation
            sync(self.folder)
            shutil.rmtree(part)
        else:
            if target.exists():  # a file system that cannot exchange folders
                shutil.rmtree(target.replace(target.with_name(f".{target.name}.old.part")))
            part.replace(target)
            sync(self.folder)
        for old in complete(self.folder)[: -self.keep_last]:
            # renamed first: a half deleted folder must not look complete
            shutil.rmtree(old.replace(old.with_name(f".{old.name}.part")))

    def _failed(self, part: Path, error: BaseException) -> SaveError:
        full = any(map(is_full, _causes(error)))
        if self.rank == 0:
            shutil.rmtree(part, ignore_errors=True)  # the space is needed
        last = latest(self.folder)
        why = "no space left on the disk" if full else (str(error).strip() or repr(error)).splitlines()[-1]
        return SaveError(
            f"checkpoint {part.name.removeprefix('.').removesuffix('.part')} could not be written: {why}. "
            f"The last good one is {last or 'none'}" + ("; make room and run the same command to go on" * full)
        )


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error, its causes, and the errors of all processes that torch collected in it."""
    while error is not None:
        yield error
        failures = getattr(error, "failures", None)
        for failure in failures.values() if isinstance(failures, dict) else ():
            yield from _causes(failure[0])
        error = error.__cause__ or error.__context__

"""The output folder of a training run: which folder, its lock, and the checkpoint in it to go on from."""

from __future__ import annotations

import contextlib
import os
import re
from pathlib import Path

from ..files import locked, write_text
from ..inference.processes import Process, decided_by_first
from ..schema import ConfigError
from . import checkpoints as training_checkpoint
from . import config as train_config
from .config import TrainConfig

CONFIG, LOCK = "config.yaml", ".lock"  # in the output folder


def output_folder(
    config: TrainConfig, fresh: bool, process: Process, held: contextlib.ExitStack
) -> tuple[Path, Path | None]:
    """The folder of this run and the checkpoint to go on from. Every process gets the same.

    No other run gets the folder until ``held`` is closed.

    Raises:
        ConfigError: if another run is in the folder, or it has checkpoints of another configuration.
    """
    try:
        return decided_by_first(process, lambda: _output_folder(config, fresh, held))
    except OSError as error:
        raise ConfigError(f"output: {config.output}: {error}; give a folder that can be written") from error


def _output_folder(config: TrainConfig, fresh: bool, held: contextlib.ExitStack) -> tuple[Path, Path | None]:
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; give a folder")
    if fresh:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        folder = _numbered(folder, last=again)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        held.enter_context(locked(folder / LOCK, folder))
    except FileExistsError as error:
        raise ConfigError(f"output: {error}, or start over beside it with --fresh") from error
    resume = training_checkpoint.latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if resume is not None:
        try:
            old = train_config.load(folder / CONFIG)
        except ConfigError as error:
            raise ConfigError(
                f"{folder} holds checkpoints of a configuration that cannot be read, perhaps of an earlier version "
                f"({error}). Choose another output folder, or start over beside it with --fresh"
            ) from error
        if changed := train_config.differences(old, config):
            raise ConfigError(
                f"{folder} holds checkpoints of another configuration. These keys differ: {'; '.join(changed)}. "
                "Give the old values to go on, choose another output folder, or start over beside it with --fresh"
            )
    write_text(folder / CONFIG, train_config.to_yaml(config))
    return folder, resume


def _numbered(folder: Path, *, last: bool) -> Path:
    """The first free name of folder, folder-2, folder-3, ...; ``last``: the last one that is taken."""
    if not folder.exists() or (not last and not any(folder.iterdir())):
        return folder
    taken = [1]
    for path in folder.parent.glob(f"{folder.name}-*"):
        if number := re.fullmatch(r"(\d+)", path.name.removeprefix(f"{folder.name}-")):
            taken.append(int(number[1]))
    number_ = max(taken) + (0 if last else 1)
    return folder if number_ == 1 else folder.with_name(f"{folder.name}-{number_}")

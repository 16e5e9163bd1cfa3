"""The output folder of a training run: which one, whose it is, and whether a run in it goes on."""

from __future__ import annotations

import contextlib
import logging
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..files import write_text
from ..processes import Process
from . import checkpoints as training_checkpoint
from . import config as train_config
from .config import ConfigError, TrainConfig

log = logging.getLogger("xclip_fast")

CONFIG, LOCK = "config.yaml", ".lock"  # in the output folder


def output_folder(
    config: TrainConfig, fresh: bool, process: Process, held: contextlib.ExitStack
) -> tuple[Path, Path | None]:
    """The folder of this run and the checkpoint to go on from, the same in every process.

    Until ``held`` is closed no other run gets the folder.

    Raises:
        ConfigError: if another run is in the folder, or it has checkpoints of another configuration.
    """
    found: list[Any] = [None]
    if process.rank == 0:
        try:
            found = [_output_folder(config, fresh, held)]
        except ConfigError as error:
            found = [error]
        except OSError as error:
            found = [ConfigError(f"output: {config.output}: {error}; give a folder that can be written")]
    if process.world > 1:
        dist.broadcast_object_list(found)
    if isinstance(found[0], ConfigError):
        raise found[0]
    return found[0]


def _output_folder(config: TrainConfig, fresh: bool, held: contextlib.ExitStack) -> tuple[Path, Path | None]:
    folder = Path(config.output)
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"output: {folder} is a file; a folder wanted")
    if fresh:
        again = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
        folder = _numbered(folder, last=again)
    folder.mkdir(parents=True, exist_ok=True)
    held.enter_context(_locked(folder))
    resume = training_checkpoint.latest(folder / "checkpoints") if (folder / "checkpoints").is_dir() else None
    if resume is not None:
        old = train_config.load(folder / CONFIG)
        if changed := train_config.differences(old, config):
            raise ConfigError(
                f"{folder} holds checkpoints of another configuration; what differs:\n  "
                + "\n  ".join(changed)
                + "\ngive the old values to go on with it, another output folder, or --fresh to start over beside it"
            )
    write_text(folder / CONFIG, train_config.to_yaml(config))
    return folder, resume


def _numbered(folder: Path, *, last: bool) -> Path:
    """The first name of folder, folder-2, folder-3, ... that is free, or the last that is not."""
    if not folder.exists() or (not last and not any(folder.iterdir())):
        return folder
    taken = [1]
    for path in folder.parent.glob(f"{folder.name}-*"):
        if number := re.fullmatch(r"(\d+)", path.name.removeprefix(f"{folder.name}-")):
            taken.append(int(number[1]))
    number_ = max(taken) + (0 if last else 1)
    return folder if number_ == 1 else folder.with_name(f"{folder.name}-{number_}")


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """No other run may take the folder meanwhile. The system forgets the lock when this process ends, however it ends.

    Where there are no such locks (Windows, some network file systems), a line says so and nothing is locked.
    """
    try:
        import fcntl
    except ImportError:
        log.warning("%s is not locked: this system has no fcntl", folder)
        yield
        return
    with open(folder / LOCK, "a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise ConfigError(
                f"output: another run ({file.read().strip() or 'just started'}) is writing to {folder}; "
                "wait for it to end, or give another output folder, or --fresh for a new one beside it"
            ) from None
        except OSError as error:
            log.warning("%s is not locked against other runs: %s", folder, error)
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}")
        file.flush()
        yield

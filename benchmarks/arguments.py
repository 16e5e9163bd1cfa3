"""Shared by the benchmarks: their argument parser, the types of their options, and how they end with an error."""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import textwrap
from argparse import ArgumentTypeError
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, NoReturn


def fail(message: object, code: int = 2) -> NoReturn:
    """Ends the program with one line on standard error."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(code)


def _ended(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Ctrl-C ends a benchmark silently, and a missing package, a file or a command that fails with one line."""
    if isinstance(error, subprocess.CalledProcessError):  # the command has said why, or what it said was kept
        said = (error.stderr or "").strip().rpartition("\n")[2]
        ended = f"{Path(error.cmd[0]).name} ended with exit code {error.returncode}"
        print(f"{Path(sys.argv[0]).name}: error: {ended}{said and f': {said}'}", file=sys.stderr)
    elif isinstance(error, (ImportError, OSError)):
        name = error.name if isinstance(error, ModuleNotFoundError) else None
        install = f" (pip install {name})" if name and "." not in name and name != "xclip_fast" else ""
        print(f"{Path(sys.argv[0]).name}: error: {error}{install}", file=sys.stderr)
    elif kind is not KeyboardInterrupt:
        sys.__excepthook__(kind, error, trace)


sys.excepthook = _ended  # here, so that it holds for the imports of the benchmarks as well


class _Help(argparse.HelpFormatter):
    """Wraps the description. Its indented lines, which are commands, stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return "\n\n".join(
            part if part.startswith("    ") else textwrap.fill(part, width, break_on_hyphens=False)
            for part in text.strip().split("\n\n")
        )


def parser(description: str | None, json_help: str = "") -> argparse.ArgumentParser:
    """A parser whose errors are one line. ``json_help``: of ``--json``, for a benchmark that has it."""
    made = argparse.ArgumentParser(description=description, formatter_class=_Help)
    made.error = fail  # type: ignore[assignment]
    if json_help:
        made.add_argument("--json", type=output, help=json_help)
    return made


def count(given: str) -> int:
    """A whole number, at least 1."""
    if not (given.isdecimal() and int(given)):
        raise ArgumentTypeError(f"{given}: a whole number of at least 1 wanted")
    return int(given)


def counts(given: str) -> list[int]:
    """Whole numbers of at least 1, separated by commas."""
    return [count(part) for part in given.split(",")]


def positive(given: str) -> float:
    """A positive number."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    if not value > 0:
        raise ArgumentTypeError(f"{given}: a positive number wanted")
    return value


def names(known: Collection[str]) -> Callable[[str], list[str]]:
    """Some of the known names, separated by commas, each once."""

    def read(given: str) -> list[str]:
        found = [name.strip() for name in given.split(",")]
        for name in found:
            if name not in known:
                raise ArgumentTypeError(f"{name!r} is not one of {', '.join(known)}")
        return list(dict.fromkeys(found))

    return read


def output(given: str) -> Path:
    """A file to write, in a folder that exists."""
    path = Path(given).absolute()
    if path.is_dir() or not path.parent.is_dir():
        raise ArgumentTypeError(f"{given}: a file in an existing folder wanted")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ArgumentTypeError(f"{given}: no permission to write it")
    return Path(given)


def read_json(path: Path) -> Any:
    """The content of a file of results; fails if there is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        fail(f"{path}: cannot be read: {error}")


def device(given: str) -> str:
    """The device that auto, cpu or cuda stands for."""
    import torch

    if given not in ("auto", "cpu", "cuda"):
        raise ArgumentTypeError(f"{given!r} is not one of auto, cpu, cuda")
    if given == "cuda" and not torch.cuda.is_available():
        raise ArgumentTypeError("torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    return "cuda" if given != "cpu" and torch.cuda.is_available() else "cpu"


def _backend(given: str) -> str:
    import xclip_fast

    try:
        with xclip_fast.backend(given):
            return given
    except ValueError as error:
        raise ArgumentTypeError(error) from error


def model_parser(description: str | None, variants: Any, precisions: Any) -> argparse.ArgumentParser:
    """The options of throughput.py and training.py: the models, the labels, the device, and limits of the run."""
    from labels import read_labels

    made = parser(description, json_help="write every raw timing here")
    made.add_argument("--variants", type=names(variants), help=f"comma-separated, of {', '.join(variants)}")
    made.add_argument("--precisions", type=names(precisions), help=f"comma-separated, of {', '.join(precisions)}")
    made.add_argument(
        "--labels",
        type=read_labels,
        default="400",
        help="number K of labels, or a text file with one on each line (default 400)",
    )
    made.add_argument("--device", type=device, default="auto", help="auto, cpu or cuda (default auto)")
    made.add_argument("--threads", type=count, help="of the CPU")
    made.add_argument("--seconds", type=positive, help="time limit (default: 130 on a CPU, none on a GPU)")
    made.add_argument("--compile", action="store_true", help="also Hugging Face's model under torch.compile")
    made.add_argument("--backend", type=_backend, default="auto", help="of xclip-fast's ops (see xclip-fast info)")
    return made


def seconds_on(device: str) -> float:
    """The default of ``--seconds``."""
    return math.inf if device == "cuda" else 130.0

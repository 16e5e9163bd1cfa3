"""Shared by the benchmarks: their argument parser, its errors, and the check of files to write."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn


def fail(message: str) -> NoReturn:
    """Ends the program with one line on standard error and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints ``description`` as it stands, and errors without the usage."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = fail  # type: ignore[method-assign]
    return made


def add_model_options(made: argparse.ArgumentParser, variants: Any, precisions: Any) -> None:
    """Adds the options of throughput.py and training.py: the models, the labels, the device, and limits of the run."""
    made.add_argument("--variants", default="auto", help=f"comma-separated, of {', '.join(variants)}")
    made.add_argument("--precisions", default="auto", help=f"comma-separated, of {', '.join(precisions)}")
    made.add_argument(
        "--labels", default="400", help="number K of labels, or a text file with one on each line (default 400)"
    )
    made.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    made.add_argument("--threads", type=int, help="of the CPU")
    made.add_argument("--seconds", type=float, help="time limit (default: 130 on a CPU, none on a GPU)")
    made.add_argument("--compile", action="store_true", help="also Hugging Face's model under torch.compile")
    made.add_argument("--backend", default="auto", help="of xclip-fast's ops (see xclip-fast info)")
    made.add_argument("--json", type=Path, help="write every raw timing here")


def check_model_options(args: argparse.Namespace) -> None:
    """Reads the values of ``add_model_options``: the device, the labels and the time limit. Fails if one is wrong."""
    from labels import read_labels

    import xclip_fast

    args.device = device(args.device)
    args.labels = read_labels(args.labels)
    if args.threads is not None and args.threads < 1:
        fail(f"--threads {args.threads}: at least 1 wanted")
    if args.seconds is None:
        args.seconds = math.inf if args.device == "cuda" else 130.0
    if not args.seconds > 0:
        fail(f"--seconds {args.seconds}: a positive time wanted")
    try:
        with xclip_fast.backend(args.backend):
            pass
    except ValueError as error:
        fail(f"--backend: {error}")


def chosen(option: str, given: str, default: list[str], known: Any) -> list[str]:
    """The comma-separated names of an option, each once; ``default`` for "auto"."""
    names = default if given == "auto" else [name.strip() for name in given.split(",")]
    for name in names:
        if name not in known:
            fail(f"{option}: {name!r} is not one of {', '.join(known)}")
    return list(dict.fromkeys(names))


def numbers(option: str, given: str) -> list[int]:
    """The comma-separated numbers of an option."""
    parts = given.split(",")
    if not all(part.isdecimal() and int(part) for part in parts):
        fail(f"{option} {given}: positive whole numbers wanted, separated by commas")
    return [int(part) for part in parts]


def start(main: Callable[[], int | None]) -> NoReturn:
    """Runs the program. Ctrl-C ends it with exit code 130, without a traceback."""
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)


def device(given: str) -> str:
    """The device that auto, cpu or cuda stands for."""
    import torch

    if given == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if given == "cuda" and not torch.cuda.is_available():
        fail("--device cuda: torch sees no CUDA device; use --device cpu, or install a CUDA build of torch")
    return given


def check_outputs(**paths: Path | None) -> None:
    """Fails if one of the files, given by option, cannot be written."""
    for option, path in paths.items():
        if path and (path.is_dir() or not path.absolute().parent.is_dir()):
            fail(f"--{option} {path}: a file in an existing folder wanted")
    if paths.get("plot"):
        import importlib.util

        if importlib.util.find_spec("matplotlib") is None:
            fail("--plot: matplotlib is not installed (pip install 'xclip-fast[plot]')")

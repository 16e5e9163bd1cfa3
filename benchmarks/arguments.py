"""Shared by the benchmarks: their argument parser, its errors, and the check of files to write."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import NoReturn


def fail(message: str) -> NoReturn:
    """Ends the program with one line on standard error and exit code 2."""
    print(f"{Path(sys.argv[0]).name}: error: {message}", file=sys.stderr)
    raise SystemExit(2)


def parser(description: str | None) -> argparse.ArgumentParser:
    """A parser that prints ``description`` as it stands, and errors without the usage."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.error = fail  # type: ignore[method-assign]
    return made


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

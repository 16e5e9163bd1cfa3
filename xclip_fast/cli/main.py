"""The command line: ``xclip-fast classify | embed | search | index | transcode | train | evaluate | ...``.

Answers go to standard output: tables on a terminal, tab-separated lines in a pipe, JSON with ``--json``. Everything
else goes to standard error. Exit codes: 0, 1 if something failed, 2 for wrong arguments, 130 after Ctrl-C. Commands
import torch and the rest of the package inside their functions, so that ``--help`` is quick.
"""

from __future__ import annotations

import importlib.metadata
import logging
import os
import re
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

import click

from .. import __version__
from ..console import complain
from . import data, tools, train
from .embed import embed
from .predict import classify
from .search import search


class App(click.Group):
    """Lists its commands in the order in which they are added, and ends without a word after Ctrl-C."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            ctx.exit(130)


@click.group(
    cls=App,
    context_settings={"show_default": True},
    epilog='\b\nCompletion in bash:\neval "$(_XCLIP_FAST_COMPLETE=bash_source xclip-fast)"',
)
@click.version_option(__version__, prog_name="xclip-fast", message="%(prog)s %(version)s")
def app() -> None:
    """X-CLIP video recognition: classify, embed and search video files; train and evaluate."""


for command in (
    *(classify, embed, search, data.index, data.transcode, data.motion),
    *(train.train, train.evaluate, train.protocol, train.few_shot),
    *(tools.flops, tools.tune, tools.convert, tools.export, tools.info),
):
    app.add_command(command)


def main(arguments: Sequence[str] | None = None) -> NoReturn:
    """Runs a command and exits with its exit code. An error is one line, not a traceback."""
    logging.basicConfig(format="warning: %(message)s", level=logging.WARNING)
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 -- closed by the caller
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a label that the terminal cannot show must not stop the run
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    try:
        try:
            app(args=None if arguments is None else list(arguments))
        finally:
            sys.stdout.flush()
    except BrokenPipeError:  # the reader of our output has gone; Python must not complain at exit either
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except ModuleNotFoundError as error:
        complain(_missing(error))
    except (ValueError, OSError, ImportError, MemoryError) as error:
        complain(error)
    except RuntimeError as error:
        if not _expected(error):
            raise
        complain(error)
    sys.exit(1)


def _missing(error: ModuleNotFoundError) -> str:
    """The line for a missing module. It names a package to install only if xclip-fast requires that package."""
    module = (error.name or "").partition(".")[0]
    if not module:
        return str(error)
    package = "pyyaml" if module == "yaml" else module.replace("_", "-")
    required = [re.split(r"[^\w-]", line)[0] for line in importlib.metadata.requires("xclip-fast") or ()]
    return f"the Python module {module} is not installed" + (f": pip install {package}" if package in required else "")


def _expected(error: RuntimeError) -> bool:
    """Whether the cause is the machine or the user: too little memory, a device that fails, a backend that refuses."""
    from ..kernels import BackendError

    words = ("out of memory", "not enough memory", "can't allocate memory", "CUDA error")
    return isinstance(error, BackendError) or any(word in str(error) for word in words)

"""Measure on this GPU: ``python -m xclip_fast.kernels.tune [--model B/16] [--backends] [--seconds 60]``.

Without ``--backends``, the tiles of the Triton kernels. For each shape of the model's blocks an estimate names a few
tiles; those that agree with torch are timed, and the fastest is written. With ``--backends``, to be run after that, the
backends of every op and of every part of a block. ``--rehearse`` runs everything on the CPU and writes nothing.

Rows go into the user's own table (``tiles.json`` or ``choices.json`` in ``~/.cache/xclip_fast``), which is asked before
the shipped one, or with ``--commit`` into the shipped one (in ``kernels/triton`` or ``kernels``). Each table is written
as soon as it is measured. When the time is over, what is left keeps the rows that it had.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..dispatch import choices, tables
from . import backends, measuring, tiles
from .shapes import BATCHES, SHAPES


def merge(path: Path, rows: dict[str, list[dict[str, Any]]]) -> None:
    """Put measured rows before the others of their table, in place of what was measured for the same bounds."""
    table: dict[str, list[dict[str, Any]]] = json.loads(path.read_text("utf-8")) if path.exists() else {}
    for op, measured in rows.items():
        done = [(row["arch"], row["where"]) for row in measured]
        kept = [row for row in table.get(op, []) if (row["arch"], row.get("where")) not in done]
        table[op] = [*measured, *kept]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile("w", dir=path.parent, suffix=".json", delete=False, encoding="utf-8") as file:
        lines = ",\n".join(
            f"  {json.dumps(op)}: [\n" + ",\n".join(f"    {json.dumps(row)}" for row in rows) + "\n  ]"
            for op, rows in table.items()
        )
        file.write("{\n" + lines + "\n}\n")
    os.replace(file.name, path)


def main(arguments: list[str] | None = None, progress: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Exit code of a run. progress: called with the numbers of tables done and in all."""
    parser = argparse.ArgumentParser(prog="python -m xclip_fast.kernels.tune", description=__doc__)
    parser.add_argument("--backends", action="store_true", help="the backends of the ops instead of Triton's tiles")
    known = sorted({*tiles.NAMES, *backends.NAMES})
    parser.add_argument("--op", action="append", choices=known, help="one table only; may be repeated")
    parser.add_argument("--model", choices=list(SHAPES), default="B/16", help="whose shapes (default: B/16)")
    parser.add_argument("--batch", type=int, nargs="+", default=BATCHES, help="numbers of videos (default: 1 32)")
    parser.add_argument("--seconds", type=float, default=60, help="begin nothing after that long (default: 60)")
    parser.add_argument("--commit", action="store_true", help="write the shipped table instead of the user's own")
    parser.add_argument("--rehearse", action="store_true", help="run it on the CPU with small shapes; write nothing")
    options = parser.parse_args(arguments)
    if not options.rehearse and not torch.cuda.is_available():
        print("error: tuning measures on a GPU, and torch.cuda.is_available() is False here", file=sys.stderr)
        return 1
    if importlib.util.find_spec("triton") is None:
        print("error: tuning times with Triton, which is not installed (pip install triton)", file=sys.stderr)
        return 1
    from ..triton import launching

    module: Any = backends if options.backends else tiles
    ops = options.op or module.NAMES
    if others := set(ops) - set(module.NAMES):
        other = "without" if options.backends else "with"
        parser.error(f"--op {min(others)} is measured {other} --backends; here: {', '.join(module.NAMES)}")
    table = (choices if options.backends else launching).TABLE
    path = table if options.commit else tables.user_table(table.name)
    batches, wrong, end = tuple(sorted(set(options.batch))), 0, time.monotonic() + options.seconds
    with measuring.rehearsed() if options.rehearse else contextlib.nullcontext():
        for index, op in enumerate(ops):
            progress(index, len(ops))
            # what is left of the time is shared by the tables that are left
            deadline = time.monotonic() + max(end - time.monotonic(), 0) / (len(ops) - index)
            rows, refused = measuring.measure(module, op, SHAPES[options.model], batches, deadline, print)
            wrong += refused
            if not options.rehearse:
                merge(path, {op: rows})
                tables.forget()
    progress(len(ops), len(ops))
    print("a rehearsal: nothing is written" if options.rehearse else f"written to {path}")
    if wrong:
        print(f"error: {wrong} backends or tiles compute something else and were left out", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

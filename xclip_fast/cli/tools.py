"""``flops``, ``convert``, ``export`` and ``info``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from ..console import plain, print_rows
from .options import PATH, FloatRange, argument, command, flag, frames, option, overwrite, path, quick_imports, variant

MOST = 65_536  # videos of a batch


@command()
@flag("--time", "Predict times on a GPU instead.")
@option("--gpu", "The GPU of --time.", click.Choice(["h100", "h200", "a100"]), default="h100", needs="time")
@option("--variants", "The models of --time.", default="B/16-8f,L/14-8f", needs="time")
@option("--batches", "The numbers of videos of --time.", default="1,32,256", needs="time")
@flag("--json", "Print JSON, with the parts of each sum.", "as_json")
def flops(time: bool, gpu: str, variants: str, batches: str, as_json: bool) -> None:
    """Count the multiply-adds of each variant, or predict its time on a GPU.

    In 10^9 for one video: the paper's number (Table 1), ours counted the paper's way, the ones that this package runs
    with 1 and with 400 labels, and those for 400 labels that are padded to 77 tokens.

    With --time, milliseconds for videos against 400 encoded labels in bfloat16. "limit" is the bare products and
    attention. "library" is what a GPU chooses before anything is measured on it, "triton" the products of Triton. Every
    launch is recorded, and divided by a ceiling; "x" is the time over the limit. Nothing is measured.
    """
    if time:
        _predict(gpu, variants.split(","), batches.split(","), as_json)
        return
    from ..flops import table

    rows = table()
    if as_json:
        print(json.dumps(rows, indent=2))
        return
    columns = [name for name in rows[0] if name not in ("variant", "parts")]
    cells = [(str(row["variant"]), *(f"{row[name]:.1f}" for name in columns)) for row in rows]
    print_rows(None, ("variant", *columns), cells, header_in_pipe=True)


def _predict(gpu: str, variants: list[str], batches: list[str], as_json: bool) -> None:
    from ..config import variant

    for name in variants:
        variant(name)
    if bad := [batch for batch in batches if not batch.isdecimal() or not 1 <= int(batch) <= MOST]:
        raise click.BadParameter(f"{bad[0]!r} is not a whole number from 1 to {MOST}", param_hint="--batches")
    with quick_imports():
        from ..time_model import GPUS, PLANS, predict

    rows = [
        [predict(variant, int(batch), GPUS[gpu], training=training, plan=plan) for plan in PLANS]
        for variant in variants
        for training in (False, True)
        for batch in batches
    ]
    if as_json:
        print(json.dumps([dataclasses.asdict(each) for row in rows for each in row], indent=2))
        return
    header = ["variant", "videos", "limit"]
    for plan in PLANS:
        header += [plan, "x"]
    cells = []
    for row in rows:
        limit = row[0].limit
        work = "training" if row[0].training else "inference"
        cell = [row[0].variant, f"{work} {row[0].batch}", f"{1e3 * limit:.2f}"]
        for each in row:
            cell += [f"{1e3 * each.seconds:.2f}", f"{each.seconds / limit:.2f}"]
        cells.append(tuple(cell))
    print(f"{gpu}: {GPUS[gpu]}", file=sys.stderr)
    print_rows(None, header, cells, header_in_pipe=True)


@command()
@option("--model", "Whose shapes.", click.Choice(["B/32", "B/16", "L/14", "L/14@336"]), default="B/16")
@option("--seconds", "Begin nothing after that long.", FloatRange(0), default=60.0)
@flag("--rehearse", "Run everything on the CPU with small shapes, and write nothing.")
def tune(model: str, seconds: float, rehearse: bool) -> None:
    """Measure on this GPU which kernels are the fastest, for later runs.

    First the tiles of the Triton kernels, then the backends. Every contender is compared with a reference before it is
    timed. The winners go to ~/.cache/xclip_fast.
    """
    from ..inference.tuning import tune as run

    if rehearse:  # read when the kernels are imported
        os.environ["TRITON_INTERPRET"] = "1"
    sys.exit(run(model, seconds, rehearse=rehearse))


@command()
@argument("source", "SOURCE", "Checkpoint in any layout, file or folder.", type=PATH)
@argument("folder", "FOLDER", "Folder to write.", type=PATH)
@option("--layout", "Layout of the result.", click.Choice(["xclip_fast", "huggingface"]), default="xclip_fast")
@flag("--drop-config", "Leave out a pickled training configuration.")
@path("--clip", "PATH", "For a ViFi-CLIP: the OpenAI CLIP it started from, whose token embedding its file lacks.")
@overwrite
def convert(source: Path, folder: Path, **settings: Any) -> None:
    """Convert a checkpoint to safetensors."""
    with quick_imports():
        from ..weights import checkpoint

    checkpoint.convert(source, folder, **settings)
    print(f"{plain(str(folder))}: written in the layout {settings['layout']}")


@command()
@argument("checkpoint", "CHECKPOINT", "Weights of any layout, file or folder.", type=PATH)
@argument("folder", "[FOLDER]", "The folder to write. Default: NAME-FORMAT here.", type=PATH, required=False)
@option("--format", "Whose files.", click.Choice(["onnx", "openvino", "tensorrt", "torch"]), default="onnx")
@option(
    "--dtype",
    "Precision; bfloat16 is for torch and tensorrt.",
    click.Choice(["float32", "float16", "bfloat16"]),
    default="float32",
)
@frames
@variant
@overwrite
def export(
    checkpoint: Path, folder: Path | None, format: str, dtype: str, variant: str | None, **settings: Any
) -> None:
    """Write a model as graphs that other engines run.

    The video tower, the text tower and the similarity, for any number of videos and labels. Each graph is compared with
    the model after it is written. If one differs, nothing is written and the exit code is 1. In a pipe, lines of file,
    bytes and the largest difference relative to the largest value.
    """
    with quick_imports():
        import torch

        from ..export import export_model
        from ..inference.placement import load_model

    target = folder or Path(f"{checkpoint.resolve().stem}-{format}")
    model = load_model(checkpoint, variant)
    found = export_model(model, target, format, dtype=getattr(torch, dtype), **settings)
    rows = [(each.file, str(each.bytes), f"{each.difference:.1e}") for each in found]
    print_rows(None, ("file", "bytes", "difference"), rows)


@command()
@flag("--json", "Print one JSON object.", "as_json")
def info(as_json: bool) -> None:
    """Show versions, devices and backends."""
    with quick_imports():
        from ..info import show

    show(as_json)

"""``flops``, ``convert``, ``export`` and ``info``."""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..console import plain, print_rows
from .options import Frames, Overwrite, Variant, load_model, quick_imports

commands = typer.Typer()


@commands.command()
def flops(
    time: Annotated[bool, typer.Option("--time", help="Predict times on a GPU instead.")] = False,
    gpu: Annotated[Literal["h100", "h200", "a100"], typer.Option(help="The GPU of --time.")] = "h100",
    variants: Annotated[str, typer.Option(help="The models of --time.")] = "B/16-8f,L/14-8f",
    batches: Annotated[str, typer.Option(help="The numbers of videos of --time.")] = "1,32,256",
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, with the parts of each sum.")] = False,
) -> None:
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
    from ..config import VARIANTS

    if unknown := [name for name in variants if name not in VARIANTS]:
        raise typer.BadParameter(f"{unknown[0]!r} is none of {', '.join(VARIANTS)}", param_hint="--variants")
    if bad := [batch for batch in batches if not batch.isdecimal() or not int(batch)]:
        raise typer.BadParameter(f"{bad[0]!r} is not a positive whole number", param_hint="--batches")
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


@commands.command()
def tune(
    model: Annotated[Literal["B/32", "B/16", "L/14", "L/14@336"], typer.Option(help="Whose shapes.")] = "B/16",
    seconds: Annotated[float, typer.Option(help="Begin nothing after that long.", min=0)] = 60.0,
    rehearse: Annotated[
        bool, typer.Option("--rehearse", help="Run everything on the CPU with small shapes, and write nothing.")
    ] = False,
) -> None:
    """Measure on this GPU which kernels are the fastest, for later runs.

    First the tiles of the Triton kernels, then the backends. Every contender is compared with a reference before it is
    timed. The winners go to ~/.cache/xclip_fast.
    """
    from ..inference.tuning import tune

    if rehearse:  # read when the kernels are imported
        os.environ["TRITON_INTERPRET"] = "1"
    raise typer.Exit(tune(model, seconds, rehearse=rehearse))


@commands.command()
def convert(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="Checkpoint in any layout, file or folder.")],
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder to write.")],
    layout: Annotated[Literal["xclip_fast", "huggingface"], typer.Option(help="Layout of the result.")] = "xclip_fast",
    drop_config: Annotated[
        bool, typer.Option("--drop-config", help="Leave out a pickled training configuration.")
    ] = False,
    clip: Annotated[
        Path | None,
        typer.Option(help="For a ViFi-CLIP: the OpenAI CLIP it started from, whose token embedding its file lacks."),
    ] = None,
    overwrite: Overwrite = False,
) -> None:
    """Convert a checkpoint to safetensors."""
    with quick_imports():
        from ..weights import checkpoint

    checkpoint.convert(source, folder, layout, drop_config=drop_config, overwrite=overwrite, clip=clip)
    print(f"{plain(str(folder))}: written in the layout {layout}")


@commands.command()
def export(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights of any layout, file or folder.")],
    folder: Annotated[
        Path | None,
        typer.Argument(metavar="FOLDER", help="The folder to write. Default: NAME-FORMAT here."),
    ] = None,
    format: Annotated[Literal["onnx", "openvino", "tensorrt", "torch"], typer.Option(help="Whose files.")] = "onnx",
    dtype: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="Precision; bfloat16 is for torch and tensorrt.")
    ] = "float32",
    frames: Frames = None,
    variant: Variant = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a model as graphs that other engines run.

    The video tower, the text tower and the similarity, for any number of videos and labels. Each graph is compared with
    the model after it is written. If one differs, nothing is written and the exit code is 1. In a pipe, lines of file,
    bytes and the largest difference relative to the largest value.
    """
    with quick_imports():
        import torch

        from ..export import export_model

    target = folder or Path(f"{checkpoint.resolve().stem}-{format}")
    model = load_model(checkpoint, variant, random_weights=False)
    found = export_model(model, target, format, dtype=getattr(torch, dtype), frames=frames, overwrite=overwrite)
    rows = [(each.file, str(each.bytes), f"{each.difference:.1e}") for each in found]
    print_rows(None, ("file", "bytes", "difference"), rows)


@commands.command()
def info(as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False) -> None:
    """Show versions, devices and backends."""
    with quick_imports():
        from ..info import show

    show(as_json)

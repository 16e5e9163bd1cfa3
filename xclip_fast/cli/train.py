"""``train``, ``evaluate``, ``protocol`` and ``few-shot``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import plain
from .options import (
    Actors,
    Address,
    Device,
    DType,
    Frames,
    FrameStride,
    OnRay,
    Overwrite,
    Sampled,
    Templates,
    Threads,
    Variant,
    parse_labels,
    set_threads,
)

commands = typer.Typer()


@commands.command()
def train(
    config: Annotated[
        str, typer.Argument(metavar="CONFIG", help="A YAML file, or the name of a shipped one.", show_default=False)
    ],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="KEY=VALUE...", help="Such as optim.lr=1e-5.", show_default=False)
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder instead of going on.")] = False,
) -> None:
    """Train or fine-tune.

    On several GPUs: torchrun --nproc-per-node 8 -m xclip_fast.train CONFIG KEY=VALUE...
    """
    from ..train.loop import main as run

    run(config, overrides or (), fresh=fresh)


@commands.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights.", show_default=False)],
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="What `index` wrote.", show_default=False)],
    clips: Annotated[int, typer.Option(min=1, help="Views in time; the paper's test has 4.")] = 1,
    crops: Annotated[int, typer.Option(help="Views in space, 1 or 3; the paper's test has 3.")] = 1,
    labels: Annotated[
        str | None, typer.Option(help="Labels to choose from (as for classify); default: the manifest's classes.")
    ] = None,
    templates: Templates = None,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For predictions, confusion and summary.")] = None,
    overwrite: Overwrite = False,
    variant: Variant = None,
    frames: Frames = None,
    sampling: Sampled = None,
    frame_stride: FrameStride = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Views at once.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Decoding processes; 0: none.")] = None,
    threads: Threads = None,
    ray: OnRay = False,
    address: Address = None,
    actors: Actors = None,
) -> None:
    """Measure accuracy on the videos of a manifest.

    Softmax is averaged over the views. Every video is accounted for: those that could not be read are named.
    """
    from ..evaluate import loop as evaluation

    set_threads(threads)
    run: Callable[..., Any] = evaluation.evaluate
    if ray:
        from ..scale.cluster import ClusterOptions
        from ..scale.evaluation import spread
        from ..scale.stage import ModelSpec

        run = spread(ModelSpec(str(checkpoint.absolute()), variant, device, dtype), ClusterOptions(address, actors))
    result = evaluation.main(
        checkpoint,
        manifest,
        out=out,
        overwrite=overwrite,
        clips=clips,
        crops=crops,
        frames=frames,
        sampling=sampling,
        stride=frame_stride,
        labels=None if labels is None else parse_labels(labels),
        templates=templates,
        variant=variant,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        workers=workers,
        run=run,
    )
    raise typer.Exit(int(result is not None and bool(result.failed)))


@commands.command()
def protocol(
    name: Annotated[
        str,
        typer.Argument(
            metavar="PROTOCOL",
            help="zero-shot-hmdb51, zero-shot-ucf101, zero-shot-kinetics600, few-shot-hmdb51 or few-shot-ucf101.",
            show_default=False,
        ),
    ],
    checkpoint: Annotated[Path, typer.Argument(metavar="CHECKPOINT", help="Weights.", show_default=False)],
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="MANIFEST...", help="The test splits: zero-shot three, otherwise one."),
    ],
    shots: Annotated[int | None, typer.Option(min=1, help="How many the checkpoint was trained on.")] = None,
    draws: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="A released class list of a draw. May be repeated.")
    ] = None,
    kinetics400: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Kinetics-400's class names, to draw new ones of Kinetics-600.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the draws.")] = 0,
    out: Annotated[Path | None, typer.Option(metavar="FOLDER", help="For everything that was found.")] = None,
    overwrite: Overwrite = False,
    variant: Variant = None,
    frames: Frames = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Views at once.")] = None,
    device: Device = "auto",
    dtype: DType = "auto",
    workers: Annotated[int | None, typer.Option(min=0, help="Decoding processes; 0: none.")] = None,
) -> None:
    """Run a zero-shot or few-shot protocol of the paper.

    Prints mean and deviation beside the paper's figures (Tables 3 to 5).
    """
    from ..evaluate import protocols

    protocols.main(
        name,
        checkpoint,
        manifests,
        out=out,
        overwrite=overwrite,
        shots=shots,
        draws=draws or (),
        kinetics400=kinetics400,
        seed=seed,
        variant=variant,
        frames=frames,
        batch_size=batch_size,
        device=device,
        dtype=dtype,
        workers=workers,
    )


@commands.command("few-shot")
def few_shot(
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="The training videos.", show_default=False)],
    shots: Annotated[int, typer.Option(min=1, help="Videos a class; the paper has 2, 4, 8 and 16.")],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help=".jsonl: a manifest to train on; .json, .csv: a list to keep.")
    ],
    seed: Annotated[int, typer.Option(min=0, help="Of the draw.")] = 0,
    overwrite: Overwrite = False,
) -> None:
    """Draw K videos of each class."""
    from ..evaluate import protocols

    drawn = protocols.sample(manifest, shots, out, seed=seed, overwrite=overwrite)
    print(f"{plain(str(out))}: {drawn} videos, {shots} a class")

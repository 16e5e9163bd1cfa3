"""``train``, ``evaluate``, ``protocol`` and ``few-shot``."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..console import plain
from . import options as opt

commands = typer.Typer()


@commands.command()
def train(
    config: Annotated[
        str,
        typer.Argument(
            metavar="CONFIG",
            help="YAML file, or a configuration of the package, such as template, motion or k400-b16-8f.",
        ),
    ],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="KEY=VALUE", help="Values in place of the file's, such as optim.lr=1e-5.", show_default=False
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over in a new folder instead of resuming.")] = False,
) -> None:
    """Train or fine-tune a model.

    The same command resumes a run that was stopped. On several GPUs:
    torchrun --nproc-per-node 8 -m xclip_fast train CONFIG KEY=VALUE...
    """
    with opt.quick_imports():
        from ..train import config as train_config
        from ..train.loop import train as run

    run(train_config.load(config, overrides or ()), fresh=fresh)


@commands.command()
def evaluate(
    checkpoint: opt.Weights,
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="Manifest that `index` wrote.")],
    clips: Annotated[int, typer.Option(min=1, help="Temporal views of a video. The paper tests with 4.")] = 1,
    crops: Annotated[int, typer.Option(help="Spatial views, 1 or 3. The paper tests with 3.")] = 1,
    labels: Annotated[
        str | None, typer.Option(help="Labels to choose from, as for classify. Default: the manifest's classes.")
    ] = None,
    templates: opt.Templates = None,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for predictions, confusion matrix and summary.")
    ] = None,
    overwrite: opt.Overwrite = False,
    variant: opt.Variant = None,
    frames: opt.Frames = None,
    sampling: opt.Sampled = None,
    frame_stride: opt.FrameStride = None,
    batch_size: opt.EvalBatchSize = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    workers: opt.EvalWorkers = None,
    threads: opt.Threads = None,
    ray: opt.OnRay = False,
    address: opt.Address = None,
    actors: opt.Actors = None,
) -> None:
    """Measure accuracy on the videos of a manifest.

    A video's probabilities are averaged over its views. Videos that cannot be read are named.
    """
    with opt.quick_imports():
        from .. import evaluate as evaluation

    opt.set_threads(threads)
    run: Callable[..., Any] = evaluation.evaluate
    if ray:
        from ..scale.evaluation import spread

        run = spread(*opt.cluster(checkpoint, variant, device, dtype, address, actors))
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
        labels=None if labels is None else opt.parse_labels(labels),
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
        ),
    ],
    checkpoint: opt.Weights,
    manifests: Annotated[
        list[Path],
        typer.Argument(metavar="MANIFEST", help="Test splits: three for zero-shot HMDB-51 and UCF-101, otherwise one."),
    ],
    shots: Annotated[int | None, typer.Option(min=1, help="Training videos of each class, for few-shot.")] = None,
    draws: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="File with the classes of a released draw. May be repeated."),
    ] = None,
    kinetics400: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Class names of Kinetics-400, to find the new ones of Kinetics-600."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draws.")] = 0,
    out: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Folder for the report and all predictions.")
    ] = None,
    overwrite: opt.Overwrite = False,
    variant: opt.Variant = None,
    frames: opt.Frames = None,
    batch_size: opt.EvalBatchSize = None,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    workers: opt.EvalWorkers = None,
) -> None:
    """Run a zero-shot or few-shot protocol of the paper.

    Prints the mean and the standard deviation beside the paper's figures (Tables 3 to 5).
    """
    with opt.quick_imports():
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
    manifest: Annotated[Path, typer.Argument(metavar="MANIFEST", help="Manifest of the training videos.")],
    shots: Annotated[int, typer.Option(min=1, help="Videos of each class. The paper has 2, 4, 8 and 16.")],
    out: Annotated[Path, typer.Option(metavar="FILE", help="Manifest to write, .jsonl, to train on.")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the draw.")] = 0,
    overwrite: opt.Overwrite = False,
) -> None:
    """Draw a few training videos of each class."""
    with opt.quick_imports():
        from ..evaluate import protocols

    drawn = protocols.sample(manifest, shots, out, seed=seed, overwrite=overwrite)
    print(f"{plain(str(out))}: {drawn} videos, {shots} a class")

"""``train``, ``evaluate``, ``protocol`` and ``few-shot``."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click

from ..console import plain
from . import options as opt


@opt.command()
@opt.argument(
    "config", "CONFIG", "YAML file, or a configuration of the package, such as template, motion or k400-b16-8f."
)
@opt.argument("overrides", "[KEY=VALUE]...", "Values in place of the file's, such as optim.lr=1e-5.", nargs=-1)
@opt.flag("--fresh", "Start over in a new folder instead of resuming.")
def train(config: str, overrides: Sequence[str], fresh: bool) -> None:
    """Train or fine-tune a model.

    The same command resumes a run that was stopped. On several GPUs:
    torchrun --nproc-per-node 8 -m xclip_fast train CONFIG KEY=VALUE...
    """
    with opt.quick_imports():
        from ..train import config as train_config
        from ..train.loop import train as run

    run(train_config.load(config, overrides), fresh=fresh)


@opt.command()
@opt.checkpoint
@opt.argument("manifest", "MANIFEST", "Manifest that `index` wrote.", type=opt.PATH)
@opt.option("--clips", "Temporal views of a video. The paper tests with 4.", opt.COUNT, default=1)
@opt.option("--crops", "Spatial views, 1 or 3. The paper tests with 3.", default=1)
@opt.option("--labels", "Labels to choose from, as for classify. Default: the manifest's classes.")
@opt.templates
@opt.path("--out", "FOLDER", "Folder for predictions, confusion matrix and summary.")
@opt.overwrite
@opt.variant
@opt.frames
@opt.sampling
@opt.frame_stride
@opt.views
@opt.device
@opt.dtype
@opt.processes
@opt.threads
@opt.ray
def evaluate(
    checkpoint: Path,
    manifest: Path,
    labels: str | None,
    frame_stride: int | None,
    variant: str | None,
    device: str,
    dtype: str,
    threads: int | None,
    ray: opt.Ray,
    **settings: Any,
) -> None:
    """Measure accuracy on the videos of a manifest.

    A video's probabilities are averaged over its views. Videos that cannot be read are named.
    """
    with opt.quick_imports():
        from .. import evaluate as evaluation

    opt.set_threads(threads)
    run: Callable[..., Any] = evaluation.evaluate
    if ray.ray:
        from ..scale.evaluation import spread

        run = spread(*ray.cluster(opt.Model(checkpoint, variant, False, device, dtype)))
    result = evaluation.main(
        checkpoint,
        manifest,
        stride=frame_stride,
        labels=None if labels is None else opt.parse_labels(labels),
        variant=variant,
        device=device,
        dtype=dtype,
        run=run,
        **settings,
    )
    sys.exit(result is not None and bool(result.failed))


@opt.command()
@opt.argument(
    "name",
    "PROTOCOL",
    "zero-shot-hmdb51, zero-shot-ucf101, zero-shot-kinetics600, few-shot-hmdb51 or few-shot-ucf101.",
)
@opt.checkpoint
@opt.argument(
    "manifests",
    "MANIFEST...",
    "Test splits: three for zero-shot HMDB-51 and UCF-101, otherwise one.",
    type=opt.PATH,
    nargs=-1,
    required=True,
)
@opt.option("--shots", "Training videos of each class, for few-shot.", opt.COUNT)
@opt.path("--draws", "FILE", "File with the classes of a released draw. May be repeated.", multiple=True)
@opt.path("--kinetics400", "FILE", "Class names of Kinetics-400, to find the new ones of Kinetics-600.")
@opt.option("--seed", "Seed of the draws.", click.IntRange(0), default=0)
@opt.path("--out", "FOLDER", "Folder for the report and all predictions.")
@opt.overwrite
@opt.variant
@opt.frames
@opt.views
@opt.device
@opt.dtype
@opt.processes
def protocol(name: str, checkpoint: Path, manifests: Sequence[Path], **settings: Any) -> None:
    """Run a zero-shot or few-shot protocol of the paper.

    Prints the mean and the standard deviation beside the paper's figures (Tables 3 to 5).
    """
    with opt.quick_imports():
        from ..evaluate import protocols

    protocols.main(name, checkpoint, manifests, **settings)


@opt.command()
@opt.argument("manifest", "MANIFEST", "Manifest of the training videos.", type=opt.PATH)
@opt.option("--shots", "Videos of each class. The paper has 2, 4, 8 and 16.", opt.COUNT, required=True)
@opt.path("--out", "FILE", "Manifest to write, .jsonl, to train on.", required=True)
@opt.option("--seed", "Seed of the draw.", click.IntRange(0), default=0)
@opt.overwrite
def few_shot(manifest: Path, shots: int, out: Path, seed: int, overwrite: bool) -> None:
    """Draw a few training videos of each class."""
    with opt.quick_imports():
        from ..evaluate import protocols

    drawn = protocols.sample(manifest, shots, out, seed=seed, overwrite=overwrite)
    print(f"{plain(str(out))}: {drawn} videos, {shots} a class")

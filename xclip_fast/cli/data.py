"""``index``, ``transcode`` and ``motion``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..console import Bar, complain, plain
from .options import COUNT, PATH, FloatRange, argument, command, flag, option, path


@command()
@argument("source", "DIR|LIST", "Folder of videos, list, or tar shards.", type=PATH)
@path("--out", "FILE", "Manifest to write. Default: beside the data.")
@path("--labels", "FILE", "Class names: a .csv with id,name, or one name on each line.")
@option("--split", "Part of the data: val, train1, test3, or a subfolder.")
@path("--root", "DIR", "Folder that the paths of a list are relative to.")
@option("--format", "folder, flat, lines, kinetics, ucf101, hmdb51 or tar. Default: by content.")
@path("--reuse", "FILE", "Take over facts from a manifest of the same files. May be repeated.", multiple=True)
@flag("--follow-links", "Allow symbolic links that lead out of the data folder.")
@option("--timeout", "Give up on a file that takes longer.", float, metavar="SECONDS", default=120)
@option("--workers", "Reading processes; 0: read in this one. Default: one for each core.", click.IntRange(0, 1024))
def index(source: Path, out: Path | None, split: str | None, **settings: Any) -> None:
    """Read every video of a data set once and write a manifest.

    A second run reads only new and changed files. A killed run goes on. The manifest lists unusable videos with the
    reason.
    """
    from ..data import manifest

    out = out or manifest.default_out(source, split)
    with Bar() as bar:
        found = manifest.index(source, out, split=split, progress=bar.update, **settings)
    print(manifest.summary(found))
    print(f"written: {plain(str(out))}")
    sys.exit(not len(found.usable))


@command()
@argument("source", "DIR|VIDEO", "Folder or file to copy.", type=PATH)
@argument("out", "FOLDER", "Folder for the copies.", type=PATH)
@option("--short-side", "Short side in pixels. Smaller videos keep their size.", click.IntRange(16), default=256)
@option(
    "--for",
    "any: every 12th frame is a keyframe. training: every frame is, best for few frames.",
    click.Choice(["any", "training"]),
    "purpose",
    default="any",
)
@option("--keyframe-every", "Frames from one keyframe to the next. Default: by --for.", COUNT)
@option("--crf", "Quality of x264; lower is better and larger.", FloatRange(0, 51), default=20)
@option("--preset", "Preset of x264, its effort.", default="veryfast")
@option("--workers", "Threads. Default: one for each core.", click.IntRange(1, 256))
@flag("--overwrite", "Replace copies made with other settings.")
def transcode(source: Path, out: Path, **settings: Any) -> None:
    """Copy videos into a form that decodes fast.

    Copies are H.264 and upright, with a short side of at most 256 and a keyframe every 12 frames. They keep all
    frames. Training reads a few frames of each video again and again, and from a copy this takes a fraction of the
    time. Sources are never changed. A killed run goes on.
    """
    from ..data.transcode.transcoder import transcode as run

    with Bar() as bar:
        summary = run(source, out, progress=bar.update, **settings)
    for name, reason in summary.damaged.items():
        print(f"note: {plain(name)}: damaged: {plain(reason)}", file=sys.stderr)
    for name, reason in summary.failed.items():
        complain(reason if name in reason else f"{name}: {reason}")
    print(f"{plain(str(out))}: {summary}")
    sys.exit(bool(summary.failed))


@command()
@argument("folder", "FOLDER", "Folder that gets train/ and test/.", type=PATH)
@option("--clips", "Training clips of each of the ten classes.", COUNT, default=1000)
@option("--test-clips", "Test clips of each class.", COUNT, default=100)
@option("--size", "Width and height in pixels.", click.IntRange(16), default=64)
@option("--seed", "Seed of the random clips.", click.IntRange(0), default=0)
def motion(folder: Path, clips: int, test_clips: int, size: int, seed: int) -> None:
    """Generate small clips to try training on.

    The classes differ in the order of their frames. The command writes mp4 files and manifests. `xclip-fast train
    motion` reads them from data/motion.
    """
    if size % 2:
        raise click.BadParameter(f"{size} is odd, and H.264 needs even numbers", param_hint="--size")
    from ..data import manifest
    from ..data.motion import CLASSES, write_dataset

    for number, (split, count) in enumerate({"train": clips, "test": test_clips}.items()):
        with Bar() as bar:
            write_dataset(folder / split, count, 2 * seed + number, size=(size, size), progress=bar.update)
        manifest.index(folder / split, labels=CLASSES)
        print(f"{plain(str(folder / split))}: {count * len(CLASSES)} clips of {len(CLASSES)} classes")

"""``index``, ``transcode`` and ``motion``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Literal

import typer

from ..console import Bar, complain, plain

commands = typer.Typer()


@commands.command()
def index(
    source: Annotated[Path, typer.Argument(metavar="DIR|LIST", help="Folder of videos, list, or tar shards.")],
    out: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Manifest to write. Default: beside the data.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: a .csv with id,name, or one name on each line.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Part of the data: val, train1, test3, or a subfolder.")] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Folder that the paths of a list are relative to.")
    ] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="folder, flat, lines, kinetics, ucf101, hmdb51 or tar. Default: by content."),
    ] = None,
    reuse: Annotated[
        list[Path] | None,
        typer.Option(metavar="FILE", help="Take over facts from a manifest of the same files. May be repeated."),
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Allow symbolic links that lead out of the data folder.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="Give up on a file that takes longer.")] = 120,
    workers: Annotated[
        int | None,
        typer.Option(min=0, max=1024, help="Reading processes; 0: read in this one. Default: one for each core."),
    ] = None,
) -> None:
    """Read every video of a data set once and write a manifest.

    A second run reads only new and changed files. A killed run goes on. The manifest lists unusable videos with the
    reason.
    """
    from ..data import manifest

    out = out or manifest.default_out(source, split)
    with Bar() as bar:
        found = manifest.index(
            source,
            out,
            labels=labels,
            split=split,
            root=root,
            format=form,
            reuse=reuse or (),
            follow_links=follow_links,
            workers=workers,
            timeout=timeout,
            progress=bar.update,
        )
    print(manifest.summary(found))
    print(f"written: {plain(str(out))}")
    raise typer.Exit(int(not len(found.usable)))


@commands.command()
def transcode(
    source: Annotated[Path, typer.Argument(metavar="DIR|VIDEO", help="Folder or file to copy.")],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder for the copies.")],
    short_side: Annotated[
        int, typer.Option(min=16, help="Short side in pixels. Smaller videos keep their size.")
    ] = 256,
    purpose: Annotated[
        Literal["any", "training"],
        typer.Option(
            "--for", help="any: every 12th frame is a keyframe. training: every frame is, best for few frames."
        ),
    ] = "any",
    keyframe_every: Annotated[
        int | None, typer.Option(min=1, help="Frames from one keyframe to the next. Default: by --for.")
    ] = None,
    crf: Annotated[float, typer.Option(min=0, max=51, help="Quality of x264; lower is better and larger.")] = 20,
    preset: Annotated[str, typer.Option(help="Preset of x264, its effort.")] = "veryfast",
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads. Default: one for each core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace copies made with other settings.")] = False,
) -> None:
    """Copy videos into a form that decodes fast.

    Copies are H.264 and upright, with a short side of at most 256 and a keyframe every 12 frames. They keep all
    frames. Training reads a few frames of each video again and again, and from a copy this takes a fraction of the
    time. Sources are never changed. A killed run goes on.
    """
    from ..data.transcode.transcoder import transcode as run

    with Bar() as bar:
        summary = run(
            source,
            out,
            short_side=short_side,
            keyframe_every=keyframe_every,
            crf=crf,
            preset=preset,
            workers=workers,
            overwrite=overwrite,
            purpose=purpose,
            progress=bar.update,
        )
    for name, reason in summary.damaged.items():
        print(f"note: {plain(name)}: damaged: {plain(reason)}", file=sys.stderr)
    for name, reason in summary.failed.items():
        complain(reason if name in reason else f"{name}: {reason}")
    print(f"{plain(str(out))}: {summary}")
    raise typer.Exit(int(bool(summary.failed)))


@commands.command()
def motion(
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Folder that gets train/ and test/.")],
    clips: Annotated[int, typer.Option(min=1, help="Training clips of each of the ten classes.")] = 1000,
    test_clips: Annotated[int, typer.Option(min=1, help="Test clips of each class.")] = 100,
    size: Annotated[int, typer.Option(min=16, help="Width and height in pixels.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the random clips.")] = 0,
) -> None:
    """Generate small clips to try training on.

    The classes differ in the order of their frames. The command writes mp4 files and manifests. `xclip-fast train
    motion` reads them from data/motion.
    """
    if size % 2:
        raise typer.BadParameter(f"{size} is odd, and H.264 needs even numbers", param_hint="--size")
    from ..data import manifest
    from ..data.motion import CLASSES, write_dataset

    for number, (split, count) in enumerate({"train": clips, "test": test_clips}.items()):
        with Bar() as bar:
            write_dataset(folder / split, count, 2 * seed + number, size=(size, size), progress=bar.update)
        manifest.index(folder / split, labels=CLASSES)
        print(f"{plain(str(folder / split))}: {count * len(CLASSES)} clips of {len(CLASSES)} classes")

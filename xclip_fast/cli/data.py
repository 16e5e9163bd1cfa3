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
    source: Annotated[
        Path, typer.Argument(metavar="DIR|LIST", help="A folder of videos, a list, or tar shards.", show_default=False)
    ],
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Default: beside the data.")] = None,
    labels: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Class names: a csv of id,name or one name a line.")
    ] = None,
    split: Annotated[str | None, typer.Option(help="Which part: val, train1, test3, or a subfolder.")] = None,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="What a list's paths are relative to.")] = None,
    form: Annotated[
        str | None,
        typer.Option("--format", help="folder, flat, lines, kinetics, ucf101, hmdb51 or tar; default: by content."),
    ] = None,
    reuse: Annotated[
        list[Path] | None, typer.Option(metavar="FILE", help="Another manifest of the same files. May be repeated.")
    ] = None,
    follow_links: Annotated[
        bool, typer.Option("--follow-links", help="Symbolic links may lead out of the data folder.")
    ] = False,
    timeout: Annotated[float, typer.Option(metavar="SECONDS", help="A file that takes longer is given up.")] = 120,
    workers: Annotated[int | None, typer.Option(min=0, help="Processes that read; default: one per core.")] = None,
) -> None:
    """Look at every video of a data set once and write a manifest.

    A second run looks only at what is new or changed, and a killed one goes on. Videos that cannot be used are listed
    with the reason.
    """
    from ..data.manifest import manifest

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
    source: Annotated[Path, typer.Argument(metavar="DIR|VIDEO", help="What to copy.", show_default=False)],
    out: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where the copies go.", show_default=False)],
    short_side: Annotated[int, typer.Option(min=16, help="Pixels; smaller videos keep their size.")] = 256,
    purpose: Annotated[
        Literal["any", "training"],
        typer.Option("--for", help="training: every frame a keyframe, fastest for few frames; any: one in 12."),
    ] = "any",
    keyframe_every: Annotated[
        int | None, typer.Option(min=1, help="Frames from one keyframe to the next; default: by --for.")
    ] = None,
    crf: Annotated[float, typer.Option(min=0, max=51, help="x264's quality; lower is better and larger.")] = 20,
    preset: Annotated[str, typer.Option(help="x264's effort.")] = "veryfast",
    workers: Annotated[int | None, typer.Option(min=1, max=256, help="Threads; default: one per core.")] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace copies made with other settings.")] = False,
) -> None:
    """Copy videos into a form that decodes fast.

    H.264, short side at most 256, a keyframe every 12 frames, upright; frame for frame the same. Training reads a few
    frames of each video again and again, which then costs a fraction: with --for training, every frame is a keyframe.
    Sources are never touched; a killed run goes on.
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
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Gets train and test in it.", show_default=False)],
    clips: Annotated[int, typer.Option(min=1, help="Training clips of each of the ten classes.")] = 1000,
    test_clips: Annotated[int, typer.Option(min=1, help="Test clips of each class.")] = 100,
    size: Annotated[int, typer.Option(min=16, help="Pixels of a side.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Other clips with another.")] = 0,
) -> None:
    """Generate clips whose classes differ in the order of their frames.

    Small mp4 files with manifests, to try training on: `xclip-fast train motion` takes them from data/motion.
    """
    from ..data.manifest import manifest
    from ..data.motion import CLASSES, write_dataset

    for number, (split, count) in enumerate({"train": clips, "test": test_clips}.items()):
        with Bar() as bar:
            write_dataset(folder / split, count, 2 * seed + number, size=(size, size), progress=bar.update)
        manifest.index(folder / split, labels=CLASSES)
        print(f"{plain(str(folder / split))}: {count * len(CLASSES)} clips of {len(CLASSES)} classes")

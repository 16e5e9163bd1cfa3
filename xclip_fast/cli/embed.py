"""``embed``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from ..console import Bar, complain, plain
from . import options as opt

commands = typer.Typer()


@commands.command()
def embed(
    videos: opt.Videos = None,
    out: Annotated[
        Path,
        typer.Option(metavar="STORE", help="Folder of the store. Or NAME.parquet, for other programs."),
    ] = ...,  # type: ignore[assignment]  # typer's mark of a required option
    checkpoint: opt.Checkpoint = None,
    variant: opt.Variant = None,
    random_weights: opt.RandomWeights = False,
    window: opt.Window = None,
    stride: opt.Stride = None,
    patches: Annotated[
        bool | None,
        typer.Option(
            "--patches/--no-patches", help="Also store patch features, for better ranking. Default: as the store."
        ),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Store paths relative to this folder. Default: absolute.")
    ] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Find changed files by content, not by time.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try unchanged files again that failed before.")] = False,
    index: Annotated[bool, typer.Option("--index", help="Build a vector index, for 100,000 moments or more.")] = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    frames: opt.Frames = None,
    sampling: opt.Sampled = None,
    frame_stride: opt.FrameStride = None,
    max_bytes: opt.MaxBytes = 2 << 30,
    max_seconds: opt.MaxSeconds = 600,
    batch_size: opt.BatchSize = None,
    workers: opt.Workers = None,
    threads: opt.Threads = None,
    ray: opt.OnRay = False,
    address: opt.Address = None,
    actors: opt.Actors = None,
    decoders: opt.Decoders = None,
) -> None:
    """Store features of videos for search.

    Run it again at any time: it adds new videos, embeds changed ones again, and removes those that are gone from the
    given folders. A stopped run goes on. Videos longer than 30 s are cut into moments of 10 s, one every 5 s. The store
    keeps the settings that it was made with.
    """
    if out.suffix == ".safetensors":
        why = f"name a folder for a store ({out.with_suffix('')}) or for Parquet files ({out.with_suffix('.parquet')})"
        raise typer.BadParameter(why, param_hint="--out")
    if not videos and not index:
        raise typer.BadParameter("no videos given", param_hint="VIDEO")
    inputs, failed = opt.find_videos(videos) if videos else (None, False)
    if inputs is not None and not inputs.paths and not out.exists():
        raise typer.Exit(1)  # the folders are empty, and no store has rows of them
    opt.set_threads(threads)
    with opt.quick_imports():
        from ..data.remote import Limits
        from ..inference.placement import placed
        from ..inference.tuning import tune_before
        from ..search.index import PARQUET, Index
        from ..search.store import Store, is_store

    if index and out.suffix == PARQUET:
        raise typer.BadParameter(f"works with a store only; {out} holds Parquet files", param_hint="--index")
    if is_store(out):
        checkpoint, variant = opt.stored_weights(out, checkpoint, variant, random_weights)
    target = placed(device, dtype)
    model = opt.load_model(checkpoint, variant, random_weights)
    opened = Index.open(
        out,
        checkpoint,
        model=model,
        root=root,
        **target,
        variant=variant,
        window=window,
        stride=stride,
        patches=patches,
        frames=frames,
        sampling=sampling,
        frame_stride=frame_stride,
    )
    store = opened.store
    if inputs is not None:
        limits = Limits(max_bytes, max_seconds)
        embedding = None
        if ray:
            from ..scale.cluster import cluster_answers
            from ..scale.stage import VideoStage

            spec, spread = opt.cluster(checkpoint, variant, device, dtype, address, actors, decoders, batch_size)
            stage = VideoStage(spec, opened.reading(limits), bool(store.settings.patches))
            columns = ("vector", "patches") if store.settings.patches else ("vector",)
            embedding = cluster_answers(stage, spread, columns)
        else:
            tune_before(model.config, len(inputs.paths), target["device"])
        with Bar() as bar:
            summary = opened.add(
                inputs,
                batch_size=batch_size,
                workers=workers,
                digest=digest,
                retry=retry,
                limits=limits,
                embed=embedding,
                on_file=lambda path, error: bar.advance(),
                on_plan=lambda total: bar.update(0, total),
            )
        for name, reason in summary.failed.items():
            if reason not in inputs.empty:
                failed |= complain(reason if os.path.basename(name) in reason else f"{name}: {reason}")
        files, moments, _ = store.counts()
        print(f"{plain(str(out))}: {summary}; it holds {moments} moments of {files} videos")
    if index and isinstance(store, Store):
        store.build_index()
        print(f"{plain(str(out))}: index built over {len(opened)} moments")
    raise typer.Exit(int(failed))

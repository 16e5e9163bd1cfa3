"""``embed``."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

import click

from ..console import Bar, complain, plain
from . import options as opt


@opt.command()
@opt.argument("videos", "[VIDEO]...", opt.VIDEOS, nargs=-1)
@opt.path("--out", "STORE", "Folder of the store. Or NAME.parquet, for other programs.", required=True)
@opt.model
@opt.option(
    "--patches/--no-patches", "Also store patch features, for better ranking. Default: as the store.", default=None
)
@opt.path("--root", "DIR", "Store paths relative to this folder. Default: absolute.")
@opt.flag("--digest", "Find changed files by content, not by time.")
@opt.flag("--retry", "Try unchanged files again that failed before.")
@opt.flag("--index", "Build a vector index, for 100,000 moments or more.")
@opt.reading
@opt.ray
def embed(
    videos: Sequence[str],
    out: Path,
    model: opt.Model,
    patches: bool | None,
    root: Path | None,
    digest: bool,
    retry: bool,
    index: bool,
    reading: opt.Reading,
    ray: opt.Ray,
) -> None:
    """Store features of videos for search.

    Run it again at any time: it adds new videos, embeds changed ones again, and removes those that are gone from the
    given folders. A stopped run goes on. Videos longer than 30 s are cut into moments of 10 s, one every 5 s. The store
    keeps the settings that it was made with.
    """
    if out.suffix == ".safetensors":
        why = f"name a folder for a store ({out.with_suffix('')}) or for Parquet files ({out.with_suffix('.parquet')})"
        raise click.BadParameter(why, param_hint="--out")
    if not videos and not index:
        raise click.BadParameter("no videos given", param_hint="VIDEO")
    inputs, failed = opt.find_videos(videos) if videos else (None, False)
    if inputs is not None and not inputs.paths and not out.exists():
        sys.exit(1)  # the folders are empty, and no store has rows of them
    opt.set_threads(reading.threads)
    with opt.quick_imports():
        from ..inference.placement import placed
        from ..inference.tuning import tune_before
        from ..search.index import PARQUET, Index
        from ..search.store import Store, is_store

    if index and out.suffix == PARQUET:
        raise click.BadParameter(f"works with a store only; {out} holds Parquet files", param_hint="--index")
    if is_store(out):
        model = model.of_store(out)
    target = placed(model.device, model.dtype)
    loaded = model.load()
    opened = Index.open(
        out,
        model.checkpoint,
        model=loaded,
        root=root,
        **target,
        variant=model.variant,
        window=reading.window,
        stride=reading.stride,
        patches=patches,
        frames=reading.frames,
        sampling=reading.sampling,
        frame_stride=reading.frame_stride,
    )
    store = opened.store
    if inputs is not None:
        embedding = None
        if ray.ray:
            from ..scale.cluster import cluster_answers
            from ..scale.stage import VideoStage

            spec, spread = ray.cluster(model, reading.decoders, reading.batch_size)
            stage = VideoStage(spec, opened.reading(reading.limits()), bool(store.settings.patches))
            columns = ("vector", "patches") if store.settings.patches else ("vector",)
            embedding = cluster_answers(stage, spread, columns)
        else:
            tune_before(loaded.config, len(inputs.paths), target["device"])
        with Bar() as bar:
            summary = opened.add(
                inputs,
                batch_size=reading.batch_size,
                workers=reading.workers,
                digest=digest,
                retry=retry,
                limits=reading.limits(),
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
    sys.exit(failed)

"""``embed``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Bar, complain, plain
from . import options as opt

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..model import XCLIP

commands = typer.Typer()
_FILE = ".safetensors"


@commands.command()
def embed(
    videos: opt.Videos = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="STORE", help="Folder of the store. Or NAME.parquet, or NAME.safetensors for a small set."
        ),
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
    imported: Annotated[
        list[Path] | None, typer.Option("--import", metavar="FILE", help="Add the features of a .safetensors file.")
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="Build a vector index, for 100,000 moments or more.")] = False,
    overwrite: opt.Overwrite = False,
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
    given = videos or []
    opt.set_threads(threads)
    if out.suffix == _FILE:
        refused = {
            "--window": window,
            "--stride": stride,
            "--root": root,
            "--import": imported,
            "--index": index,
            "--ray": ray,
        }
        for option, value in refused.items():
            if value:
                raise typer.BadParameter(f"works with a store only; {out} is a file", param_hint=option)
        inputs, failed = opt.find_videos(given)
        model = opt.load_model(checkpoint, variant, random_weights)
        chosen = {"frames": frames, "sampling": sampling, "stride": frame_stride}
        placed = opt.device_and_dtype(device, dtype)
        run = {"batch_size": batch_size, "workers": workers}
        raise typer.Exit(
            int(_embed_file(inputs, out, model, placed, checkpoint, variant, patches, overwrite, chosen, run) or failed)
        )
    if not given and not imported and not index:
        raise typer.BadParameter("no videos given", param_hint="VIDEO")
    from ..inference.tuning import tune_before
    from ..search.feature_file import import_features
    from ..search.parquet import ParquetFolder
    from ..search.store import Store, is_store

    if is_store(out):
        checkpoint, variant = opt.stored_weights(out, checkpoint, variant, random_weights)
    target = opt.device_and_dtype(device, dtype)
    model = opt.load_model(checkpoint, variant, random_weights)
    from ..search.index import Index, open_store

    store = open_store(
        out,
        model,
        checkpoint=checkpoint,
        root=root,
        variant=variant,
        window=window,
        stride=stride,
        patches=patches,
        frames=frames,
        sampling=sampling,
        frame_stride=frame_stride,
    )
    opened = Index(store, model.to(**target), None if root is None else str(root))
    failed = False
    if isinstance(store, ParquetFolder) and (imported or index):
        raise typer.BadParameter(f"works with a store only; {out} holds Parquet files", param_hint="--import, --index")
    for file in imported or ():
        assert isinstance(store, Store)
        taken = import_features(store, file)
        for reason in taken.failed.values():
            failed |= complain(reason)
        print(f"{plain(str(out))}: {len(taken.added)} videos of {plain(str(file))} imported")
    if given:
        inputs, missing = opt.find_videos(given)
        failed |= missing
        from ..data.remote import Limits

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
                on_plan=bar.begin,
            )
        for name, reason in summary.failed.items():
            if reason not in inputs.empty:
                failed |= complain(reason if name in reason else f"{name}: {reason}")
        files, moments, _ = store.counts()
        print(f"{plain(str(out))}: {summary}; it holds {moments} moments of {files} videos")
    if index and isinstance(store, Store):
        store.build_index()
        print(f"{plain(str(out))}: index built over {len(opened)} moments")
    raise typer.Exit(int(failed))


def _embed_file(
    inputs: Inputs,
    out: Path,
    model: XCLIP,
    placed: dict[str, Any],
    checkpoint: Path | None,
    variant: str | None,
    patches: bool | None,
    overwrite: bool,
    chosen: dict[str, Any],
    run: dict[str, int | None],
) -> bool:
    """Writes the features of all videos into one file. Returns True if something failed."""
    from ..inference.batches import Reading, answers
    from ..inference.tuning import tune_before
    from ..search.feature_file import check_out, fingerprint, write_features
    from ..weights.recipe import Trained

    try:
        check_out(out, overwrite)
    except FileExistsError:
        raise
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="--out") from error
    choice = Trained.read(checkpoint).choose(**chosen)
    config, keep = model.config, 1 if patches is False else 2
    frames = choice["frames"] or config.num_frames
    metadata = {
        "fingerprint": fingerprint(model),
        "checkpoint": "" if checkpoint is None else str(checkpoint.resolve()),
        "variant": config.variant_name or variant or "",
        "frames": str(frames),
    }
    model.to(**placed)
    reading = Reading(frames, config.vision.image_size, choice["sampling"], choice["stride"])
    tune_before(config, len(inputs.paths), placed["device"])
    failed = False
    with Bar(len(inputs.paths)) as bar:

        def done(path: str, error: ValueError | None) -> None:
            nonlocal failed
            bar.advance()
            failed |= error is not None and complain(error, bar)

        found = answers(model, inputs.paths, reading, lambda features: features[:keep], **run)
        count, shape = write_features(
            out, model, found, len(inputs.paths), metadata=metadata, overwrite=overwrite, on_file=done
        )
    if not count:
        return complain(f"no video could be read, so {out} is not written")
    size = f"{shape[0]} numbers each, {'without' if keep == 1 else 'with'} patches"
    print(f"{plain(str(out))}: {count} of {len(inputs.paths)} videos, {size}")
    return failed

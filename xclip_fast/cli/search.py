"""``embed`` and ``search``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import Bar, complain, plain, print_rows
from .options import (
    Actors,
    Address,
    AsJson,
    BatchSize,
    Checkpoint,
    Decoders,
    Device,
    DType,
    Frames,
    FrameStride,
    MaxBytes,
    MaxSeconds,
    OnRay,
    Overwrite,
    RandomWeights,
    Sampled,
    Stride,
    Threads,
    Top,
    Variant,
    Window,
    Workers,
    device_and_dtype,
    find_videos,
    load_model,
    set_threads,
)

if TYPE_CHECKING:
    from ..data.inputs import Inputs
    from ..model import XCLIP
    from ..search.query import Hit

commands = typer.Typer()
_FILE = ".safetensors"


@commands.command()
def embed(
    videos: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[VIDEO...]",
            help="Files, folders, quoted globs, lists (.txt, .jsonl), addresses; - for paths on standard input.",
            show_default=False,
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(metavar="STORE", help="A folder that grows; NAME.parquet; or NAME.safetensors, for small sets."),
    ] = ...,  # type: ignore[assignment]  # typer's mark of an option that must be given
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = False,
    window: Window = None,
    stride: Stride = None,
    patches: Annotated[
        bool | None,
        typer.Option("--patches/--no-patches", help="Patch features too, for prompts; default: as the store, or none."),
    ] = None,
    root: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Store paths relative to this folder; default: absolute.")
    ] = None,
    digest: Annotated[bool, typer.Option("--digest", help="Compare contents, not times of change.")] = False,
    retry: Annotated[bool, typer.Option("--retry", help="Try failed files again that did not change.")] = False,
    imported: Annotated[
        list[Path] | None, typer.Option("--import", metavar="FILE", help="Take over features from a .safetensors file.")
    ] = None,
    index: Annotated[bool, typer.Option("--index", help="Build a vector index: for 100,000 moments and more.")] = False,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DType = "auto",
    frames: Frames = None,
    sampling: Sampled = None,
    frame_stride: FrameStride = None,
    max_bytes: MaxBytes = 2 << 30,
    max_seconds: MaxSeconds = 600,
    batch_size: BatchSize = None,
    workers: Workers = None,
    threads: Threads = None,
    ray: OnRay = False,
    address: Address = None,
    actors: Actors = None,
    decoders: Decoders = None,
) -> None:
    """Store features of videos, for search.

    Adds what is new, embeds again what changed, drops what is gone from the given folders. It may be stopped at any
    time and run again. Videos longer than 30 s are cut into moments of 10 s, one every 5 s; with --window, every video
    longer than the window. What a store was made with is kept in it.
    """
    given = videos or []
    set_threads(threads)
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
                raise typer.BadParameter(f"needs a store; {out} is a file", param_hint=option)
        inputs, failed = find_videos(given)
        model = load_model(checkpoint, variant, random_weights)
        chosen = {"frames": frames, "sampling": sampling, "stride": frame_stride}
        placed = device_and_dtype(device, dtype)
        run = {"batch_size": batch_size, "workers": workers}
        raise typer.Exit(
            int(_embed_file(inputs, out, model, placed, checkpoint, variant, patches, overwrite, chosen, run) or failed)
        )
    if not given and not imported and not index:
        raise typer.BadParameter("none given", param_hint="VIDEO...")
    from ..search.feature_file import import_features
    from ..search.parquet import ParquetFolder
    from ..search.store import Store, is_store

    if is_store(out):
        checkpoint, variant = _stored_weights(out, checkpoint, variant, random_weights)
    target = device_and_dtype(device, dtype)
    model = load_model(checkpoint, variant, random_weights)
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
        raise typer.BadParameter(f"needs a store; {out} holds Parquet files", param_hint="--import, --index")
    for file in imported or ():
        assert isinstance(store, Store)
        print(f"{plain(str(out))}: {import_features(store, file)} videos of {plain(str(file))} imported")
    if given:
        inputs, failed = find_videos(given)
        from ..data.remote import Limits

        limits = Limits(max_bytes, max_seconds)
        embedding = None
        if ray:
            from ..scale.cluster import ClusterOptions, cluster_answers
            from ..scale.stage import ModelSpec, VideoStage

            spec = ModelSpec(None if checkpoint is None else str(checkpoint.absolute()), variant, device, dtype)
            stage = VideoStage(spec, opened.reading(limits), bool(store.settings.patches))
            columns = ("vector", "patches") if store.settings.patches else ("vector",)
            spread = ClusterOptions(address, actors, decoders=decoders, batch_size=batch_size or 16)
            embedding = cluster_answers(stage, spread, columns)
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
    """Everything into one file; whether something failed."""
    from ..config import VARIANTS
    from ..inference.batches import Reading, answers
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
        "variant": next((name for name, row in VARIANTS.items() if row == config), variant or ""),
        "frames": str(frames),
    }
    model.to(**placed)
    reading = Reading(frames, config.vision.image_size, choice["sampling"], choice["stride"])
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


def _stored_weights(
    place: Path, checkpoint: Path | None, variant: str | None, random_weights: bool
) -> tuple[Path | None, str | None]:
    """The checkpoint and variant that a store or a file of features was made with, unless others are given."""
    from ..search.feature_file import FeatureFile
    from ..search.store import Store

    if checkpoint is not None:
        return checkpoint, variant
    if place.is_dir():
        made_with = Store.open(place).settings
        stored, shape = made_with.checkpoint, made_with.variant
    else:
        metadata = FeatureFile(place).metadata
        stored, shape = metadata["checkpoint"], metadata["variant"]
    if not random_weights and not stored:
        raise ValueError(f"{place}: made with random weights; to use it nevertheless, add --random-weights")
    return (None if random_weights else Path(stored)), variant or shape or None


@commands.command()
def search(
    store: Annotated[
        Path, typer.Argument(metavar="STORE", help="What embed wrote: a folder or a file.", show_default=False)
    ],
    queries: Annotated[
        list[str] | None, typer.Argument(metavar="[QUERY...]", help="What to look for.", show_default=False)
    ] = None,
    like: Annotated[
        list[str] | None, typer.Option(metavar="VIDEO", help="Look for videos like this one. May be repeated.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Read queries from standard input, one a line.")
    ] = False,
    checkpoint: Checkpoint = None,
    variant: Variant = None,
    random_weights: RandomWeights = False,
    top: Top = 10,
    as_json: AsJson = False,
    path: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only paths that match, or that hold this text.")
    ] = None,
    after: Annotated[float | None, typer.Option(metavar="SECONDS", help="Only what goes on after this time.")] = None,
    before: Annotated[float | None, typer.Option(metavar="SECONDS", help="Only what begins before it.")] = None,
    merge: Annotated[
        bool, typer.Option("--merge/--no-merge", help="Neighboring windows of one moment are one answer.")
    ] = True,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Where the videos are now, if moved.")] = None,
    html: Annotated[Path | None, typer.Option(metavar="FILE", help="Write a page with pictures too.")] = None,
    clips: Annotated[Path | None, typer.Option(metavar="DIR", help="Cut the moments out, as mp4 files.")] = None,
    overwrite: Overwrite = False,
    device: Device = "auto",
    dtype: DType = "auto",
) -> None:
    """Search stored videos by text, or by example.

    Prints the moments most similar to each query: rank, score, start and end in seconds, path. The score is a cosine;
    it orders the moments of one query and is no probability. Without --checkpoint, the weights that the store was made
    with are read again.
    """
    texts = queries or []
    if any(not text.strip() for text in texts):
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    if not texts and not like and not interactive:
        raise typer.BadParameter("none given; or use --like or --interactive", param_hint="QUERY")
    from ..search.index import Index, open_moments

    checkpoint, variant = _stored_weights(store, checkpoint, variant, random_weights)
    target = device_and_dtype(device, dtype)
    model = load_model(checkpoint, variant, random_weights)
    moments = open_moments(store, model, checkpoint)
    searcher = Index(moments, model.to(**target), None if root is None else str(root))
    if searcher.note:
        print(f"note: {searcher.note}", file=sys.stderr)
    page = None
    if html is not None:
        from ..search.page import Page

        page = Page(html, overwrite=overwrite, random_weights=random_weights)
    options: dict[str, Any] = {"path": path, "after": after, "before": before, "merge": merge}
    several = interactive or len(texts) + len(like or ()) > 1
    failed = False

    def wanted() -> Iterator[tuple[str, Any]]:
        yield from ((text, text) for text in texts)
        for example in like or ():
            yield f"like {example}", searcher.features(example)
        if interactive:
            yield from ((text, text) for text in _typed())

    for title, query in wanted():
        hits = searcher.search(query, top, **options)
        _print_hits(title if several else None, hits, as_json, random_weights)
        if page is not None:
            page.add_hits(title, hits)
        if clips is not None:
            from ..search.media import cut

            for hit in hits:
                try:
                    print(f"written: {plain(str(cut(hit, clips)))}", file=sys.stderr)
                except (ValueError, OSError) as error:
                    failed |= complain(error)
    if page is not None:
        page.write()
    raise typer.Exit(int(failed))


def _typed() -> Iterator[str]:
    """Queries from standard input, until it ends or an empty line is typed at a terminal."""
    asks = sys.stdin.isatty()
    while True:
        if asks:
            print("query> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line or (asks and not line.strip()):
            return
        if line.strip():
            yield line.strip()


def _print_hits(title: str | None, hits: list[Hit], as_json: bool, random_weights: bool) -> None:
    """One query's answers; with a title, they name the query."""
    if as_json:
        for hit in hits:
            query = {} if title is None else {"query": title}
            times = {"start": round(hit.start, 3), "end": round(hit.end, 3)}
            print(
                json.dumps({**query, "video": hit.path, **times, "score": hit.score, "random_weights": random_weights}),
                flush=True,
            )
        return
    rows = [
        (str(rank), f"{hit.score:.4f}", f"{hit.start:.2f}", f"{hit.end:.2f}", hit.path)
        for rank, hit in enumerate(hits, 1)
    ]
    print_rows(title, ("rank", "score", "start", "end", "video"), rows)

"""``search``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import complain, plain, print_rows
from .options import (
    AsJson,
    Checkpoint,
    Device,
    DType,
    Overwrite,
    RandomWeights,
    Top,
    Variant,
    device_and_dtype,
    load_model,
    stored_weights,
)

if TYPE_CHECKING:
    from ..search.query import Hit

commands = typer.Typer()


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

    checkpoint, variant = stored_weights(store, checkpoint, variant, random_weights)
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

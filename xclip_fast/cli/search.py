"""``search``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..console import complain, plain, print_rows
from . import options as opt

if TYPE_CHECKING:
    from ..search.query import Hit

commands = typer.Typer()


@commands.command()
def search(
    store: Annotated[Path, typer.Argument(metavar="STORE", help="Store that `embed` wrote.")],
    queries: Annotated[list[str] | None, typer.Argument(metavar="QUERY", help="Text to look for.")] = None,
    like: Annotated[
        list[str] | None, typer.Option(metavar="VIDEO", help="Look for moments like this video. May be repeated.")
    ] = None,
    interactive: Annotated[
        bool, typer.Option("--interactive", "-i", help="Read queries from standard input, one on each line.")
    ] = False,
    checkpoint: opt.Checkpoint = None,
    variant: opt.Variant = None,
    random_weights: opt.RandomWeights = False,
    top: opt.Top = 10,
    as_json: opt.AsJson = False,
    path: Annotated[
        str | None, typer.Option(metavar="GLOB", help="Only paths that match this glob or contain this text.")
    ] = None,
    after: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Only moments that end after this time.")
    ] = None,
    before: Annotated[
        float | None, typer.Option(metavar="SECONDS", help="Only moments that begin before this time.")
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge/--no-merge", help="Join overlapping moments of a video into one answer.")
    ] = True,
    root: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder of the videos, if they have moved.")] = None,
    html: opt.Html = None,
    clips: Annotated[Path | None, typer.Option(metavar="DIR", help="Also cut the moments out as mp4 files.")] = None,
    overwrite: opt.Overwrite = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
) -> None:
    """Search stored videos by text or by example.

    Prints the moments most similar to each query: rank, score, start and end in seconds, path. The score is a cosine
    similarity. It orders the moments of one query; it is not a probability. Without --checkpoint, search loads the
    weights that the store was made with.
    """
    texts = queries or []
    if any(not text.strip() for text in texts):
        raise typer.BadParameter("the query is empty", param_hint="QUERY")
    if not texts and not like and not interactive:
        raise typer.BadParameter("missing; give a text, --like VIDEO or --interactive", param_hint="QUERY")
    with opt.quick_imports():
        from ..inference.placement import placed
        from ..search.index import Index

    checkpoint, variant = opt.stored_weights(store, checkpoint, variant, random_weights)
    target = placed(device, dtype)
    model = opt.load_model(checkpoint, variant, random_weights)
    searcher = Index.open(store, checkpoint, model=model, root=root, **target)
    if searcher.note:
        print(f"note: {searcher.note}", file=sys.stderr)
    page = opt.open_page(html, overwrite, random_weights)
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
        if not hits:
            print(f"note: {plain(title)}: no moment that the filters allow", file=sys.stderr)
        if page is not None:
            page.add_hits(title, hits)
        if clips is not None:
            from ..search.media import cut, in_thread

            for hit in hits:
                try:
                    print(f"written: {plain(str(in_thread(cut, hit, clips)))}", file=sys.stderr)
                except (ValueError, OSError) as error:
                    failed |= complain(error)
    if page is not None:
        page.write()
    raise typer.Exit(int(failed))


def _typed() -> Iterator[str]:
    """Reads queries from standard input until it ends, or until an empty line at a terminal."""
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
    """Prints the answers to one query. ``title``: the query, if there are several."""
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

"""``search``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..console import complain, plain, print_rows
from . import options as opt

if TYPE_CHECKING:
    from ..search.query import Hit


@opt.command()
@opt.argument("store", "STORE", "Store that `embed` wrote.", type=opt.PATH)
@opt.argument("texts", "[QUERY]...", "Text to look for.", nargs=-1)
@opt.option("--like", "Look for moments like this video. May be repeated.", metavar="VIDEO", multiple=True)
@opt.flag("--interactive", "Read queries from standard input, one on each line.", "-i")
@opt.model
@opt.option("--top", "Number of answers to print.", opt.COUNT, default=10)
@opt.as_json
@opt.option("--path", "Only paths that match this glob or contain this text.", metavar="GLOB")
@opt.option("--after", "Only moments that end after this time.", float, metavar="SECONDS")
@opt.option("--before", "Only moments that begin before this time.", float, metavar="SECONDS")
@opt.option("--merge/--no-merge", "Join overlapping moments of a video into one answer.", default=True)
@opt.path("--root", "DIR", "Folder of the videos, if they have moved.")
@opt.html
@opt.path("--clips", "DIR", "Also cut the moments out as mp4 files.")
@opt.overwrite
def search(
    store: Path,
    texts: Sequence[str],
    like: Sequence[str],
    interactive: bool,
    model: opt.Model,
    top: int,
    as_json: bool,
    root: Path | None,
    html: Path | None,
    clips: Path | None,
    overwrite: bool,
    **filters: Any,
) -> None:
    """Search stored videos by text or by example.

    Prints the moments most similar to each query: rank, score, start and end in seconds, path. The score is a cosine
    similarity. It orders the moments of one query; it is not a probability. Without --checkpoint, search loads the
    weights that the store was made with.
    """
    if any(not text.strip() for text in texts):
        raise click.BadParameter("the query is empty", param_hint="QUERY")
    if not texts and not like and not interactive:
        raise click.BadParameter("missing; give a text, --like VIDEO or --interactive", param_hint="QUERY")
    with opt.quick_imports():
        from ..inference.placement import placed
        from ..search.index import Index

    model = model.of_store(store)
    target = placed(model.device, model.dtype)
    searcher = Index.open(store, model.checkpoint, model=model.load(), root=root, **target)
    if searcher.note:
        print(f"note: {searcher.note}", file=sys.stderr)
    page = opt.open_page(html, overwrite, model.random_weights)
    several = interactive or len(texts) + len(like) > 1
    failed = False

    def wanted() -> Iterator[tuple[str, Any]]:
        yield from ((text, text) for text in texts)
        for example in like:
            yield f"like {example}", searcher.features(example)
        if interactive:
            yield from ((text, text) for text in _typed())

    for title, query in wanted():
        hits = searcher.search(query, top, **filters)
        _print_hits(title if several else None, hits, as_json, model.random_weights)
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
    sys.exit(failed)


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

"""Results as one self-contained HTML page with its pictures. It opens from disk."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from html import escape
from importlib import resources
from pathlib import Path

from ..console import plain
from ..data.remote import is_remote
from ..files import require_regular, write_text
from .media import in_thread, pictures
from .query import Hit

LIMIT = 24 << 20  # bytes of pictures in a page
_MARK = '<meta name="generator" content="xclip-fast">'
_MEANING = (
    "The score is the cosine between the query and the moment, from −1 to 1. It orders the moments of one query. It is "
    "not a probability, and scores of different queries do not compare."
)


class Page:
    """A page of results, written at the end.

    `limit`: bytes of pictures. Above it, previews are left out, then stills, and the page says so. Names and labels are
    escaped. Raises FileExistsError for an existing file, unless `overwrite` is set and the file is such a page.
    """

    def __init__(self, out: Path, *, overwrite: bool = False, random_weights: bool = False, limit: int = LIMIT) -> None:
        self.out, self.overwrite, self.limit = out, overwrite, limit
        self.random_weights = random_weights
        self.used = self.without = self.cards = 0
        self.sections: list[tuple[str, list[str]]] = []
        self._check()

    def _check(self) -> None:
        if self.out.is_dir() or not self.out.parent.is_dir():
            what = "is a folder" if self.out.is_dir() else "its folder does not exist"
            raise ValueError(f"{self.out}: {what}; a file in an existing folder is wanted")
        if self.out.exists():
            if not self.overwrite:
                raise FileExistsError(f"{self.out}: is there already; choose another name or add --overwrite")
            require_regular(self.out)
            with open(self.out, "rb") as file:
                if _MARK.encode() not in file.read(4096):
                    raise FileExistsError(f"{self.out}: is not a page of results, so it is not replaced")

    def add_hits(self, title: str, hits: Sequence[Hit]) -> None:
        """The answers to one query."""
        cards = [
            self._card(hit.path, hit.start, hit.end, f'<p class="score">Score {hit.score:.4f}</p>', hit.best)
            for hit in hits
        ]
        self.sections.append((title, cards))

    def add_labels(self, path: str, start: float, end: float, ranked: Sequence[tuple[str, float]]) -> None:
        """The labels of one moment of a video, best first."""
        rows = "".join(
            f'<tr><th scope="row">{_text(label)}</th><td>{value:.1%}</td>'
            f'<td class="bar"><meter min="0" max="1" value="{value:.4f}" aria-hidden="true"></meter></td></tr>'
            for label, value in ranked
        )
        caption = "<caption>Labels and probabilities</caption>"
        card = self._card(path, start, end, f"<table>{caption}<tbody>{rows}</tbody></table>", (start, end))
        if not self.sections or self.sections[-1][0] != path:
            self.sections.append((path, []))
        self.sections[-1][1].append(card)

    def _card(self, path: str, start: float, end: float, details: str, best: tuple[float, float]) -> str:
        self.cards += 1
        name = _text(path.rstrip("/").rsplit("/", 1)[-1])
        times = f"{clock(start)} to {clock(end)}" if end > start else "whole video"
        link = _link(path, start, end)
        shown = _text(path)
        where = f'<a href="{link}">{shown}</a>' if link else shown
        return (
            f'<li><article aria-labelledby="c{self.cards}">{self._pictures(path, best, name, times)}'
            f'<h3 id="c{self.cards}">{name} <span class="times">{times}</span></h3>{details}'
            f'<p class="path">{where}</p></article></li>'
        )

    def _pictures(self, path: str, best: tuple[float, float], name: str, times: str) -> str:
        """The still and the preview in a button, as far as the limit allows."""
        if self.used >= self.limit:
            self.without += 1
            return '<p class="none">No picture: the page is full.</p>'
        try:
            still, preview = in_thread(pictures, path, *best)
        except (ValueError, OSError) as error:
            return f'<p class="none">No picture: {_text(" ".join(str(error).split()))}</p>'
        image = f'<img src="{_data("image/jpeg", still)}" alt="A frame of {name}">'
        self.used += 4 * len(still) // 3
        if self.used + 4 * len(preview) // 3 > self.limit:
            self.without += 1
            return f'<div class="still">{image}</div>'
        self.used += 4 * len(preview) // 3
        video = f'<video src="{_data("video/mp4", preview)}" muted loop playsinline tabindex="-1" aria-hidden="true">'
        label = f"Play a preview of {name}, {times}"
        button = f'<button type="button" class="play" aria-pressed="false" aria-label="{label}">'
        return f"{button}{image}{video}</video></button>"

    def render(self) -> str:
        """The page."""
        style, script = (
            resources.files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js")
        )
        hashes = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in (style, script)]
        policy = (
            f"default-src 'none'; img-src data:; media-src data:; style-src 'sha256-{hashes[0]}'; "
            f"script-src 'sha256-{hashes[1]}'; base-uri 'none'; form-action 'none'"
        )
        notes = [f"{self.cards} results."]
        if any("Score" in card for _, cards in self.sections for card in cards):
            notes.append(_MEANING)
        if self.without:
            notes.append(
                f"{self.without} results have no preview: the page's limit is {self.limit >> 20} MB of pictures."
            )
        if self.random_weights:
            notes.append("The weights are random: the answers mean nothing.")
        body = "".join(
            f'<section aria-labelledby="s{number}"><h2 id="s{number}">{_text(title)}</h2>'
            + (f'<ol class="cards">{"".join(cards)}</ol>' if cards else "<p>Nothing was found.</p>")
            + "</section>"
            for number, (title, cards) in enumerate(self.sections, 1)
        )
        about = "".join(f"<p>{note}</p>" for note in notes)
        return (
            f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">{_MARK}'
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{_text(self.sections[0][0] if self.sections else 'Results')} - xclip-fast</title>"
            f"<style>{style}</style></head><body><header><h1>Results of xclip-fast</h1>{about}</header>"
            f"<main>{body}</main><script>{script}</script></body></html>\n"
        )

    def write(self) -> None:
        """Writes the file, whole or not at all."""
        self._check()
        write_text(self.out, self.render())


def clock(seconds: float) -> str:
    """Seconds as people read them: 1:02:03.4."""
    tenths = round(seconds * 10)
    hours, rest = divmod(tenths, 36_000)
    minutes, rest = divmod(rest, 600)
    text = f"{minutes}:{rest // 10:02}.{rest % 10}"
    return f"{hours}:{minutes:02}:{rest // 10:02}.{rest % 10}" if hours else text


def _text(text: str) -> str:
    """Escapes text for any place in the page."""
    return escape(plain(text))


def _data(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def _link(path: str, start: float, end: float) -> str:
    """The link to the file at the moment's time; empty if a browser cannot open it."""
    part = f"#t={start:.2f},{end:.2f}" if end > start else ""
    if is_remote(path):
        return escape(path + part) if path.lower().startswith(("http://", "https://")) else ""
    return escape(Path(path).absolute().as_uri() + part)

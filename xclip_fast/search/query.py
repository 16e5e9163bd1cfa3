"""Finding moments: a shortlist by cosine, ranked again with video-specific prompts if patches are stored."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    from ..model import XCLIP
    from .store import Store

_SHORTLIST = 100  # the least number of moments that are ranked again and merged with their neighbors


@dataclass(frozen=True)
class Hit:
    """A moment that was found.

    `score` is the cosine of query and moment, from -1 to 1. It orders the moments of one query. It is no probability,
    and scores of different queries or models do not compare. `start` and `end` are seconds. Neighboring windows of one
    moment are one hit; `best` is the (start, end) of the best window.
    """

    path: str
    start: float
    end: float
    score: float
    best: tuple[float, float]


@dataclass(frozen=True)
class Filters:
    """Conditions on moments.

    `path`: a glob over stored paths (`*` crosses folders), or a part of the path without any `*`, `?` or `[`.
    `after`, `before`: seconds in the video. A moment counts if at least a part of it lies between them.
    """

    path: str | None = None
    after: float | None = None
    before: float | None = None

    def __post_init__(self) -> None:
        for name, value in (("after", self.after), ("before", self.before)):
            if value is not None and not math.isfinite(value):
                raise ValueError(f"{name} is {value}; a number of seconds wanted")
        if self.after is not None and self.before is not None and self.after >= self.before:
            raise ValueError(f"after is {self.after:g} and before {self.before:g} seconds; after < before wanted")

    def sql(self) -> str | None:
        """The condition on rows, for LanceDB."""
        parts = []
        if self.path:
            parts.append("regexp_like(path, '" + self.pattern().replace("'", "''") + "')")
        if self.after is not None:
            parts.append(f'"end" > {float(self.after)!r}')
        if self.before is not None:
            parts.append(f"start < {float(self.before)!r}")
        return " AND ".join(parts) or None

    def pattern(self) -> str:
        """The glob as a regular expression to search for in a path."""
        glob = self.path or ""
        if not any(sign in glob for sign in "*?["):
            return re.escape(glob)
        out = ""
        at = 0
        while at < len(glob):
            sign = glob[at]
            close = glob.find("]", at + 2) if sign == "[" else -1
            if close > 0:
                inside = glob[at + 1 : close].replace("\\", "\\\\").replace("[", "\\[")
                out += "[" + ("^" + inside[1:] if inside[0] == "!" else inside) + "]"
                at = close
            else:
                out += {"*": ".*", "?": "."}.get(sign) or re.escape(sign)
            at += 1
        return f"(?s)^(.*/)?{out}$"


def find(
    store: Store,
    query_1E: Tensor,
    *,
    model: XCLIP | None,
    top: int = 10,
    filters: Filters | None = None,
    merge: bool = True,
) -> list[Hit]:
    """The best moments for one query, best first.

    `query_1E`: features of a text or a video. `model`: ranks the shortlist again with prompts from their patches.
    Pass None if patches are not stored, or if the query is a video.
    """
    if top < 1:
        raise ValueError(f"top is {top}; it must be at least 1")
    unit_1E = F.normalize(query_1E.detach().float().cpu(), dim=-1)
    if not unit_1E.isfinite().all():
        raise ValueError("the features of the query are not numbers; the weights may be damaged")
    count = max(_SHORTLIST, 10 * top)
    table = store.nearest(unit_1E[0], count, (filters or Filters()).sql())
    if not table.num_rows:
        return []
    flat = table["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
    video_BE = torch.from_numpy(flat.astype(np.float32).reshape(table.num_rows, -1))
    scores = (F.normalize(video_BE, dim=-1) @ unit_1E[0]).tolist()
    if model is not None:
        scores = _prompted(store, table["_rowid"].to_pylist(), video_BE, query_1E, model)
    for path, score in zip(table["path"].to_pylist(), scores, strict=True):
        if not math.isfinite(score):
            raise ValueError(f"{path}: its stored features are not numbers; embed it again")
    columns = (table[name].to_pylist() for name in ("path", "start", "end"))
    hits = [
        Hit(path, start, end, score, (start, end)) for path, start, end, score in zip(*columns, scores, strict=True)
    ]
    hits.sort(key=lambda hit: -hit.score)
    return (merge_neighbors(hits) if merge else hits)[:top]


def _prompted(store: Store, rows: list[int], video_BE: Tensor, text_1E: Tensor, model: XCLIP) -> list[float]:
    """Cosines with the prompted text (equation 10)."""
    from ..nn.features import VideoFeatures

    like = model.logit_scale
    scores: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(rows), 64):
            part = rows[start : start + 64]
            stored = store.patches(part)
            patches_BNE = torch.from_numpy(np.stack([stored[row] for row in part])).to(like)
            found = VideoFeatures(video_BE[start : start + 64].to(like), patches_BNE)
            logits_B1 = model.similarity(found, text_1E.to(like))
            scores += (logits_B1[:, 0] / like.to(logits_B1.dtype).exp()).tolist()
    return scores


def merge_neighbors(hits: Sequence[Hit]) -> list[Hit]:
    """Joins windows of one file that overlap or touch into one hit, if both score well.

    A window scores well if it is at least halfway from the lowest score of the list to the best score of the moment. So
    a scene of many windows is one hit, but a film with all its windows in the list is not. `hits`: best first, as the
    result.
    """
    floor = hits[-1].score if hits else 0.0
    by_path: dict[str, list[Hit]] = {}
    for hit in hits:
        by_path.setdefault(hit.path, []).append(hit)
    merged: list[Hit] = []
    for own in by_path.values():
        left = sorted(own, key=lambda hit: hit.start)
        for best in own:  # best first
            if best not in left:
                continue
            at = left.index(best)
            low = high = at
            enough = (best.score + floor) / 2
            while low > 0 and left[low - 1].end >= left[low].start and left[low - 1].score >= enough:
                low -= 1
            while high + 1 < len(left) and left[high + 1].start <= left[high].end and left[high + 1].score >= enough:
                high += 1
            part = left[low : high + 1]
            merged.append(replace(best, start=part[0].start, end=max(hit.end for hit in part)))
            left[low : high + 1] = []
    return sorted(merged, key=lambda hit: -hit.score)

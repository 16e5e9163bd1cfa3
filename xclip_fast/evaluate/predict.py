"""From batches of frames to answers: probabilities over the labels, read back one batch late.

Sizes: B videos of a batch, V views, K labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Answer(NamedTuple):
    """The model's answer for one video."""

    best: list[int]  # the most probable labels, at most five
    values: list[float]  # their probabilities
    loss: float  # -log of the true label's probability; NaN if it is not among the labels


def predictions(
    score: Callable[[Tensor], Tensor], batches: Any, chunk: int, least: int, truth_of_class: list[int]
) -> Iterator[tuple[int, Answer | None]]:
    """(row, answer) of each video; None for an answer that is not finite.

    ``least``: the least number of forwards in a batch. The batches of some processes may be shorter or empty, but all
    processes must run the same number of forwards: a sharded model gathers its weights in each.
    """
    waiting: Iterator[tuple[int, Answer | None]] | None = None
    truth_C: Tensor | None = None
    for batch in batches:
        frames = batch.frames.unsqueeze(1) if batch.frames.dim() == 5 else batch.frames
        count, views = frames.shape[:2]
        flat = frames.flatten(0, 1)
        forwards = max(least, -(-len(flat) // chunk))
        logits = [score(flat[i * chunk : (i + 1) * chunk]).float() for i in range(forwards)]
        if not count:
            continue
        logits_BVK = torch.cat(logits).unflatten(0, (count, views))
        finite_B = logits_BVK.isfinite().flatten(1).all(1)
        probabilities_BK = logits_BVK.softmax(-1).mean(1)
        # stable: of equal values the first label wins, on every device
        values, order = probabilities_BK.sort(dim=-1, descending=True, stable=True)
        if truth_C is None:  # -1 for a class without a label; the last entry is for videos without a class
            truth_C = torch.tensor([*truth_of_class, -1], device=logits_BVK.device)
        truth_B = truth_C[batch.labels.to(truth_C.device)]
        loss_B = -probabilities_BK.gather(1, truth_B.clamp(min=0)[:, None])[:, 0].log()
        loss_B = loss_B.masked_fill(truth_B < 0, float("nan"))
        current = _read_back(batch.samples, order[:, :5], values[:, :5], loss_B, finite_B)
        if waiting:  # one batch late, so that the device never waits for the CPU
            yield from waiting
        waiting = current
    if waiting:
        yield from waiting


def _read_back(*results: Tensor) -> Iterator[tuple[int, Answer | None]]:
    """Starts the copies to the CPU. Iterating waits for them, and not for later work of the device."""
    copies = [result.to("cpu", non_blocking=True) for result in results]
    done = torch.cuda.Event() if results[0].is_cuda else None
    if done is not None:
        done.record()

    def rows() -> Iterator[tuple[int, Answer | None]]:
        if done is not None:
            done.synchronize()
        for row, *answer, fine in zip(*(column.tolist() for column in copies), strict=True):
            yield row, Answer(*answer) if fine else None

    return rows()

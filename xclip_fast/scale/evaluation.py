"""`evaluate` on a Ray cluster: actors evaluate parts of the manifest, and the results are merged."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data.manifest.manifest import Manifest
from ..evaluate.loop import evaluate
from ..evaluate.result import Evaluation, Prediction
from .cluster import ClusterOptions, connect, pool_sizes
from .stage import ModelSpec

if TYPE_CHECKING:
    from ..model import XCLIP

_PART = 64  # videos of a part

Part = tuple[Sequence[int], Evaluation | None, dict[int, str]]
"""Rows of the manifest, the result of those that could be read, if any, and the reason for each of the others."""


def evaluate_part(model: XCLIP, manifest: Manifest, rows: Sequence[int], **arguments: Any) -> Part:
    """`evaluate` on these rows, in this process."""
    try:
        result = evaluate(model, manifest.select(rows), distributed=False, **arguments)
    except ValueError as error:
        if len(rows) == 1:  # an unreadable video, or wrong arguments: `merge` raises if no video is left
            return rows, None, {rows[0]: str(error)}
        parts = [evaluate_part(model, manifest, [row], **arguments) for row in rows]
        return rows, None, {row: why for _, _, failed in parts for row, why in failed.items()}
    return rows, result, {rows[at]: why for at, why in result.failed.items()}


def merge(manifest: Manifest, parts: Iterable[Part]) -> Evaluation:
    """Merge the parts into one result. Raises ValueError if no video could be evaluated."""
    found: list[Evaluation] = []
    predictions: list[Prediction] = []
    failed: dict[int, str] = {}
    for rows, result, why in parts:
        failed |= why
        if result is not None:
            found.append(result)
            predictions += [dataclasses.replace(each, sample=int(rows[each.sample])) for each in result.predictions]
    if not found:
        first = "; ".join(f"{manifest.name(row)}: {failed[row]}" for row in sorted(failed)[:3])
        raise ValueError(f"none of {len(manifest)} videos could be evaluated: {first or 'the manifest is empty'}")
    if len(predictions) + len(failed) != len(manifest):
        raise RuntimeError(f"{len(predictions)} videos were answered and {len(failed)} failed, of {len(manifest)}")
    counted = sum(each.counted for each in found)
    losses = math.fsum(each.loss * each.counted for each in found if each.counted)
    return dataclasses.replace(
        found[0],
        videos=len(manifest),
        loss=losses / counted if counted else math.nan,
        predictions=tuple(sorted(predictions, key=lambda each: each.sample)),
        failed=dict(sorted(failed.items())),
        failed_names={row: manifest.name(row) for row in sorted(failed)},
        confusion=np.sum([each.confusion for each in found], axis=0),
        top5_hits=sum(each.top5_hits for each in found),
        data={**found[0].data, "fingerprint": manifest.fingerprint, "videos": len(manifest)},
    )


class _Evaluator:
    """An actor: loads the model and evaluates parts of the manifest."""

    def __init__(self, spec: ModelSpec) -> None:
        self.model = spec.load()

    def run(self, manifest: Manifest, rows: Sequence[int], arguments: dict[str, Any]) -> Part:
        return evaluate_part(self.model, manifest, rows, workers=0, **arguments)


def spread(spec: ModelSpec, options: ClusterOptions) -> Callable[..., Evaluation]:
    """As `evaluate`, on a cluster: with the same arguments, but each actor loads the model."""

    def run(
        model: XCLIP,
        manifest: Manifest,
        *,
        workers: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **arguments: Any,
    ) -> Evaluation:
        ray = connect(options)
        from ray.util import ActorPool

        begun = time.perf_counter()
        actors, gpus, _ = pool_sizes(ray, options)
        kind = ray.remote(num_cpus=1, num_gpus=gpus, max_restarts=-1, max_task_retries=-1)(_Evaluator)
        pool = ActorPool([kind.remote(spec) for _ in range(actors)])
        shared = ray.put(manifest)
        chunks = [list(range(at, min(at + _PART, len(manifest)))) for at in range(0, len(manifest), _PART)]
        parts: list[Part] = []
        done = 0
        for part in pool.map_unordered(lambda actor, rows: actor.run.remote(shared, rows, arguments), chunks):
            parts.append(part)
            done += len(part[0])
            if progress:
                progress(done, len(manifest))
        whole = merge(manifest, parts)
        about = {**whole.environment, "processes": actors}
        return dataclasses.replace(whole, seconds=time.perf_counter() - begun, environment=about)

    return run

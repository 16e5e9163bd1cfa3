"""``classify``."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..console import Bar, complain, print_rows
from . import options as opt

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.batches import Answer
    from ..nn.features import VideoFeatures


@opt.command()
@opt.argument("videos", "VIDEO...", opt.VIDEOS, nargs=-1, required=True)
@opt.option(
    "--labels",
    "'a,b,c', a .txt with one label on each line, or a .csv (one column, or id,name). Default: as in training.",
)
@opt.model
@opt.option("--top", "Number of answers to print.", opt.COUNT, default=5)
@opt.as_json
@opt.templates
@opt.html
@opt.overwrite
@opt.reading
@opt.ray
def classify(
    videos: Sequence[str],
    labels: str | None,
    model: opt.Model,
    top: int,
    as_json: bool,
    templates: bool | None,
    html: Path | None,
    overwrite: bool,
    reading: opt.Reading,
    ray: opt.Ray,
) -> None:
    """Classify videos with labels of your own.

    Prints the most probable labels of each video. In a pipe, each line holds video, rank, label and probability,
    separated by tabs. With --window it answers for each moment of a video and prints the start and end in seconds.
    A video that cannot be read is reported. The others are still classified, and the exit code is 1.
    """
    model.check()
    with opt.quick_imports():
        import torch

        from ..inference import batches
        from ..inference.labels import label_scorer
        from ..inference.placement import placed
        from ..weights.checkpoint import find_weights
        from ..weights.recipe import Trained

    if model.checkpoint is not None:
        find_weights(model.checkpoint)  # its error comes before one of missing labels
    trained = Trained.read(model.checkpoint)
    names = list(trained.labels.values()) if labels is None else opt.parse_labels(labels)
    if not names:
        why = "missing; the checkpoint does not say which labels it was trained with"
        raise click.BadParameter(why, param_hint="--labels")
    chosen = trained.choose(reading.frames, reading.sampling, reading.frame_stride, templates)
    sentences = chosen.pop("templates")
    inputs, failed = opt.find_videos(videos)
    opt.set_threads(reading.threads)
    target = placed(model.device, model.dtype)
    loaded = model.load().to(**target)
    if reading.stride is not None and reading.window is None:
        raise click.BadParameter("works only together with --window", param_hint="--stride")
    page = opt.open_page(html, overwrite, model.random_weights)
    views = batches.Reading(
        chosen["frames"] or loaded.config.num_frames,
        loaded.config.vision.image_size,
        chosen["sampling"],
        chosen["stride"],
        reading.window,
        reading.stride,
        limits=reading.limits(),
    )
    with torch.inference_mode(), Bar(len(inputs.paths)) as bar:
        logits = label_scorer(loaded, names, sentences)

        def answer(found: VideoFeatures) -> tuple[Tensor]:
            return (logits(found).softmax(-1),)

        if ray.ray:
            from ..scale.cluster import cluster_answers
            from ..scale.stage import VideoStage

            spec, spread = ray.cluster(model, reading.decoders, reading.batch_size)
            stage = VideoStage(spec, views, labels=names, templates=sentences)
            found = cluster_answers(stage, spread, ["probabilities"])(map(os.path.abspath, inputs.paths))
        else:
            found = batches.answers(
                loaded, inputs.paths, views, answer, batch_size=reading.batch_size, workers=reading.workers
            )
        for item in found:
            if not isinstance(item, batches.Answer):
                bar.advance()
                failed |= item.error is not None and complain(item.error, bar)
                continue
            best = item.values[0].topk(min(top, len(names)))
            ranked = [(names[index], value) for value, index in zip(best.values.tolist(), best.indices, strict=True)]
            with bar.aside():
                _print_labels(item, ranked, as_json, reading.window is not None, model.random_weights)
            if page is not None:
                page.add_labels(item.path, item.start, item.end, ranked)
    if page is not None:
        page.write()
    sys.exit(failed)


def _print_labels(
    item: Answer, ranked: Sequence[tuple[str, float]], as_json: bool, with_times: bool, random_weights: bool
) -> None:
    """Prints the labels of one moment, as a JSON object or as rows."""
    times = {"start": round(item.start, 3), "end": round(item.end, 3)} if with_times else {}
    if as_json:
        labels = [{"label": label, "probability": value} for label, value in ranked]
        print(json.dumps({"video": item.path, **times, "labels": labels, "random_weights": random_weights}), flush=True)
        return
    cells = tuple(f"{time:.2f}" for time in times.values())
    rows = [(*cells, str(rank), label, f"{value:.4f}") for rank, (label, value) in enumerate(ranked, 1)]
    print_rows(item.path, (*times, "rank", "label", "probability"), rows)

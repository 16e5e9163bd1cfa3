"""``classify``."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from ..console import Bar, complain, print_rows
from . import options as opt

if TYPE_CHECKING:
    from torch import Tensor

    from ..inference.batches import Answer
    from ..nn.features import VideoFeatures

commands = typer.Typer()


@commands.command()
def classify(
    videos: opt.Videos,
    labels: Annotated[
        str | None,
        typer.Option(
            help="'a,b,c', a .txt with one label on each line, or a .csv (one column, or id,name). "
            "Default: as in training.",
        ),
    ] = None,
    checkpoint: opt.Checkpoint = None,
    variant: opt.Variant = None,
    random_weights: opt.RandomWeights = False,
    top: opt.Top = 5,
    as_json: opt.AsJson = False,
    device: opt.Device = "auto",
    dtype: opt.DType = "auto",
    templates: opt.Templates = None,
    frames: opt.Frames = None,
    sampling: opt.Sampled = None,
    frame_stride: opt.FrameStride = None,
    window: opt.Window = None,
    stride: opt.Stride = None,
    html: opt.Html = None,
    overwrite: opt.Overwrite = False,
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
    """Classify videos with labels of your own.

    Prints the most probable labels of each video. In a pipe, each line holds video, rank, label and probability,
    separated by tabs. With --window it answers for each moment of a video and prints the start and end in seconds.
    A video that cannot be read is reported. The others are still classified, and the exit code is 1.
    """
    opt.check_weights(checkpoint, random_weights)
    with opt.quick_imports():
        import torch

        from ..data.remote import Limits
        from ..inference.batches import Answer, Reading, answers
        from ..inference.labels import label_scorer
        from ..inference.placement import placed
        from ..weights.checkpoint import find_weights
        from ..weights.recipe import Trained

    if checkpoint is not None:
        find_weights(checkpoint)  # its error comes before one of missing labels
    trained = Trained.read(checkpoint)
    names = list(trained.labels.values()) if labels is None else opt.parse_labels(labels)
    if not names:
        raise typer.BadParameter(
            "missing; the checkpoint does not say which labels it was trained with", param_hint="--labels"
        )
    chosen = trained.choose(frames, sampling, frame_stride, templates)
    sentences = chosen.pop("templates")
    inputs, failed = opt.find_videos(videos)
    opt.set_threads(threads)
    target = placed(device, dtype)
    model = opt.load_model(checkpoint, variant, random_weights).to(**target)
    if stride is not None and window is None:
        raise typer.BadParameter("works only together with --window", param_hint="--stride")
    page = opt.open_page(html, overwrite, random_weights)
    reading = Reading(
        chosen["frames"] or model.config.num_frames,
        model.config.vision.image_size,
        chosen["sampling"],
        chosen["stride"],
        window,
        stride,
        limits=Limits(max_bytes, max_seconds),
    )
    with torch.inference_mode(), Bar(len(inputs.paths)) as bar:
        logits = label_scorer(model, names, sentences)

        def answer(found: VideoFeatures) -> tuple[Tensor]:
            return (logits(found).softmax(-1),)

        if ray:
            from ..scale.cluster import cluster_answers
            from ..scale.stage import VideoStage

            spec, spread = opt.cluster(checkpoint, variant, device, dtype, address, actors, decoders, batch_size)
            stage = VideoStage(spec, reading, labels=names, templates=sentences)
            found = cluster_answers(stage, spread, ["probabilities"])(map(os.path.abspath, inputs.paths))
        else:
            found = answers(model, inputs.paths, reading, answer, batch_size=batch_size, workers=workers)
        for item in found:
            if not isinstance(item, Answer):
                bar.advance()
                failed |= item.error is not None and complain(item.error, bar)
                continue
            best = item.values[0].topk(min(top, len(names)))
            ranked = [(names[index], value) for value, index in zip(best.values.tolist(), best.indices, strict=True)]
            with bar.aside():
                _print_labels(item, ranked, as_json, window is not None, random_weights)
            if page is not None:
                page.add_labels(item.path, item.start, item.end, ranked)
    if page is not None:
        page.write()
    raise typer.Exit(int(failed))


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

"""The accuracy of a model on a data set: one or many views, top-1 and top-5, per class, every video accounted for.

Every row of the manifest gets a prediction or is named as failed, with the reason. A video's probabilities are the mean
over its views of each view's softmax (paper, section 4; released code).

Sizes: B videos of a batch, V views, T frames, S side in pixels, K labels, E embedding.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from .. import flops
from ..inference.labels import NOT_A_NUMBER, label_scorer
from ..text.labels import candidates
from .predict import Answer, predictions
from .result import Evaluation, Prediction

if TYPE_CHECKING:
    from ..data.manifest.manifest import Manifest
    from ..data.transforms import TestTransform
    from ..model import XCLIP


def evaluate(
    model: XCLIP,
    manifest: Manifest,
    *,
    clips: int = 1,
    crops: int = 1,
    frames: int | None = None,
    sampling: str = "sparse",
    stride: int = 1,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    templates: Sequence[str] | None = None,
    batch_size: int | None = None,
    dtype: torch.dtype | None = None,
    workers: int | None = None,
    distributed: bool = True,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Predicts every video of the manifest and counts the correct predictions.

    Args:
        model: put into evaluation mode for the run, and afterwards back as it was.
        clips, crops: temporal clips, and spatial crops (1 or 3) of each; the paper's many-view test is 4 x 3.
        frames: T of a view; by default the model's. sampling, stride: as for ``data.sampling.frame_indices``.
        labels: the labels to choose from, by default the manifest's classes. A sequence: these labels. A video's class
            is the label of the same name (``plain_name``); videos of other classes are predicted and not counted.
            A mapping: from each class to its text. With a linear head: the names of its outputs, in order.
        templates: sentences with ``{}``; the text features are the mean over them (``encode_text_ensemble``).
        batch_size: views (not videos) at once; by default 64 on a GPU, 8 on a CPU.
        dtype: by default the model's own. float16 or bfloat16 for a model in float32 means autocast: its parameters
            stay float32.
        workers: as for ``data.loader.loader``.
        distributed: if ``torch.distributed`` is initialized, each process takes its part of the videos, and all return
            the whole result. False: this process takes all videos.
        progress: called with (videos done, all videos of this process).

    Raises:
        ValueError: if no video can be read, the labels do not fit the classes or the head, or an argument is out of
            range.
    """
    from ..data.loader.loader import loader
    from ..data.transforms import TestTransform
    from ..info import environment

    names, texts, truth_of_class = candidates(manifest.classes, labels)
    place = next(model.parameters()).device
    if batch_size is None:
        batch_size = 64 if place.type == "cuda" else 8
    if batch_size < 1:
        raise ValueError(f"batch_size {batch_size}: at least 1 wanted")
    together = distributed and dist.is_available() and dist.is_initialized()
    rank, world = (dist.get_rank(), dist.get_world_size()) if together else (0, 1)
    frames = model.config.num_frames if frames is None else frames
    given: dict[str, Any] = {"clips": clips, "crops": crops, "sampling": sampling, "stride": stride}
    transform = TestTransform(frames=frames, size=model.config.vision.image_size, **given)
    with _evaluating(model, place, dtype):
        logits = label_scorer(model, texts, templates)
    videos_at_once = max(1, batch_size // (clips * crops))
    batches = loader(
        manifest,
        transform,
        videos_at_once,
        device=place,
        shuffle=False,
        rank=rank,
        world=world,
        workers=workers,
        max_bad=1.0,  # a video that fails is named, and stops nothing
    )
    chunk = min(batch_size, videos_at_once * clips * crops)
    least = -(-videos_at_once * clips * crops // chunk) if world > 1 else 0
    total = len(manifest.usable[rank::world])

    def score(frames: Tensor) -> Tensor:
        return logits(model.encode_video(frames))

    start = time.perf_counter()
    answers: dict[int, Answer] = {}
    failed: dict[int, str] = dict(manifest.bad)
    problem: Exception | None = None
    try:
        with _evaluating(model, place, dtype):
            for row, answer in predictions(score, batches, chunk, least, truth_of_class):
                if answer is None:
                    failed[row] = NOT_A_NUMBER
                else:
                    answers[row] = answer
                if progress:
                    progress(len(answers), total)
        failed |= batches.report.bad
        if progress:
            progress(total, total)
    except Exception as error:
        if world == 1:
            raise
        problem = error  # the other processes wait for this one and must hear of it
    finally:
        batches.close()
    seconds = time.perf_counter() - start
    if world > 1:
        answers, failed, seconds = _gather(world, answers, failed, seconds, problem)
    about = _about_model(model, transform, len(names), dtype, templates)
    where = environment(place) | {"processes": world, "batch_size": batch_size}
    rest = {"clips": clips, "crops": crops, "frames": frames, "seconds": seconds, "model": about, "environment": where}
    return _evaluation(manifest, names, truth_of_class, answers, failed, **rest)


@contextlib.contextmanager
def _evaluating(model: XCLIP, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Evaluation mode without gradients, with autocast if ``dtype`` needs it. Afterwards every module is as before."""
    own = next(model.parameters()).dtype
    if dtype is not None and dtype != own and (own != torch.float32 or dtype not in (torch.float16, torch.bfloat16)):
        raise ValueError(f"dtype {dtype} does not fit a model in {own}; call model.to({dtype}) first")
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    autocast = contextlib.nullcontext() if dtype in (None, own) else torch.autocast(device.type, dtype)
    try:
        with torch.no_grad(), autocast:
            yield
    finally:
        for module, mode in modes:
            module.training = mode


def _gather(
    world: int, answers: dict[int, Any], failed: dict[int, str], seconds: float, problem: Exception | None
) -> tuple[dict[int, Any], dict[int, str], float]:
    """The results of all processes together. If one process failed, all raise an error."""
    parts: list[Any] = [None] * world
    dist.all_gather_object(parts, (answers, failed, seconds, None if problem is None else f"{problem}"))
    if problem is not None:
        raise problem
    for rank, (_, _, _, said) in enumerate(parts):
        if said is not None:
            raise RuntimeError(f"evaluation failed in process {rank} of {world}: {said}")
    together, lost = ({row: found for part in parts for row, found in part[at].items()} for at in (0, 1))
    return together, lost, max(part[2] for part in parts)


def _evaluation(
    manifest: Manifest,
    names: tuple[str, ...],
    truth_of_class: list[int],
    answers: dict[int, Answer],
    failed: dict[int, str],
    **rest: Any,
) -> Evaluation:
    lost = set(range(len(manifest))) - answers.keys() - failed.keys()
    if lost or answers.keys() & failed.keys():
        raise RuntimeError(f"videos {sorted(lost)[:5]} got no answer, {sorted(answers.keys() & failed.keys())[:5]} two")
    if not answers:
        first = "; ".join(f"{manifest.name(row)}: {failed[row]}" for row in sorted(failed)[:3])
        raise ValueError(f"none of {len(manifest)} videos could be evaluated: {first or 'the manifest is empty'}")
    confusion_KK = np.zeros((len(names), len(names)), np.int64)
    top5_hits, predictions = 0, []
    losses = [answer.loss for answer in answers.values() if not math.isnan(answer.loss)]
    for row, (best, values, _) in sorted(answers.items()):
        number = manifest.videos[row].label
        truth = -1 if number is None else truth_of_class[number]
        if truth >= 0:
            confusion_KK[truth, best[0]] += 1
            top5_hits += truth in best
        top = tuple((names[index], value) for index, value in zip(best, values, strict=True))
        label = None if number is None else names[truth] if truth >= 0 else manifest.classes[number]
        predictions.append(Prediction(row, manifest.name(row), label, truth >= 0, top))
    return Evaluation(
        labels=names,
        videos=len(manifest),
        predictions=tuple(predictions),
        failed=failed,
        failed_names={row: manifest.name(row) for row in failed},
        confusion=confusion_KK,
        top5_hits=top5_hits,
        loss=math.fsum(losses) / len(losses) if losses else float("nan"),
        data={
            "fingerprint": manifest.fingerprint,
            "root": str(manifest.root),
            "videos": len(manifest),
            "classes": len(manifest.classes),
        },
        **rest,
    )


def _about_model(
    model: XCLIP, views: TestTransform, labels: int, dtype: torch.dtype | None, templates: Sequence[str] | None
) -> dict[str, Any]:
    config, frames = model.config, views.frames
    actual = flops.count(config, frames=frames, labels=[3] * labels, counting="actual")
    return {
        "variant": dataclasses.replace(config, num_frames=frames).variant_name,
        "frames": frames,
        "image_size": config.vision.image_size,
        "sampling": views.sampling if views.sampling == "sparse" else f"{views.sampling}, stride {views.stride}",
        "templates": len(templates or ()),
        "dtype": str(dtype or next(model.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        # of one view: counted as in the paper's Table 1; then as run here, with encoded labels
        "gflops_per_view": flops.count(config, frames=frames).total / 1e9,
        "gflops_per_view_run": (actual.total - actual.text) / 1e9,
        "config": config.to_dict(),
    }

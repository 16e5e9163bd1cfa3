"""The evaluation of a checkpoint on a manifest, as the command line runs it: files in, figures printed, files out."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

from ..console import Bar
from ..inference.placement import load_model, placed
from ..inference.processes import Process, decided_by_first, find_device, join_processes
from ..text.labels import plain_name
from ..weights.recipe import Trained
from .loop import evaluate
from .report import FILES, reserved, write
from .result import Evaluation, show

log = logging.getLogger("xclip_fast")


def named(result: Evaluation, checkpoint: str | os.PathLike[str], manifest: str | os.PathLike[str]) -> Evaluation:
    """Returns the evaluation result together with model and manifest names."""
    return dataclasses.replace(
        result,
        model={"checkpoint": os.fspath(checkpoint), **result.model},
        data={"manifest": os.fspath(manifest), **result.data},
    )


@contextlib.contextmanager
def joined(
    device: str, out: str | os.PathLike[str] | None, overwrite: bool, names: Collection[str] = FILES
) -> Iterator[Process]:
    """This process beside those of torchrun, with ``out`` reserved: if the first process refuses it, all raise."""
    with join_processes(find_device(device)) as process, contextlib.ExitStack() as held:
        decided_by_first(process, lambda: held.enter_context(reserved(out, overwrite, names)))
        yield process


def main(
    checkpoint: str | os.PathLike[str],
    manifest: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    labels: Sequence[str] | Mapping[str, str] | None = None,
    variant: str | None = None,
    device: str = "auto",
    dtype: str = "auto",
    run: Callable[..., Evaluation] = evaluate,
    **settings: Any,
) -> Evaluation | None:
    """Reads a checkpoint and a manifest, calls ``evaluate``, prints the figures and writes the files into ``out``.

    ``settings`` are the other arguments of ``evaluate``. ``frames``, ``sampling``, ``stride``, ``labels`` and
    ``templates`` default to the values of the training (``weights.recipe.Trained``); ``templates`` may also be True or
    False. Under torchrun each process takes its part of the videos. The first process prints and writes; the others
    return None. ``run`` replaces ``evaluate``, as on a cluster (``scale.evaluation``).

    Raises:
        FileExistsError: before anything is computed, if ``out`` holds an evaluation and ``overwrite`` is not set.
    """
    from ..data.manifest.manifest import Manifest

    videos = Manifest.read(manifest)
    trained = Trained.read(checkpoint)
    known = {plain_name(name) for name in trained.labels}
    if known and videos.classes and not known & {plain_name(name) for name in videos.classes}:
        log.warning(
            "%s: the checkpoint was not trained on any of its %d classes (%s, ...), but on %d others (%s, ...). The "
            "result is zero-shot",
            *(manifest, len(videos.classes), videos.classes[0], len(known), next(iter(trained.labels))),
        )
    with joined(device, out, overwrite) as process:
        model = load_model(checkpoint, variant).to(**placed(process.device, dtype))
        if labels is None and videos.classes:
            labels = trained.texts(videos.classes, model.config.num_classes is not None)
        with Bar(hidden=process.rank > 0) as bar:
            result = run(model, videos, labels=labels, progress=bar.update, **trained.choose(**settings))
        if process.rank:
            return None
        result = named(result, checkpoint, manifest)
        show(result)
        if out is not None:
            write(result, out, overwrite=overwrite)
            print(f"written: {out}", file=sys.stderr)
        return result

"""`VideoStage` on a Ray cluster: paths in, a stage of decoding tasks, a pool of actors that hold the model."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .stage import Batch, VideoStage, as_answers, files


@dataclass(frozen=True)
class ClusterOptions:
    """What a run takes of a cluster.

    `address`: of a running cluster ("auto" finds the one of this machine); None starts one in this process. `actors`
    hold a model each (default: one per GPU, or half of the CPUs). `actor_cpus`, `actor_gpus`: of each. `decoders`:
    decoding tasks at once (default: the CPUs that the actors leave). `batch_size`: windows for a model at once.
    """

    address: str | None = None
    actors: int | None = None
    actor_cpus: float = 1.0
    actor_gpus: float | None = None
    decoders: int | None = None
    batch_size: int = 16


def connect(options: ClusterOptions) -> Any:
    """Ray, connected."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("many machines need Ray: pip install 'xclip-fast[ray]'") from error
    if not ray.is_initialized():
        ray.init(address=options.address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING)
    return ray


def pool_sizes(ray: Any, options: ClusterOptions) -> tuple[int, float, float]:
    """How many actors, the GPUs of each, and the CPUs of the cluster."""
    total = ray.cluster_resources()
    gpus = options.actor_gpus if options.actor_gpus is not None else float(total.get("GPU", 0) > 0)
    cpus = total.get("CPU", 1)
    default = total.get("GPU", 0) // gpus if gpus else cpus // 2 // options.actor_cpus
    return options.actors or max(1, int(default)), gpus, cpus


def run(stage: VideoStage, paths: Sequence[str], options: ClusterOptions) -> Iterator[Batch]:
    """The stage over all paths; batches of answers in any order.

    Windows wait in Ray's object store between the two stages. It is bounded: decoding stops while the models are
    behind. A worker or an actor that dies is started again, and what it had in hand is done again.
    """
    ray = connect(options)
    from ray.data import ActorPoolStrategy, DataContext

    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 32 << 20  # bytes: a film's windows leave the decoder as they come
    context.print_on_execution_start = False
    actors, gpus, cpus = pool_sizes(ray, options)
    decoders = options.decoders or max(1, math.floor(cpus - actors * options.actor_cpus))
    share = min(1.0, max(0.01, (cpus - actors * options.actor_cpus) / decoders))
    blocks = max(1, min(len(paths), max(decoders * 4, len(paths) // 256)))
    rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=blocks)
    windows = rows.map_batches(
        stage.decode,
        batch_size=1,
        num_cpus=share if share != options.actor_cpus else share * 0.99,
        concurrency=decoders,
    )
    answers = windows.map_batches(
        _Actor,
        fn_constructor_args=(stage,),
        batch_size=options.batch_size,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=options.actor_cpus,
        num_gpus=gpus or None,
    )
    yield from answers.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


class _Actor:
    """The stage in an actor, with its model loaded before the first batch."""

    def __init__(self, stage: VideoStage) -> None:
        self.stage = stage
        self.stage.model  # noqa: B018 -- a model that cannot be loaded ends the run at once

    def __call__(self, batch: Batch) -> Batch:
        return self.stage(batch)


def cluster_answers(
    stage: VideoStage, options: ClusterOptions, columns: Sequence[str]
) -> Callable[[Iterable[str]], Iterator[Any]]:
    """In the place of `inference.batches.answers`: the named columns of each window, as float tensors."""
    import numpy as np
    import torch

    def values(row: dict[str, Any]) -> list[torch.Tensor]:
        return [torch.from_numpy(np.array(row[name])).float() for name in columns]

    def embed(paths: Iterable[str]) -> Iterator[Any]:
        given = list(paths)
        return as_answers(files(run(stage, given, options)), values) if given else iter(())

    return embed

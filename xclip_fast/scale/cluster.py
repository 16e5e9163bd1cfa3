"""`VideoStage` on a Ray cluster: tasks decode the files, and a pool of actors with the model answers."""

from __future__ import annotations

import logging
import math
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any

from .stage import Batch, VideoStage, as_answers


@dataclass(frozen=True)
class ClusterOptions:
    """The share of a cluster that a run uses.

    Attributes:
        address: a running cluster; "auto" finds that of this machine, None starts one in this process.
        actors: how many, each with a model and a CPU (default: one for each GPU, or for half of the CPUs).
        decoders: decoding tasks at once (default: one for each CPU that the actors leave).
        batch_size: windows in a batch of a model.
    """

    address: str | None = None
    actors: int | None = None
    decoders: int | None = None
    batch_size: int = 16


def connect(options: ClusterOptions) -> Any:
    """Import Ray and connect to the cluster."""
    try:
        import ray
    except ImportError as error:
        raise ImportError("this needs Ray: pip install 'xclip-fast[ray]'") from error
    if not ray.is_initialized():
        if options.address is None and "RAY_ADDRESS" not in os.environ:  # a new cluster has an access token: no news
            _only_errors("ray._private.authentication.authentication_token_setup")
        with warnings.catch_warnings():  # Ray starts programs: of LanceDB nothing runs between fork and exec
            warnings.filterwarnings("ignore", "lancedb fork support", RuntimeWarning)
            ray.init(
                address=options.address, include_dashboard=False, log_to_driver=False, logging_level=logging.WARNING
            )
    return ray


def _only_errors(logger: str) -> None:
    logging.getLogger(logger).setLevel(logging.ERROR)


def pool_sizes(ray: Any, options: ClusterOptions) -> tuple[int, int, float]:
    """The number of actors, the GPUs of each, and the CPUs of the cluster."""
    total = ray.cluster_resources()
    gpus, cpus = total.get("GPU", 0), total.get("CPU", 1)
    return options.actors or max(1, int(gpus or cpus // 2)), int(gpus > 0), cpus


def run(stage: VideoStage, paths: Sequence[str], options: ClusterOptions) -> Iterator[Batch]:
    """Run the stage over all paths. Returns batches of answers in any order.

    Windows wait for the models in Ray's object store. Its size is bounded: decoding pauses while the models are behind.
    If a worker or an actor dies, Ray starts another and repeats its work.
    """
    ray = connect(options)
    from ray.data import ActorPoolStrategy, DataContext, TaskPoolStrategy

    _only_errors("ray.data._internal.progress")  # warns that it shows no progress bar
    _only_errors("ray.data._internal.execution.streaming_executor")  # says that it has ended
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.target_max_block_size = 32 << 20  # bytes: the windows of a long film are passed on while it is decoded
    context.print_on_execution_start = False
    actors, gpus, cpus = pool_sizes(ray, options)
    decoders = options.decoders or max(1, math.floor(cpus - actors))
    share = min(1.0, max(0.01, (cpus - actors) / decoders))
    blocks = max(1, min(len(paths), max(decoders * 4, len(paths) // 256)))
    rows = ray.data.from_items([{"path": path} for path in paths], override_num_blocks=blocks)
    windows = rows.map_batches(
        stage.decode,
        batch_size=1,
        num_cpus=share if share != 1 else 0.99,
        compute=TaskPoolStrategy(size=decoders),
    )
    answers = windows.map_batches(
        VideoStage,
        fn_constructor_kwargs={each.name: getattr(stage, each.name) for each in fields(stage) if each.init},
        batch_size=options.batch_size,
        compute=ActorPoolStrategy(size=actors),
        num_cpus=1,
        num_gpus=gpus or None,
    )
    yield from answers.iter_batches(batch_size=None, batch_format="numpy", prefetch_batches=1)


def cluster_answers(
    stage: VideoStage, options: ClusterOptions, columns: Sequence[str]
) -> Callable[[Iterable[str]], Iterator[Any]]:
    """As `inference.batches.answers`, on a cluster: the named columns of each window as float tensors."""

    def embed(paths: Iterable[str]) -> Iterator[Any]:
        given = list(paths)
        return as_answers(run(stage, given, options), columns) if given else iter(())

    return embed

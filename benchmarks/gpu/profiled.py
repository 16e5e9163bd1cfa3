"""The GPU kernels of a call, of the stage headline: which they are, and how long each takes."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from contenders import HF_INSTALLED, OURS

from .case import Job, Row
from .headline import Calls, base_of, build, calls_of, peer, training_contenders, under


def kernels(
    job: Job, variant: str, batch: int, backends: tuple[str, ...] = (), step: bool = False, graph: bool = False
) -> Iterator[Row]:
    """The GPU kernels of one call of the tower, or of a training step: [name, calls, microseconds in all]; and the time
    in which the CPU launched them."""
    op = "training step" if step else "tower"
    if step:
        _, contenders = training_contenders(job, variant, batch, HF_INSTALLED)
        calls: Calls = {name: contender.step for name, contender in contenders.items()}
    else:
        model = build(job, variant)
        with torch.inference_mode():
            calls = calls_of(job, model, "tower", batch, peer(job, model), graph)
    calls |= {f"{OURS} {name}": under(name, calls[OURS]) for name in backends}
    for name, call in calls.items():
        if name in job.without:
            continue
        row: Row = {**base_of(job, op, variant, batch), "contender": name, "direction": "kernels"}
        with job.trying(name, row), torch.inference_mode(not step):
            row["kernels"], row["launching_ms"] = kernels_of(job, call)
            row["busy_ms"] = 1e-3 * sum(us for _, _, us in row["kernels"])
        yield row


def kernels_of(job: Job, call: Callable[[], Any]) -> tuple[list[tuple[str, int, float]], float]:
    """(name, calls, microseconds in all) of each kernel of a call, the longest first; on a CPU, of each operator.
    Then the least milliseconds, of five calls, until a call returns."""
    from torch.profiler import ProfilerActivity, profile

    activity, time_of = ProfilerActivity.CUDA, "self_device_time_total"
    if job.device == "cpu":
        activity, time_of = ProfilerActivity.CPU, "self_cpu_time_total"

    def wait() -> None:
        if job.device == "cuda":
            torch.cuda.synchronize()

    call()
    with job.quiet():
        wait()
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            call()
            times.append(time.perf_counter() - begin)
            wait()
        with profile(activities=[activity]) as found:
            call()
            wait()
    rows = [(event.key[:120], event.count, getattr(event, time_of)) for event in found.key_averages()]
    return sorted(rows, key=lambda row: -row[2]), 1e3 * min(times)

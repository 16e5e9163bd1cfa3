"""Stage 2: whether the results are right: each op, backend, dtype and direction, and each model of the headline once.

It also compiles the kernels of the headline, into the cache that all cases share.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from .case import Job, Row

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def op(job: Job, op: str, backend: str) -> Iterator[Row]:
    """One op on one backend: two videos, then one video with an odd number of frames."""
    from xclip_fast.kernels.common.example import TINY, Maker, Sizes
    from xclip_fast.kernels.dispatch import OPS, BackendError
    from xclip_fast.kernels.dispatch import backend as forced
    from xclip_fast.kernels.tune.backends import cast, run

    from . import compare

    entry = OPS[op]
    for name, dtype in DTYPES.items():
        if job.tiny and name == "bf16":
            continue  # Triton's interpreter has no bfloat16
        for direction in ("forward", "backward"):
            row: Row = {"op": op, "contender": backend, "precision": name, "direction": direction}
            grad = direction == "backward"
            with job.trying(f"{name} {direction}", row):
                if f"{name} {direction}" in job.without:
                    continue
                for videos, frames in ((2, 8), (1, 3)):
                    sizes = TINY if job.tiny else Sizes(videos=videos, frames=frames, labels=400)
                    given = cast(entry.example(sizes, Maker(job.device)), dtype, grad)
                    try:
                        with forced(backend):
                            entry.choose(given, grad)
                    except BackendError as refused:
                        row["note"] = f"refused: {refused}"
                        break
                    if grad and not any(isinstance(arg, Tensor) and arg.requires_grad for arg in given):
                        row["note"] = "refused: no argument has a gradient"
                        break
                    cotangent = torch.randn_like(run(entry, given, None)[0]) if grad else None
                    exact_cotangent = None if cotangent is None else cotangent.double()
                    exact = run(entry, cast(given, torch.float64, grad), exact_cotangent)
                    torchs = run(entry, given, cotangent)
                    call = functools.partial(run, entry, given, cotangent, backend)
                    compare.check(job, row, call, exact, torchs)
                    row |= {"videos": videos, "frames": frames}
                    if job.tiny or not row["right"]:
                        break
            yield row


def model(job: Job, variant: str, batch: int, backend: str, kind: str) -> Iterator[Row]:
    """One call of a headline's model, compared with the reference in the same precision; it compiles the kernels."""
    from . import headline

    row: Row = {"op": kind, "variant": variant, "batch": batch, "contender": backend, "precision": job.precision}
    row |= job.attempt(backend, row, headline.once, job, variant, batch, backend, kind) or {}
    yield row

"""Stage 7: the rows of choices.json for this GPU: the right backends of each op at the shapes of B/16.

``python -m xclip_fast.kernels.tune --backends --batch 1 8 32`` writes the same. Inference comes first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Job, Row


def op(job: Job, op: str) -> Iterator[Row]:
    """A row for each shape of an op: the milliseconds of each backend, as in choices.json."""
    from xclip_fast.kernels.common.example import Sizes
    from xclip_fast.kernels.dispatch import choices
    from xclip_fast.kernels.tune import backends, measuring
    from xclip_fast.kernels.tune.shapes import SHAPES

    measuring.DEVICE, measuring.DTYPE = job.device, job.dtype
    shape = Sizes(width=128, image=32, patch=8, frames=4) if job.tiny else SHAPES["B/16"]
    batches = (1, 2) if job.tiny else (1, 8, 32)
    architecture = choices.architecture(torch.empty(0, device=job.device))
    said: list[str] = []
    for where, contest in backends.contests(op, shape, batches, said.append):
        milliseconds: dict[str, float] = {}
        reference: Row = {"op": op, "contender": "reference", "where": where}
        if f"float64 {where}" in job.without:
            continue
        with job.trying(f"float64 {where}", reference):
            calls, agrees = contest()
        if "note" in reference:
            yield reference
            continue
        for name, call in calls.items():
            key = f"{name} {where}"
            if key in job.without:
                continue
            row: Row = {"op": op, "contender": name, "where": where}
            with job.trying(key, row):
                got = job.wrong(call())
                if not agrees(list(got)):
                    row["note"] = "WRONG: not in the table"
                    row["right"] = False
                else:
                    milliseconds[name] = job.milliseconds(call)
            if "note" in row:
                yield row
        if milliseconds:
            best = min(milliseconds, key=milliseconds.__getitem__)
            entry = {"arch": architecture, "where": where, "milliseconds": milliseconds}
            entry["measured"] = measuring.provenance()
            yield {"op": op, "contender": best, "ms": milliseconds[best], "entry": entry, "precision": job.precision}
        said.clear()


OPS = ("attention", "norm_linear", "linear_residual", "patch_embed", "layer_norm")

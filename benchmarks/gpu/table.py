"""Stage 7: the rows of choices.json for this GPU: each op's backends at the shapes of B/16, right ones only.

They are what ``python -m xclip_fast.kernels.tune --backends`` writes, for fewer shapes: those of inference first.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from .case import Job, Row


def op(job: Job, op: str) -> Iterator[Row]:
    """A row for each shape of one op: milliseconds by backend, in the form of the table."""
    from xclip_fast.kernels import _choices, tune, tune_backends

    tune_backends.DEVICE = job.device
    tune_backends.DTYPES = (job.dtype,)
    tune_backends.WIDTHS = (128,) if job.tiny else (768,)
    tune_backends.ROWS = tune.ROWS = (8, 24) if job.tiny else (1576, 12608, 50432)
    tune_backends.LENGTHS = tune.LENGTHS = (17,) if job.tiny else (50, 197)
    tune_backends.FRAMES = (4,) if job.tiny else (8, 64, 256)
    tune_backends.VIDEO_FRAMES = (4,) if job.tiny else (8,)
    tune_backends.IMAGES = ((32, 8),) if job.tiny else ((224, 32), (224, 16))
    architecture = _choices.architecture(torch.empty(0, device=job.device))
    said: list[str] = []
    for where, calls, exact, baseline in tune_backends._contests(op, said.append):
        milliseconds: dict[str, float] = {}
        for name, call in calls.items():
            key = f"{name} {where}"
            if key in job.without:
                continue
            row: Row = {"op": op, "contender": name, "where": where}
            with job.trying(key, row):
                got = job.wrong(call())
                if not tune_backends.agrees(list(got), exact, baseline):
                    row["note"] = "WRONG: not in the table"
                    row["right"] = False
                else:
                    milliseconds[name] = job.milliseconds(call)
            if "note" in row:
                yield row
        if milliseconds:
            best = min(milliseconds, key=milliseconds.__getitem__)
            entry = {"arch": architecture, "where": where, "milliseconds": milliseconds}
            entry["measured"] = tune_backends.provenance() if job.device == "cuda" else {"device": "rehearsal"}
            yield {"op": op, "contender": best, "ms": milliseconds[best], "entry": entry, "precision": job.precision}
        said.clear()


OPS = ("attention", "norm_linear", "linear_residual", "message_kv", "patch_embed", "layer_norm")

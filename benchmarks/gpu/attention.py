"""Stage 5: the attention of each frame over its L tokens and the message, by every backend."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from xclip_fast.kernels import dispatch
from xclip_fast.kernels.attention import ATTENTION, attention_reference
from xclip_fast.kernels.dispatch.parts import Case, refusal
from xclip_fast.kernels.dispatch.support import Backend

from .case import Job, Row

TORCH = ("cudnn", "flash", "efficient", "reference")  # SDPA's kernels, and SDPA's own choice among them


def packed(job: Job, frames: int, tokens: int, heads: int) -> Tensor:
    """Queries, keys and values (F, L + 1, 3, H, C) of the tokens; the spare row holds the message's."""
    return torch.randn(frames, tokens + 1, 3, heads, 64, device=job.device).to(job.dtype)


def backends(
    job: Job,
    frames: int,
    tokens: int,
    heads: int,
    backward: bool = False,
    names: tuple[str, ...] = ATTENTION.names,
) -> Iterator[Row]:
    """A row of each named backend: forward, or forward and backward."""
    qkv = packed(job, frames, tokens, heads)
    dout = torch.randn_like(qkv[:, :, 0]) if backward else None
    compared = [*range(0, frames, max(1, frames // 16)), frames - 1]
    exact = exactly(qkv[compared], None if dout is None else dout[compared])
    length = tokens + 1
    sizes = (frames, length, frames * length, heads, 64, 64 * heads, 256 * heads)
    case = Case(qkv.device, job.dtype, job.dtype, *sizes, training=backward, interpreted=dispatch.off_gpu)
    direction = "forward and backward" if backward else "forward"
    for backend in ATTENTION.backends:
        key = f"{backend.name} {direction}"
        if backend.name not in names or key in job.without:
            continue
        row: Row = {"contender": backend.name, "direction": direction}
        with job.trying(key, row), torch.no_grad():
            reason = refusal(backend, case)
            row |= {"note": f"refused: {reason}"} if reason else timed(job, backend, qkv, dout, compared, exact)
        yield row


def exactly(qkv: Tensor, dout: Tensor | None) -> list[Tensor]:
    """Attention in float64, (F, L + 1, H, C), and the gradient of qkv if that of the result is given."""
    leaf = qkv.double().requires_grad_(dout is not None)
    out = attention_reference(leaf)
    if dout is None:
        return [out]
    return [out.detach(), *torch.autograd.grad(out, leaf, dout.double())]


def timed(
    job: Job, backend: Backend, qkv: Tensor, dout: Tensor | None, compared: list[int], exact: list[Tensor]
) -> Row:
    """The largest relative error of what a backend computes, of the frames ``compared``, and its milliseconds."""

    def call() -> tuple[Tensor, ...]:
        out, saved = backend.forward(dout is not None, qkv, False)
        if dout is None:
            return (out,)
        assert backend.backward is not None
        return out, backend.backward(dout, qkv, out, saved, False)[0]

    got = job.wrong(call())
    errors = [
        float((mine[compared].double() - right).norm() / right.norm()) for mine, right in zip(got, exact, strict=True)
    ]
    finite = all(bool(mine.isfinite().all()) for mine in got)
    row: Row = {"error": max(errors), "right": finite and max(errors) <= 4 * torch.finfo(job.dtype).eps}
    if not row["right"]:
        return {**row, "note": f"WRONG: error {max(errors):.3g}, {'finite' if finite else 'not finite'}"}
    return {**row, "ms": job.milliseconds(call)}


def sizes(job: Job, tokens: int, frames: int, heads: int) -> Iterator[Row]:
    """All backends at one number of tokens: forward, then forward and backward."""
    if job.tiny:
        tokens, frames, heads = 17, 4, 2
    base: Row = {"op": "attention", "tokens": tokens, "frames": frames, "precision": job.precision}
    for backward in (False, True):
        best = float("inf")
        for row in backends(job, frames, tokens, heads, backward):
            if "ms" in row:
                best = min(best, row["ms"])
                row["to_best"] = row["ms"] / best
            yield {**base, **row}

"""Which tile of a Triton kernel is the fastest on this GPU.

Compiling costs most of the time, about a second a kernel, so a model of the GPU orders the tiles of each shape and only
the first few are compiled, compared with torch and timed.
"""

import functools
import json
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_reference
from ..cct_block.products import FOLD_FROM
from ..common.example import Sizes
from ..linear import linear
from ..quick_gelu import quick_gelu_reference
from ..triton import ONE_TILE
from . import measuring
from .measuring import Contest, Contests, Where, normal
from .shapes import LENGTHS, boundaries

TRIED = 4  # tiles a shape
# a row's bounds, the tiles worth trying, the call, what its first result should be
Work = tuple[Where, list[dict[str, Any]], Callable[[], Any], Callable[[], Tensor]]


# ---- the GEMM, with the epilogues of a block


def _gemm_tile(m: int, n: int, warps: int, stages: int, subtiles: int, occupancy: int, **more: Any) -> dict[str, Any]:
    shape = {"BLOCK_M": m, "BLOCK_N": n, "BLOCK_K": 64, "GROUP_M": 8, "SUBTILES": subtiles, "FLATTEN": False}
    return {**shape, "OCCUPANCY": occupancy, "num_warps": warps, "num_stages": stages, **more}


GEMM = [
    _gemm_tile(64, 64, 4, 4, 1, 2, BLOCK_K=128),
    _gemm_tile(64, 128, 4, 3, 2, 3),
    _gemm_tile(128, 64, 4, 4, 1, 2),
    _gemm_tile(128, 128, 8, 4, 2, 1, FLATTEN=True),
    _gemm_tile(128, 128, 4, 3, 4, 2, FLATTEN=True),
    _gemm_tile(128, 128, 8, 3, 4, 2),
    _gemm_tile(128, 256, 8, 3, 4, 1, FLATTEN=True),
]
MULTIPLY_ADDS = 4096  # of a Hopper multiprocessor in a cycle, bfloat16
BYTES = 64  # that it reads from L2 in a cycle
EPILOGUE = 0.2  # cycles an element: 7,000 of a 128 x 256 tile, read from its code


def gemm_cycles(use: dict[str, Any], m: int, n: int, k: int, sms: int) -> float:
    """Estimated cycles of a product: whole waves of tiles, bound by tensor cores or by L2, and the epilogues that
    nothing hides. It only orders the tiles; what is taken is measured."""
    height, width, occupancy = use["BLOCK_M"], use["BLOCK_N"], use["OCCUPANCY"]
    tiles = -(-m // height) * -(-n // width)
    waves, rest = divmod(tiles, sms * occupancy)
    in_turn = waves * occupancy + -(-rest // sms)  # tiles of the fullest multiprocessor
    main = k * max(height * width / MULTIPLY_ADDS, 2 * (height + width) / BYTES)
    shown = 0.5 if in_turn > 1 and (use["FLATTEN"] or occupancy > 1) else 1.0
    return in_turn * (main + shown * EPILOGUE * height * width)


def _right(
    x: Tensor,
    weight: Tensor,
    *,
    bias: Tensor,
    norm: tuple[Tensor, Tensor, Tensor] | None = None,
    activation: bool = False,
    residual: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """What ``gemm`` computes, by torch: its first result in float32."""
    y = linear(x, weight).float()
    if norm is not None:
        mean, rstd, sums = norm
        y = rstd[:, None] * (y - mean[:, None] * sums)
    y = y + bias
    if activation:
        y = quick_gelu_reference(y)
    return y if residual is None else y + residual


def gemm_work(shape: Sizes, batches: tuple[int, ...]) -> Iterator[Work]:
    """The four products of a block."""
    from ..triton.gemm import gemm
    from ..triton.launching import processors

    width, every = shape.width, tuple(shape.frames * shape.tokens * batch for batch in batches)
    for m in every:
        residual = normal(m, width)
        norm = tuple(torch.rand(size, device=measuring.DEVICE) for size in (m, m))
        for n, k, extra in (
            (3 * width, width, {}),
            (4 * width, width, {"activation": True}),
            (width, 4 * width, {"residual": residual}),
            (width, width, {"residual": residual}),
        ):
            x, weight, bias = normal(m, k), normal(n, k) * k**-0.5, normal(n)
            added = int("residual" in extra)
            given: dict[str, Any] = {**extra, "bias": bias}
            if not added and m >= FOLD_FROM:
                given["norm"] = (*norm, weight.float().sum(1))
            where = {"m": boundaries(every, m), "n": [n, n], "k": [k, k], "bytes": [2, 2]}
            where |= {"residual": [added, added], "aligned": [1, 1]}
            cycles = functools.partial(gemm_cycles, m=m, n=n, k=k, sms=processors(x.device))
            candidates = sorted(GEMM, key=cycles)[:TRIED]
            call = functools.partial(gemm, x, weight, **given)
            yield where, candidates, call, functools.partial(_right, x, weight, **given)


# ---- attention


ATTENTION = [
    {"BLOCK_M": m, "BLOCK_N": n, "num_warps": warps, "num_stages": stages}
    for m, n, warps, stages in (
        (64, 32, 4, 3),
        (64, 64, 4, 1),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (128, 64, 4, 2),
        (128, 64, 8, 2),
        (128, 64, 8, 3),
    )
]


def attention_work(op: str, shape: Sizes, batches: tuple[int, ...]) -> Iterator[Work]:
    from ..attention import triton as attention

    length, heads, backward = shape.tokens + 1, shape.width // 64, op != "attention"
    candidates = attention_candidates(length, op.endswith("dk_dv"))
    if backward and length <= ONE_TILE[2]:
        return  # it has a kernel without tiles
    frames = shape.frames * max(batches)
    qkv = normal(frames, length, 3, heads, 64)
    where = {"length": boundaries(tuple(sorted({*(each + 1 for each in LENGTHS), length})), length), "bytes": [2, 2]}
    some = slice(min(frames, 16))  # what is compared: scores of all frames would not fit

    def right() -> Tensor:
        given = qkv[some].float().requires_grad_(backward)
        y = attention_reference(given)
        return torch.autograd.grad(y, given, dout[some].float())[0] if backward else y

    if not backward:
        yield where, candidates, functools.partial(attention.forward, False, qkv), right
        return
    out, saved = attention.forward(True, qkv)
    dout = torch.randn_like(out)
    yield where, candidates, lambda: attention.backward(dout, qkv, out, saved)[0], right


def attention_candidates(length: int, keys_outside: bool) -> list[dict[str, Any]]:
    """The tiles that compute the fewest queries and keys past the end. ``keys_outside``: for dk and dv."""

    def padded(size: int, block: int) -> int:
        rest = size % block
        return size - rest + (max(16, 1 << (rest - 1).bit_length()) if rest else 0)

    def computed(use: dict[str, Any]) -> tuple[int, int]:
        queries, keys = padded(length, use["BLOCK_M"]), padded(length, use["BLOCK_N"])
        return queries * keys, -use["BLOCK_N" if keys_outside else "BLOCK_M"]

    return sorted(ATTENTION, key=computed)[:TRIED]


# ---- measuring


WORK: dict[str, Callable[[Sizes, tuple[int, ...]], Iterator[Work]]] = {
    **{op: functools.partial(attention_work, op) for op in ("attention", "attention_dq", "attention_dk_dv")},
    "gemm": gemm_work,  # last: it takes the most, and has the time that the others leave
}


NAMES = tuple(WORK)


def row(found: dict[str, float]) -> dict[str, Any]:
    best = next(iter(found))
    facts = measuring.provenance()
    measured = f"{facts['device']}, Triton {facts['triton']}, {found[best]:.4f} ms"
    return {"use": json.loads(best), "measured": measured}


def contests(op: str, shape: Sizes, batches: tuple[int, ...], say: Callable[[str], None]) -> Contests:
    for where, candidates, call, right in WORK[op](shape, batches):
        yield where, functools.partial(_contest, op, candidates, call, right)


def _contest(
    op: str, candidates: list[dict[str, Any]], call: Callable[[], Any], right: Callable[[], Tensor]
) -> Contest:
    wanted = right()
    calls: dict[str, Callable[[], Any]] = {
        json.dumps(use): functools.partial(_with_tile, op, use, call) for use in candidates
    }
    return Contest(calls, functools.partial(agrees, wanted=wanted))


def _with_tile(op: str, use: dict[str, Any], call: Callable[[], Any]) -> Any:
    from ..triton.launching import forced_tile

    with forced_tile(op, use):
        return call()


def agrees(result: Any, wanted: Tensor) -> bool:
    """Whether the first result of a call is what torch computes, up to bfloat16's rounding; NaN is wrong."""
    while not isinstance(result, Tensor):
        result = result[0]
    got = result[: len(wanted)].float()
    return bool((got - wanted).abs().max() <= 0.02 * wanted.abs().max())

"""Which backend is the fastest on this GPU: what ``python -m xclip_fast.kernels.tune --backends`` measures.

Every backend of every op of a model, and of every part in its place in a block, forward alone and with gradients. A
backend that computes something else than the reference, in the sense of the tests, is reported and left out. choices.py
reads what is written.
"""

import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..cct_block import plans
from ..cct_block.example import example
from ..common.block import Block
from ..common.example import Maker, Sizes
from ..dispatch import OPS, Op, backend
from ..dispatch.parts import refusal
from . import measuring
from .measuring import Contest, Contests, Where
from .shapes import boundaries

# part -> the slots of a block's plan that it fills
SLOTS = {
    "norm_linear": ("qkv", "fc"),
    "linear_residual": ("out", "projection"),
    "attention": ("attention",),
}
NAMES = (*SLOTS, *(name for name, op in OPS.items() if op.sizes is not None))


def row(found: dict[str, float]) -> dict[str, Any]:
    return {"milliseconds": found, "measured": measuring.provenance()}


def _is(**sizes: int) -> Where:
    return {name: [size, size] for name, size in sizes.items()}


def cases(name: str, shape: Sizes, batches: tuple[int, ...]) -> Iterator[tuple[Where, tuple[Any, ...]]]:
    """Where a row of an op holds, and arguments, in float32."""
    op, make = OPS[name], Maker(measuring.DEVICE)
    assert op.sizes is not None
    every = [op.sizes(*op.example(shape._replace(videos=batch), Maker("meta", empty=True))) for batch in batches]
    heights = tuple(sizes["m"] for sizes in every)
    for batch, sizes in zip(batches, every, strict=True):
        yield {**_is(**sizes), "m": boundaries(heights, sizes["m"])}, op.example(shape._replace(videos=batch), make)


def blocks(shape: Sizes, batches: tuple[int, ...]) -> Iterator[tuple[Where, Block]]:
    """Where a row of a part holds, and a block to measure it with: a candidate is timed among the others."""
    width, length, every = shape.width, shape.tokens + 1, tuple(shape.frames * batch for batch in batches)
    for m in every:
        where = {"m": boundaries(every, m), **_is(length=length, k=width, heads=width // 64, frames=shape.frames)}
        yield where, example(m, length, width, shape.frames, device=measuring.DEVICE)


def contests(name: str, shape: Sizes, batches: tuple[int, ...], say: Callable[[str], None]) -> Contests:
    """Inference first, then training."""
    kind = [str(measuring.DTYPE).removeprefix("torch.")] * 2
    for training in (False, True):
        where: Where = {"dtype": kind, "training": [training] * 2}
        if name in SLOTS and name != "attention":  # attention reads no residual stream
            where["stream"] = kind
        if name not in SLOTS:
            for sizes, args in cases(name, shape, batches):
                yield where | sizes, functools.partial(_contest, OPS[name], args, training, _of_an_op, say)
            continue
        for (sizes, block), slot in itertools.product(blocks(shape, batches), SLOTS[name]):
            with backend("fused"):
                own = plans.slots(plans.case_of(block, training))[slot][2]
            of_part = functools.partial(_of_a_part, slot)
            contest = functools.partial(_contest, OPS["cct_block"], tuple(block), training, of_part, say)
            yield where | sizes | _is(**own), contest


def _contest(
    op: Op,
    args: tuple[Any, ...],
    training: bool,
    contenders: Callable[..., Iterator[tuple[str, str | None, Callable[..., list[Tensor]]]]],
    say: Callable[[str], None],
) -> Contest:
    given = cast(args, measuring.DTYPE, training)
    cotangent = torch.randn_like(run(op, given, None)[0]) if training else None
    exact = run(op, cast(given, torch.float64, training), None if cotangent is None else cotangent.double())
    baseline = run(op, given, cotangent)
    calls: dict[str, Callable[[], Any]] = {}
    for name, refused, call in contenders(op, given, training):
        if refused:
            say(f"{op.name}: {name} refuses: {refused}")
        else:
            calls[name] = functools.partial(call, op, given, cotangent, name)
    return Contest(calls, lambda got: operator.le(*judge(got, exact, baseline)))


def _of_an_op(op: Op, given: tuple[Any, ...], training: bool) -> Iterator[tuple[str, str | None, Any]]:
    for name in (each.name for each in op.backends):
        with backend(name):
            yield name, op.reasons(given, training)[name], run


def _of_a_part(slot: str, op: Op, given: tuple[Any, ...], training: bool) -> Iterator[tuple[str, str | None, Any]]:
    def swapped(op: Op, args: tuple[Any, ...], cotangent: Tensor | None, name: str) -> list[Tensor]:
        with plans.swap(slot, name):
            return run(op, args, cotangent, "fused")

    with backend("fused"):
        case = plans.case_of(Block(*given), training)
    for candidate in plans.slots(case)[slot][0].backends:
        yield candidate.name, refusal(candidate, case), swapped


def cast(args: tuple[Any, ...], dtype: torch.dtype, training: bool = False) -> tuple[Any, ...]:
    """The arguments, the floating ones in a dtype and, for training, as leaves of autograd."""
    return tuple(
        arg.detach().to(dtype).requires_grad_(training) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def run(op: Op, args: tuple[Any, ...], cotangent: Tensor | None, name: str = "reference") -> list[Tensor]:
    """The first output of a backend, without spare rows, and for a cotangent the gradient of every argument."""
    with backend(name), torch.set_grad_enabled(cotangent is not None):
        result = op(*args)
        output: Tensor = result[0] if isinstance(result, tuple) else result
        if op.name == "cct_block" and Block(*args).frames:
            output = output[:, :-1]
        if cotangent is None:
            return [output]
        leaves = [arg for arg in args if isinstance(arg, Tensor) and arg.requires_grad]
        grads = torch.autograd.grad(output, leaves, cotangent, allow_unused=True)
    return [output.detach(), *(grad for grad in grads if grad is not None)]


def error(got: Tensor, exact: Tensor) -> float:
    """The largest difference relative to the largest value; NaN if there is any NaN."""
    return float((got.double() - exact.double()).abs().max() / exact.double().abs().max().clamp(min=1e-30))


def judge(got: Sequence[Tensor], exact: Sequence[Tensor], baseline: Sequence[Tensor]) -> tuple[float, float]:
    """The error of the worst result, and its limit: 2 err(torch in the same dtype) + 4 eps, as in the tests.

    A missing result has an infinite error; NaN is above every limit.
    """
    if [mine.shape for mine in got] != [right.shape for right in exact]:
        return math.inf, 0.0
    pairs = []
    for mine, right, torchs in zip(got, exact, baseline, strict=True):
        pairs.append((error(mine, right), 2 * error(torchs, right) + 4 * torch.finfo(mine.dtype).eps))
    return max(pairs, key=lambda pair: math.inf if math.isnan(pair[0]) else pair[0] / pair[1])

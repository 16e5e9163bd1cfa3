"""Which backend is the fastest on this GPU: what ``python -m xclip_fast.kernels.tune --backends`` measures.

Every backend of every op of a model's blocks, at its shapes, forward alone and with gradients, and every tile of the
CUDA library's products. A backend that computes something else than the reference, in the sense of the tests, is
reported and left out. choices.py reads what is written.
"""

import datetime
import functools
import importlib.metadata
import importlib.util
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import choices, cuda_library
from ..arguments import Block
from ..cct_block import fused
from ..cct_block.example import example
from ..dispatch import OPS, Op, backend
from ..quick_gelu import quick_gelu_reference
from .shapes import Shape, boundaries
from .tiles import failures, milliseconds

DTYPE = torch.bfloat16
DEVICE = "cuda"
EPS = 1e-5

Case = tuple[dict[str, list[Any]], tuple[Any, ...]]  # where a row holds, and the arguments it is measured with


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    return torch.randn(shape, device=DEVICE) * scale


def _linear(columns: int, inner: int) -> tuple[Tensor, Tensor]:
    return _normal(columns, inner, scale=inner**-0.5), _normal(columns, scale=0.1)


def _norm(width: int) -> tuple[Tensor, Tensor]:
    return 1 + _normal(width, scale=0.1), _normal(width, scale=0.1)


def _is(**sizes: int) -> dict[str, list[int]]:
    return {name: [size, size] for name, size in sizes.items()}


# ---- the arguments, in float32


def _frames(shape: Shape, batches: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(shape.frames * batch for batch in batches)


def _patch_embed(shape: Shape, batches: tuple[int, ...]) -> Iterator[Case]:
    width, side, length = shape.width, shape.image, shape.tokens
    for m in _frames(shape, batches):
        frames = torch.randint(256, (m, side, side, 3), dtype=torch.uint8, device=DEVICE)
        weight = _normal(width, 3, shape.patch, shape.patch, scale=0.02)
        args = (frames, weight, _normal(width), _normal(length, width), *_norm(width), [0.45] * 3, [0.225] * 3, EPS)
        yield {"m": boundaries(_frames(shape, batches), m), **_is(length=length, n=width, levels=1)}, args


def _layer_norm(shape: Shape, batches: tuple[int, ...]) -> Iterator[Case]:
    width, every = shape.width, shape.rows(batches)
    for m in every:
        yield {"m": boundaries(every, m), **_is(k=width)}, (_normal(m, width), *_norm(width), EPS)


WORK: dict[str, Callable[[Shape, tuple[int, ...]], Iterator[Case]]] = {
    "patch_embed": _patch_embed,
    "layer_norm": _layer_norm,
}


# part -> the slots of a block's plan that it fills
SLOTS = {
    "norm_linear": ("qkv", "fc"),
    "linear_residual": ("out", "projection"),
    "message_kv": ("message",),
    "attention": ("attention",),
}


def _blocks(shape: Shape, batches: tuple[int, ...]) -> Iterator[tuple[dict[str, list[Any]], Block]]:
    """Where a row holds, and a block to measure it with: a candidate is timed in its place, beside the others."""
    width, length, every = shape.width, shape.tokens + 1, _frames(shape, batches)
    for m in every:
        where = {"m": boundaries(every, m), **_is(length=length, k=width, heads=width // 64, frames=shape.frames)}
        yield where, example(m, length, width, shape.frames, device=DEVICE)


def _norm_linear(x: Tensor, weight: Tensor, bias: Tensor, tile: str) -> list[Tensor]:
    return [cuda_library.norm_linear(x, weight, bias, tile=tile)[0]]


def _activated(x: Tensor, weight: Tensor, bias: Tensor, tile: str) -> list[Tensor]:
    return [cuda_library.norm_linear(x, weight, bias, activation=True, tile=tile)[0]]


def _residual(x: Tensor, weight: Tensor, bias: Tensor, tile: str) -> list[Tensor]:
    return [cuda_library.linear_residual(x, weight, bias, _beside(x, weight), tile=tile)]


def _slope(x: Tensor, weight: Tensor, bias: Tensor, tile: str) -> list[Tensor]:
    return [cuda_library.linear_slope(x, weight, _beside(x, weight), tile=tile)[0]]


def _beside(x: Tensor, weight: Tensor) -> Tensor:
    """The (M, N) matrix that an epilogue reads: made of what is there, so that it is the same in each call."""
    return x[:, :1].expand(-1, weight.shape[0]).contiguous()


def _slope_exactly(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
    u = _beside(x, weight)
    s = torch.sigmoid(1.702 * u)
    return [(x @ weight.T) * s * (1 + 1.702 * u * (1 - s))]


# library's call -> other sizes of a row, (columns, inner) by width, the call, what it computes
Results = Callable[..., list[Tensor]]
Product = tuple[dict[str, int], Callable[[int], tuple[int, int]], Results, Results]
TILE_WORK: dict[str, list[Product]] = {
    "cuda norm_linear": [
        ({"activation": 0}, lambda d: (3 * d, d), _norm_linear, lambda x, w, b: [x @ w.T + b]),
        ({"activation": 1}, lambda d: (4 * d, d), _activated, lambda x, w, b: [quick_gelu_reference(x @ w.T + b)]),
    ],
    "cuda linear_residual": [
        ({}, shape, _residual, lambda x, w, b: [_beside(x, w) + x @ w.T + b])
        for shape in (lambda d: (d, d), lambda d: (d, 4 * d))
    ],
    "cuda linear_slope": [({}, lambda d: (4 * d, d), _slope, _slope_exactly)],
}


# ---- measuring


def measure(
    name: str, shape: Shape, batches: tuple[int, ...], deadline: float, say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], int]:
    """The rows of one op, or of one product's tiles, and how many contenders were left out as wrong.

    Nothing is begun after ``deadline`` (of ``time.monotonic``); a row has what was timed until then.
    """
    rows, wrong = [], 0
    architecture = choices.architecture(torch.empty(0, device=DEVICE))
    for where, contest in contests(name, shape, batches, say):
        if time.monotonic() >= deadline:
            say(f"{name} {where}: the time is over")
            break
        try:
            contenders, exact, baseline = contest()
        except failures() as error:  # the float64 reference finds no memory
            say(f"{name} {where}: is not measured: {_first_line(error)}")
            continue
        found: dict[str, float] = {}
        for contender, call in contenders.items():
            if found and time.monotonic() >= deadline:
                break
            try:
                got = call()
                if not agrees(got, exact, baseline):
                    say(f"{name} {where}: {contender} COMPUTES SOMETHING ELSE, and is left out")
                    wrong += 1
                    continue
                found[contender] = milliseconds(call)
            except failures() as error:  # a tile that was not built, a kernel that does not fit, no memory
                say(f"{name} {where}: {contender} does not run: {_first_line(error)}")
        if found:
            say(f"{name} {where}: " + ", ".join(f"{key} {found[key]:.4f} ms" for key in sorted(found, key=found.get)))  # type: ignore[arg-type]
            rows.append({"arch": architecture, "where": where, "milliseconds": found, "measured": provenance()})
    return rows, wrong


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# the contenders; the result in float64; the same in the dtype, by torch
Contest = tuple[dict[str, Results], list[Tensor], list[Tensor]]


def contests(
    name: str, shape: Shape, batches: tuple[int, ...], say: Callable[[str], None]
) -> Iterator[tuple[dict[str, list[Any]], Callable[[], Contest]]]:
    """Where a row holds, and what makes its contest: inference first, then training."""
    if name in TILE_WORK:
        yield from _tile_contests(name, shape, batches)
        return
    where: dict[str, list[Any]]
    for training in (False, True):
        if name in SLOTS:
            for (bounds, block), slot in itertools.product(_blocks(shape, batches), SLOTS[name]):
                with backend("fused"):
                    own = fused.slots(fused.case_of(block, training))[slot][2]
                where = {"dtype": [_name(DTYPE)] * 2, "training": [training] * 2, **bounds, **_is(**own)}
                yield where, functools.partial(_part_contest, name, slot, training, where, tuple(block), say)
            continue
        for sizes, args in WORK[name](shape, batches):
            where = {"dtype": [_name(DTYPE)] * 2, "training": [training] * 2, **sizes}
            yield where, functools.partial(_op_contest, name, training, where, args, say)


def _part_contest(
    name: str, slot: str, training: bool, where: dict[str, list[Any]], args: tuple[Any, ...], say: Callable[[str], None]
) -> Contest:
    op, given = OPS["cct_block"], _cast(args, DTYPE, training)
    cotangent = torch.randn_like(_run(op, given, None)[0]) if training else None
    exact = _run(op, _cast(given, torch.float64, training), None if cotangent is None else cotangent.double())
    with backend("fused"):
        case = fused.case_of(Block(*given), training)
    contenders: dict[str, Results] = {}
    for candidate in fused.slots(case)[slot][0].candidates:
        if refused := candidate.refusal(case):
            say(f"{name} {where}: {candidate.name} refuses: {refused}")
        else:
            contenders[candidate.name] = functools.partial(_swapped, slot, op, given, cotangent, candidate.name)
    return contenders, exact, _run(op, given, cotangent)


def _swapped(slot: str, op: Op, args: tuple[Any, ...], cotangent: Tensor | None, name: str) -> list[Tensor]:
    with fused.swap(slot, name):
        return _run(op, args, cotangent, "fused")


def _op_contest(
    name: str, training: bool, where: dict[str, list[Any]], args: tuple[Any, ...], say: Callable[[str], None]
) -> Contest:
    op, given = OPS[name], _cast(args, DTYPE, training)
    cotangent = torch.randn_like(_run(op, given, None)[0]) if training else None
    exact = _run(op, _cast(given, torch.float64, training), None if cotangent is None else cotangent.double())
    contenders: dict[str, Results] = {}
    for candidate in op.backends:
        with backend(candidate.name):
            refused = candidate.refusal(given, training)
        if refused:
            say(f"{name} {where}: {candidate.name} refuses: {refused}")
        else:
            contenders[candidate.name] = functools.partial(_run, op, given, cotangent, candidate.name)
    return contenders, exact, _run(op, given, cotangent)


def _tile_contests(
    name: str, shape: Shape, batches: tuple[int, ...]
) -> Iterator[tuple[dict[str, list[Any]], Callable[[], Contest]]]:
    every = shape.rows(batches)
    names = [tile for tile in cuda_library.TILES if tile != "auto"]
    for more, sizes, call, exactly in TILE_WORK[name]:
        n, k = sizes(shape.width)
        for m in every:
            operands = _cast((_normal(m, k), *_linear(n, k)), DTYPE)

            def contest(operands: Any = operands, call: Any = call, exactly: Any = exactly) -> Contest:
                tiles: dict[str, Results] = {tile: functools.partial(call, *operands, tile) for tile in names}
                return tiles, exactly(*_cast(operands, torch.float64)), exactly(*operands)

            yield {"dtype": [_name(DTYPE)] * 2, "m": boundaries(every, m), **_is(n=n, k=k, **more)}, contest


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _cast(args: tuple[Any, ...], dtype: torch.dtype, training: bool = False) -> tuple[Any, ...]:
    return tuple(
        arg.detach().to(dtype).requires_grad_(training) if isinstance(arg, Tensor) and arg.is_floating_point() else arg
        for arg in args
    )


def _run(op: Op, args: tuple[Any, ...], cotangent: Tensor | None, name: str = "reference") -> list[Tensor]:
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


def agrees(got: list[Tensor], exact: list[Tensor], baseline: list[Tensor]) -> bool:
    """err <= 2 err(torch in the same dtype) + eps of each result, by the largest difference of all; NaN is wrong."""

    def error(tensor: Tensor, right: Tensor) -> float:
        return float((tensor.double() - right).abs().max() / right.abs().max().clamp(min=1e-30))

    return len(got) == len(exact) and all(
        mine.shape == right.shape and error(mine, right) <= 2 * error(torchs, right) + torch.finfo(mine.dtype).eps
        for mine, right, torchs in zip(got, exact, baseline, strict=True)
    )


def provenance() -> dict[str, Any]:
    """On what a row was measured, and when."""
    version = importlib.metadata.version("triton") if importlib.util.find_spec("triton") else None
    return {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": version,
        "library": cuda_library.ABI if cuda_library.load(cuda_library.path())[0] else None,
        "date": datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d"),
    }

"""Which backend each part of a block runs on: one choice for each kind of call, made once and kept."""

import contextlib
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import dispatch
from ..attention import ATTENTION, WINDOW_ATTENTION
from ..common.block import GELUS, Block
from ..dispatch import tables
from ..dispatch.parts import Case, Part
from ..dispatch.support import Backend, installed
from ..layer_norm import WIDEST_ROW
from ..message_kv import MESSAGE
from ..packed_attention import PACKED_ATTENTION
from .products import LINEAR_RESIDUAL, NORM_LINEAR


class Plan(NamedTuple):
    """The backend of every part."""

    qkv: Backend
    message: Backend | None
    attention: Backend
    out: Backend
    fc: Backend
    projection: Backend


PARTS = (NORM_LINEAR, LINEAR_RESIDUAL, MESSAGE, ATTENTION, PACKED_ATTENTION, WINDOW_ATTENTION)
PART_NAMES = tuple(dict.fromkeys(name for part in PARTS for name in part.names if name != "reference"))
_PLANNED = frozenset(("auto", *PART_NAMES))


def case_of(b: Block, training: bool) -> Case:
    """The kind of call that these arguments are."""
    x, device, shape = b.x, b.x.device, b.x.shape
    width, packed, dtype = int(shape[-1]), b.offsets is not None, b.in_weight.dtype
    if dtype != torch.float64:
        dtype = dispatch.autocast_dtype(device.type) or dtype
    if b.backend:  # traced: sizes may be symbols, and the plan must not depend on them
        count, length, rows = 1, 1, 1
    elif b.offsets is not None:
        count, length, rows = b.offsets.shape[0] - 1, b.longest, shape[0]
    else:
        count, length, _ = shape
        rows = count * length
    return Case(
        device,
        dtype,
        x.dtype,
        count,
        length,
        rows,
        b.heads,
        width // b.heads,
        width,
        int(b.fc_weight.shape[0]),
        (1 if b.frames else 0) if b.backend else b.frames,
        b.causal,
        packed,
        0 if b.bias is None else 1 if b.backend else b.bias.shape[0],
        training,
        b.activation,
        b.backend or dispatch.forced_backend(),
        bool(b.backend),
        dispatch.off_gpu,
    )


@contextlib.contextmanager
def swap(slot: str, name: str) -> Iterator[None]:
    """Take this candidate in a slot of every plan inside the block, whatever it refuses: for tuning and tests."""
    _swapped[slot] = name
    plan.cache_clear()
    try:
        yield
    finally:
        del _swapped[slot]
        plan.cache_clear()


_swapped: dict[str, str] = {}


def _refusal(*case: Any) -> str | None:
    found = plan(Case(*case))
    return found if isinstance(found, str) else None


# what torch.compiler.assume_constant_result does, which would import the compiler (and Triton) with this package
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


@functools.lru_cache(4096)
def plan(case: Case) -> Plan | str:
    """The plan of a kind of call, or why there is none."""
    if case.rows == 0:
        return "there are no rows"
    asked = case.interpreted > 1 or (case.interpreted and case.forced != "auto")
    if case.device.type != "cuda" and not asked:
        return f"device {case.device.type} is not cuda (TRITON_INTERPRET=1 and backend triton run it slowly anywhere)"
    if dispatch.INTERPRETED and case.device.type != "cuda" and torch.bfloat16 in (case.dtype, case.stream):
        return "Triton's interpreter does not compute in bfloat16"
    if case.stream not in (case.dtype, torch.float32):
        return f"a residual stream of {case.stream} beside weights of {case.dtype}"
    if case.width > WIDEST_ROW:
        return f"width {case.width} is over {WIDEST_ROW}"
    if not installed("triton"):
        return "the package triton is not installed (pip install triton)"
    found: dict[str, Any] = {"message": None}
    for slot, (part, part_case, sizes) in slots(case).items():
        name = _swapped.get(slot)
        found[slot] = part.choose(part_case, **sizes) if name is None else part.backends[part.names.index(name)]
    reasons = [each for each in found.values() if isinstance(each, str)]
    return "; ".join(reasons) if reasons else Plan(**found)


def slots(case: Case) -> dict[str, tuple[Part, Case, dict[str, int]]]:
    """What a plan chooses: by name of the slot, the part, the kind of call, and sizes of its own."""
    width, hidden = case.width, case.hidden
    # asked for, a backend need not have what only some blocks want
    attention = case._replace(forced="auto") if case.causal and case.forced == "triton" else case
    fc = case._replace(forced="auto") if case.activation in GELUS and case.forced == "triton" else case
    case = case._replace(activation="quick_gelu")  # it concerns fc alone
    mixing = PACKED_ATTENTION if case.packed else WINDOW_ATTENTION if case.windows else ATTENTION
    found: dict[str, tuple[Part, Case, dict[str, int]]] = {
        "qkv": (NORM_LINEAR, case, {"n": 3 * width, "k": width, "activation": 0}),
        "attention": (mixing, attention, {}),
        "out": (LINEAR_RESIDUAL, case, {"n": width, "k": width}),
        "fc": (NORM_LINEAR, fc, {"n": hidden, "k": width, "activation": 1}),
        "projection": (LINEAR_RESIDUAL, case, {"n": width, "k": hidden}),
    }
    return {**found, "message": (MESSAGE, case, {})} if case.frames else found


tables.kept.append(plan)


def refuse(*args: Any) -> str | None:
    """Why the block does not run as one on these arguments, or None."""
    b = Block(*args)
    grad = torch.is_grad_enabled()
    if grad and any(
        drop is not None and drop.requires_grad for drop in (b.drop_fusion, b.drop_attention, b.drop_feed_forward)
    ):
        return "a drop path factor requires a gradient"
    case = case_of(b, grad and any(isinstance(arg, Tensor) and arg.requires_grad for arg in args))
    if torch.compiler.is_compiling():
        return _refusal(*case)
    found = plan(case)
    return found if isinstance(found, str) else None


def inference_plan(b: Block) -> Plan | None:
    """The plan of an eager call that wants no gradient, if there is one. The op would find the same, but it asks what
    the backend for every call of a forward is; None: ask it."""
    x = b.x
    if dispatch.forced_backend() not in _PLANNED:
        return None
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in b):
        return None
    if dispatch.autocast_dtype(x.device.type):
        return None  # the op lowers the weights
    found = plan(case_of(b, False))
    return None if isinstance(found, str) else found


def plan_of(b: Block, training: bool) -> Plan:
    found = plan(case_of(b, training))
    if isinstance(found, str):
        raise dispatch.BackendError(f"no plan of cct_block: {found}")
    return found

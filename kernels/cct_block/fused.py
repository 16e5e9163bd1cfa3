"""A block on a GPU as one forward and one backward: the parts that a plan names, and one pass where they leave a gap.

M rows of the residual stream, R rows that leave the block, D width, F frames of S rows.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import choices, dispatch, triton
from ..arguments import GELUS, Block
from ..attention import ATTENTION, PACKED_ATTENTION, WINDOW_ATTENTION
from ..layer_norm import WIDEST_ROW
from ..linear import product
from ..message_kv import MESSAGE, SAVED
from ..parts import Case, Part
from ..support import Backend, installed
from . import reference
from .products import LINEAR_RESIDUAL, NORM_LINEAR, Layer, Norm, Normed, Target, slope


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


def case_of(b: Block, training: bool) -> Case:
    """The kind of call that these arguments are."""
    x, device = b.x, b.x.device
    width, packed = int(x.shape[-1]), b.offsets is not None
    dtype = b.in_weight.dtype
    if dtype != torch.float64:
        dtype = dispatch.autocast_dtype(device.type) or dtype
    if b.backend:  # traced: sizes may be symbols, and the plan must not depend on them
        count, length, rows = 1, 1, 1
    elif b.offsets is not None:
        count, length, rows = b.offsets.shape[0] - 1, b.longest, x.shape[0]
    else:
        (count, length), rows = x.shape[:2], x.shape[0] * x.shape[1]
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


def plan(case: Case) -> Plan | str:
    """The plan of a kind of call, or why there is none."""
    return _kept_plan(case, tuple(_swapped.items()))


@contextlib.contextmanager
def swap(slot: str, name: str) -> Iterator[None]:
    """Take this candidate in a slot of every plan inside the block, whatever it refuses: for tuning and tests."""
    _swapped[slot] = name
    try:
        yield
    finally:
        del _swapped[slot]


_swapped: dict[str, str] = {}


def _refusal(*case: Any) -> str | None:
    found = plan(Case(*case))
    return found if isinstance(found, str) else None


# what torch.compiler.assume_constant_result does, which would import the compiler (and Triton) with this package
_refusal._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_plan(case: Case, swapped: tuple[tuple[str, str], ...] = ()) -> Plan | str:
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
        name = dict(swapped).get(slot)
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


_kept_plan = functools.lru_cache(4096)(_find_plan)
choices.kept.append(_kept_plan)


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
    if dispatch.forced_backend() not in ("auto", *PART_NAMES):
        return None
    if torch.is_grad_enabled() and any(isinstance(arg, Tensor) and arg.requires_grad for arg in b):
        return None
    if dispatch.autocast_dtype(x.device.type):
        return None  # the op lowers the weights
    found = plan(case_of(b, False))
    return None if isinstance(found, str) else found


def _plan_of(b: Block, training: bool) -> Plan:
    found = plan(case_of(b, training))
    if isinstance(found, str):
        raise dispatch.BackendError(f"no plan of cct_block: {found}")
    return found


def _plain(args: Sequence[Any]) -> Block:
    """The arguments with neighboring numbers side by side, as kernels read them; a copy of those that are not."""
    plain: Any = [
        arg.contiguous() if isinstance(arg, Tensor) and not arg.is_contiguous() and arg.stride(-1) != 1 else arg
        for arg in args
    ]
    return Block(*plain)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _norms(b: Block) -> tuple[Norm, Norm]:
    return Norm(b.ln_1_weight, b.ln_1_bias, b.eps), Norm(b.ln_2_weight, b.ln_2_bias, b.eps)


def forward(save: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    b = Block(*args)
    return run(save, b, _plan_of(b, save))


def run(save: bool, b: Block, p: Plan) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    """``forward`` by a plan."""
    b = _plain(b)
    x, (norm_1, norm_2) = _rows(b.x), _norms(b)

    def project(spare: Any) -> tuple[Tensor, Normed]:
        layer = Layer(norm_1, b.in_weight, b.in_bias)
        qkv, _, known = p.qkv.forward(save, x, Normed(None, b.mean, b.rstd), layer, spare)
        return qkv, known

    qkv, known_1, message_saved = _with_message(save, b, p, project)
    # the library adds its product to z in place where nobody wants z again; the bias is added when z is written
    in_place = not save and p.out.name == p.projection.name == "library" and b.drop_feed_forward is None
    in_place = in_place and b.x.dtype == b.projection_weight.dtype
    dtype, later = b.in_weight.dtype, b.projection_bias if in_place else None
    z, known_2, mixed, attention_saved = _diffuse(save, b, p, qkv, dtype, later)
    # y = z + FFN(LN_2(z))
    h, u, known_2 = p.fc.forward(save, z, known_2, Layer(norm_2, b.fc_weight, b.fc_bias, b.activation))
    # what reads the rows anyway has no use for them
    leave = b.statistics and b.rows is None and p.qkv.name != "library" and b.x.dtype == b.in_weight.dtype
    if in_place:
        y, left, leave = torch.addmm(z, h, b.projection_weight.T, out=z), Normed(), False
    else:
        target = Target(z, b.drop_feed_forward, norm_1 if leave else None, None, leave)
        y, left = p.projection.forward(h, b.projection_weight, b.projection_bias, target)
    y = y.view(b.x.shape if b.rows is None else z.shape)
    outputs: tuple[Any, ...] = (y, left.mean, left.rstd)
    if not leave:
        outputs = (y, *(torch.empty(0, dtype=torch.float32, device=x.device) for _ in range(2)))
    if not save:
        return outputs, ()
    statistics: Any = (known_1.mean, known_1.rstd, known_2.mean, known_2.rstd)
    return outputs, (qkv, mixed, z, u, *statistics, *message_saved, *attention_saved)


def _with_message(
    save: bool, b: Block, p: Plan, project: Callable[[Any], tuple[Tensor, Normed]]
) -> tuple[Tensor, Normed, tuple[Tensor, ...]]:
    """The packed projection (M, 3D) that ``project`` makes, with the messages' keys and values in the spare rows; what
    is known of LN_1; what backward wants. ``project`` takes the messages in place of the spare rows, or None."""
    if p.message is None:
        return *project(None), ()
    message, write, saved = p.message.forward(save, b)
    qkv, known = project(message)
    if known.rows is None:
        write(qkv.view(*b.x.shape[:2], -1)[:, -1, b.x.shape[2] :])
    return qkv, known, saved


def _diffuse(
    save: bool, b: Block, p: Plan, qkv: Tensor, dtype: torch.dtype | None, later: Tensor | None = None
) -> tuple[Tensor, Normed, Tensor, tuple[Tensor, ...]]:
    """z = x + IFA(LN_1([x, m])) (R, D) and what is known of LN_2(z), in ``dtype``; the attention and what it saves.

    Args:
        later: (D,), added to the z that is returned, not to the one that is normalized; for the library alone.
    """
    x = _rows(b.x)
    heads = qkv.view(*b.x.shape[:-1], 3, b.heads, -1)
    if b.bias is not None:
        mixed, saved = p.attention.forward(save, heads, b.bias)
    elif b.offsets is None:
        mixed, saved = p.attention.forward(save, heads, b.causal)
    else:
        mixed, saved = p.attention.forward(heads, b.offsets, b.longest), ()
    mixed_rows = mixed.reshape(x.shape)
    if b.rows is not None:
        mixed_rows, x = mixed_rows[b.rows], x[b.rows]
    norm = Norm(b.ln_2_weight, b.ln_2_bias, b.eps) if dtype else None
    target = Target(x, b.drop_attention, norm, dtype, save, later)
    z, known = p.out.forward(mixed_rows, b.out_weight, b.out_bias, target)
    return z, known, mixed, saved


def diffuse(b: Block, project: Callable[[], Tensor]) -> Tensor:
    """z = x + IFA(LN_1([x, m])) for a projection (F, S, 3D) that is computed elsewhere: for inference."""
    found = plan(case_of(b, False)) if not torch.compiler.is_compiling() else "traced"
    if isinstance(found, str):
        return reference.diffuse(b, project(), functools.partial(reference.own_linear, b))
    qkv, *_ = _with_message(False, b, found, lambda _: (project(), Normed()))
    return _diffuse(False, b, found, qkv, None)[0].view(b.x.shape)


def saved_like(*args: Any) -> tuple[Tensor, ...]:
    """Empty tensors of the kind that ``forward(True, ...)`` saves."""
    b = Block(*args)
    p, dtype, (rows, width) = _plan_of(b, True), b.in_weight.dtype, _rows(b.x).shape
    kept = rows if b.rows is None else b.rows.shape[0]

    def like(*shape: int, kind: torch.dtype = dtype) -> Tensor:
        return b.x.new_empty(shape, dtype=kind)

    qkv = like(rows, 3 * width)
    heads = qkv.view(*b.x.shape[:-1], 3, b.heads, -1)
    statistics = [like(count, kind=torch.float32) for count in (rows, rows, kept, kept)]
    message = p.message.saved(b) if p.message is not None and p.message.saved is not None else ()
    attention = p.attention.saved(heads) if p.attention.saved is not None else ()
    mixed = like(*b.x.shape[:-1], b.heads, width // b.heads)
    z, u = like(kept, width, kind=b.x.dtype), like(kept, b.fc_weight.shape[0])
    return (qkv, mixed, z, u, *statistics, *message, *attention)


def backward(
    grads: Sequence[Any], saved: Sequence[Tensor], needs: Sequence[torch.dtype | None], *args: Any
) -> list[Tensor]:
    b = _plain(args)
    p, x, dtype = _plan_of(b, True), _rows(b.x), b.in_weight.dtype
    assert p.attention.backward is not None
    qkv, mixed, z, u, mean_1, rstd_1, mean_2, rstd_2, *rest = saved
    message_saved, attention_saved = (rest[:SAVED], rest[SAVED:]) if b.frames else ([], rest)
    wanted = {name: dtype for name, dtype in zip(Block._fields, needs, strict=True) if dtype is not None}
    given: dict[str, Tensor | None] = {}
    mixed_rows = mixed.reshape(x.shape)
    mixed_rows = mixed_rows if b.rows is None else mixed_rows[b.rows]
    dy = _rows(grads[0])
    dy = dy if dy.stride(1) == 1 else dy.contiguous()

    # y = z + s (h W2^T + b2), h = act(u)
    dbranch, given["projection_bias"], _ = triton.column_sums.scaled(dy, dtype, b.drop_feed_forward)
    keep = "projection_weight" in wanted
    du, given["fc_bias"], h = slope(dbranch, b.projection_weight, u, b.activation, keep)
    if h is not None:
        given["projection_weight"] = product(dbranch.T, h, wanted["projection_weight"])
    del h
    # u = LN_2(z) W1^T + b1, and z passes it: dz, its copy for the branch below and that one's bias, in one pass
    below = triton.layer_norm.normalize_backward(
        torch.mm(du, b.fc_weight),
        z,
        mean_2,
        rstd_2,
        b.ln_2_weight,
        bias=b.ln_2_bias,
        normed_dtype=dtype if "fc_weight" in wanted else None,
        extra=dy,
        drop_scale=b.drop_attention,
        low_dtype=dtype,
    )
    dz, given["ln_2_weight"], given["ln_2_bias"], normed, dbranch, given["out_bias"] = below  # type: ignore[assignment]
    if normed is not None:
        given["fc_weight"] = product(du.T, normed, wanted["fc_weight"])
    del du, normed
    # z = x + s (mixed Wo^T + bo)
    if "out_weight" in wanted:
        given["out_weight"] = product(dbranch.T, mixed_rows, wanted["out_weight"])
    dmixed = torch.mm(dbranch, b.out_weight)
    if b.rows is not None:
        dmixed, dz = _spread(dmixed, b.rows, x), _spread(dz, b.rows, x)
    heads = qkv.view(*b.x.shape[:-1], 3, b.heads, -1)
    if b.bias is not None:
        dqkv, given["bias"] = p.attention.backward(dmixed.view(mixed.shape), heads, mixed, (), b.bias)
    elif b.offsets is None:
        dqkv = p.attention.backward(dmixed.view(mixed.shape), heads, mixed, tuple(attention_saved), b.causal)
    else:
        dqkv = p.attention.backward(dmixed.view(mixed.shape), heads, b.offsets, b.longest)
    dqkv = dqkv.reshape(qkv.shape)
    # qkv = LN_1([x, m]) W^T + b, and x passes it: the messages stood in the spare rows
    _, given["in_bias"], _ = triton.column_sums.scaled(dqkv, dtype)
    spare = triton.layer_norm.Spare(message_saved[2], *message_saved[3][2:]) if b.frames else None
    first = triton.layer_norm.normalize_backward(
        torch.mm(dqkv, b.in_weight),
        x,
        mean_1,
        rstd_1,
        b.ln_1_weight,
        bias=b.ln_1_bias,
        normed_dtype=dtype if "in_weight" in wanted else None,
        extra=dz,
        spare=spare,
    )
    given["x"] = dx = first.dx.view(b.x.shape)
    given["ln_1_weight"], given["ln_1_bias"] = first.dweight, first.dbias
    if first.normed is not None:
        given["in_weight"] = product(dqkv.T, first.normed, wanted["in_weight"])
    if p.message is not None and p.message.backward is not None:
        # the class rows began the messages; spare rows have no gradient
        dmessage = dx.new_empty(dx[:, -1].shape, dtype=dtype).copy_(dx[:, -1])
        dx[:, -1].zero_()
        message_grads, dclass = p.message.backward(dmessage, message_saved, wanted, b)
        given |= message_grads
        dx[:, 0].add_(dclass)
    gradients = ((given.get(name), dtype) for name, dtype in wanted.items())
    return [gradient.to(dtype) for gradient, dtype in gradients if gradient is not None]


def _spread(rows: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """Rows (R, D) at their places among M, zeros elsewhere."""
    return rows.new_zeros(like.shape).index_copy_(0, at, rows)

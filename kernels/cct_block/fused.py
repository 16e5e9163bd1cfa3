"""A block on a GPU as one forward and one backward: the parts that a plan names, and one pass where they leave a gap.

M rows of the residual stream, R rows that leave the block, D width, F frames of S rows.
"""

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import triton
from ..common.block import Block
from ..linear import product
from ..message_kv import SAVED
from .plans import Plan, plan_of
from .products import Layer, Norm, Normed, Target

_TENSORS = [name for name, annotation in Block.__annotations__.items() if annotation in (Tensor, Tensor | None)]
_tensors = operator.itemgetter(*(Block._fields.index(name) for name in _TENSORS))


def _plain(b: Block) -> Block:
    """The arguments with neighboring numbers side by side, as kernels read them; a copy of those that are not."""
    for arg in _tensors(b):
        if arg is not None and not arg.is_contiguous():
            break
    else:
        return b
    given = {name: getattr(b, name) for name in _TENSORS}
    apart = {name: arg for name, arg in given.items() if arg is not None and arg.stride(-1) != 1}
    return b._replace(**{name: arg.contiguous() for name, arg in apart.items()})


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _mixing(b: Block) -> tuple[Any, ...]:
    """What a candidate of the attention takes beside the projection."""
    if b.offsets is not None:
        return b.offsets, b.longest
    return (b.causal,) if b.bias is None else (b.causal, b.bias)


def forward(save: bool, *args: Any) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
    b = Block(*args)
    y, statistics, saved = run(save, b, plan_of(b, save))
    return (y, *(statistics or (torch.empty(0, dtype=torch.float32, device=y.device) for _ in range(2)))), saved


def run(save: bool, b: Block, p: Plan) -> tuple[Tensor, tuple[Tensor, Tensor] | None, tuple[Tensor, ...]]:
    """``forward`` by a plan: y, the statistics of its rows if they are left, and what backward wants."""
    b = _plain(b)
    x = _rows(b.x)
    norm_1, norm_2 = Norm(b.ln_1_weight, b.ln_1_bias, b.eps), Norm(b.ln_2_weight, b.ln_2_bias, b.eps)
    # the packed projection (M, 3D) of LN_1([x, m]), with the messages in the spare rows
    message, write, message_saved = (None, None, ()) if p.message is None else p.message.forward(save, b)
    known = Normed(None, b.mean, b.rstd)
    qkv, _, known_1 = p.qkv.forward(save, x, known, Layer(norm_1, b.in_weight, b.in_bias), message)
    if write is not None and known_1.rows is None:
        write(qkv.view(b.x.shape[0], -1)[:, -2 * b.x.shape[2] :])  # the spare row is a frame's last
    # the library adds its product to z in place where nobody wants z again; the bias is added when z is written
    in_place = not save and p.out.name == p.projection.name == "library" and b.drop_feed_forward is None
    in_place = in_place and b.x.dtype == b.projection_weight.dtype
    # z = x + IFA(LN_1([x, m])) (R, D), and what is known of LN_2(z)
    mixed, attention_saved = p.attention.forward(save, qkv.view(*b.x.shape[:-1], 3, b.heads, -1), *_mixing(b))
    mixed_rows = mixed.reshape_as(x)  # a shape as an argument would take torch several times as long
    if b.rows is not None:
        mixed_rows, x = mixed_rows[b.rows], x[b.rows]
    later = b.projection_bias if in_place else None
    target = Target(x, b.drop_attention, norm_2, b.in_weight.dtype, save, later)
    z, known_2 = p.out.forward(mixed_rows, b.out_weight, b.out_bias, target)
    # y = z + FFN(LN_2(z))
    h, u, known_2 = p.fc.forward(save, z, known_2, Layer(norm_2, b.fc_weight, b.fc_bias, b.activation))
    # what reads the rows anyway has no use for them
    leave = b.statistics and b.rows is None and p.qkv.name != "library" and b.x.dtype == b.in_weight.dtype
    if in_place:
        y, left = torch.addmm(z, h, b.projection_weight.T, out=z), Normed()
    else:
        target = Target(z, b.drop_feed_forward, norm_1 if leave else None, None, leave)
        y, left = p.projection.forward(h, b.projection_weight, b.projection_bias, target)
    y = y.view_as(b.x) if b.rows is None else y
    statistics = None if left.mean is None or left.rstd is None else (left.mean, left.rstd)
    if not save:
        return y, statistics, ()
    of_rows: Any = (known_1.mean, known_1.rstd, known_2.mean, known_2.rstd)
    return y, statistics, (qkv, mixed, z, u, *of_rows, *message_saved, *attention_saved)


def saved_like(*args: Any) -> tuple[Tensor, ...]:
    """Empty tensors of the kind that ``forward(True, ...)`` saves."""
    b = Block(*args)
    p, dtype, (rows, width) = plan_of(b, True), b.in_weight.dtype, _rows(b.x).shape
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
    b = Block(*args)
    behind = getattr(b.x.grad_fn, "chosen", None)  # the backend of the op whose output x is
    b = _plain(b)
    p, x, dtype = plan_of(b, True), _rows(b.x), b.in_weight.dtype
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
    handed = _handed(grads[0], dtype) if b.drop_feed_forward is None else None
    dbranch, given["projection_bias"], *_ = handed or triton.column_sums.scaled(dy, dtype, b.drop_feed_forward)
    del handed
    assert p.fc.backward is not None
    keep = "projection_weight" in wanted
    du, given["fc_bias"], h = p.fc.backward(dbranch, b.projection_weight, u, b.activation, keep)
    if keep:
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
    attention = dmixed.view(mixed.shape), heads, mixed, tuple(attention_saved), *_mixing(b)
    dqkv, sums, *dbias = p.attention.backward(*attention)
    dqkv, given["bias"] = dqkv.reshape(qkv.shape), dbias[0] if dbias else None
    # qkv = LN_1([x, m]) W^T + b, and x passes it
    if "in_bias" in wanted:
        given["in_bias"] = triton.column_sums.scaled(dqkv, dtype)[1] if sums is None else sums.sum(0)
    dnormed, spare = torch.mm(dqkv, b.in_weight), None
    if p.message is not None and p.message.backward is not None:
        # the messages stood in the spare rows, and began in the class rows
        spare = triton.rows.Spare(message_saved[2], *message_saved[3][2:])
        message_grads, dclass = p.message.backward(dnormed.view(b.x.shape)[:, -1], message_saved, wanted, b)
        given |= message_grads
        dz.view(b.x.shape)[:, 0].add_(dclass)
    # for the block before, which drops nothing if this one doesn't. What else may get the gradient first, as a
    # collective or a compiled graph, changes tensors without a version.
    hand_on = "x" in wanted and b.drop_feed_forward is None and getattr(behind, "backward", None) is backward
    first = triton.layer_norm.normalize_backward(
        dnormed,
        x,
        mean_1,
        rstd_1,
        b.ln_1_weight,
        bias=b.ln_1_bias,
        normed_dtype=dtype if "in_weight" in wanted else None,
        extra=dz,
        spare=spare,
        low_dtype=dtype if hand_on else None,
    )
    del dnormed, dz
    given["x"] = dx = first.dx.view(b.x.shape)
    if hand_on:
        dx._handed_on = (dx._version, _stream(dx)), first.low, first.sums  # type: ignore[attr-defined]
    given["ln_1_weight"], given["ln_1_bias"] = first.dweight, first.dbias
    if first.normed is not None:
        given["in_weight"] = product(dqkv.T, first.normed, wanted["in_weight"])
    found = [(each, kind) for name, kind in wanted.items() if (each := given.get(name)) is not None]
    gradients = [each if each.dtype == kind else torch.empty_like(each, dtype=kind) for each, kind in found]
    casts = [(to, each) for to, (each, _) in zip(gradients, found, strict=True) if to is not each]
    if casts:
        torch._foreach_copy_([to for to, _ in casts], [each for _, each in casts])  # one launch
    return gradients


def _handed(dy: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor] | None:
    """The copy of dy in ``dtype`` and the sums of its columns that the block behind made, if dy is still as it was, and
    read on the stream that it was written on."""
    found: Any = vars(dy).pop("_handed_on", None)  # the copy's memory is free once it is read
    return found[1:] if found and found[0] == (dy._version, _stream(dy)) and found[1].dtype == dtype else None


def _stream(x: Tensor) -> int:
    return torch._C._cuda_getCurrentRawStream(x.get_device()) if x.is_cuda else 0


def _spread(rows: Tensor, at: Tensor, like: Tensor) -> Tensor:
    """Rows (R, D) at their places among M, zeros elsewhere."""
    return rows.new_zeros(like.shape).index_copy_(0, at, rows)

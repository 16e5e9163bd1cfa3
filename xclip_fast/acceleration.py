"""Swap the blocks of somebody else's X-CLIP for ours, in place: parameters, names and hooks stay as they are.

B videos, T frames, F = B T, L tokens of a frame (class token first), D width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from . import kernels
from .nn.cct import Attention, DropScales, FastCCTBlock, Stream, cct_block, with_spare_row
from .nn.layers import drop_path_scale

logger = logging.getLogger("xclip_fast")

Model = TypeVar("Model", bound=nn.Module)


class _Parts(NamedTuple):
    """What the computation of a block needs, whichever names it has there."""

    message_fc: nn.Linear
    message_ln: nn.LayerNorm
    fusion: nn.Module
    ln_1: nn.LayerNorm
    diffusion: nn.Module
    ln_2: nn.LayerNorm
    fc: nn.Linear
    projection: nn.Linear
    drop_path: nn.Module | None
    frames: int
    heads: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Style:
    """A kind of block: where its parts are, how it is called, and when a call cannot be ours."""

    name: str
    paths: Mapping[str, str]
    batch_first: bool
    drops: Callable[[_Parts, Tensor], DropScales]
    refuse_call: Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], str | None]

    def parts(self, module: nn.Module) -> _Parts | None:
        """The parts of a block of this kind; None if ``module`` is no such block."""
        try:
            found = {field: operator.attrgetter(path)(module) for field, path in self.paths.items()}
        except AttributeError:
            return None
        return _Parts(**found, drop_path=getattr(module, "drop_path", None))


def accelerate(model: Model) -> Model:
    """Let ours compute the cross-frame communication blocks of a model, with outputs unchanged to 1e-4.

    Args:
        model: a ``transformers.XCLIPModel`` or ``XCLIPVisionModel``, or any module with blocks built like the released
            ``CrossFramelAttentionBlock``. Its parameters stay the same objects and its state dict keeps its keys, so
            optimizers, checkpoints, hidden states and gradient checkpointing go on working. Drop path of released
            blocks then drops whole videos, not token positions.

    Returns:
        the model itself. A second call finds nothing left to do.

    Raises:
        ValueError: if no block can be swapped. Single blocks that cannot are left as they are, with a logged reason;
            so is a call that asks for what ours does not compute (attention weights, a mask, dropout).
    """
    swapped, reasons = 0, []
    for name, module in model.named_modules():
        if isinstance(module, FastCCTBlock) or hasattr(type(module), "_accelerated_from"):
            swapped += 1
            continue
        for style in _STYLES:
            if (parts := style.parts(module)) is None:
                continue
            reason, returns_tuple = _refuse_block(module, parts), False
            if reason is None:
                reason, returns_tuple = _try_out(module, parts, style)
            if reason is None:
                original: Any = type(module)
                module.__class__ = _subclass(original, style, returns_tuple)
                swapped += 1
            else:
                reasons.append(f"{name or type(module).__name__}: {reason}")
    if swapped == 0:
        looked_for = "\n".join(f"  {style.name}: {', '.join(style.paths.values())}" for style in _STYLES)
        raise ValueError(
            f"{type(model).__name__} has no block that could be swapped. Looked for modules with the attributes of\n"
            + looked_for
            + "".join(f"\nRefused {reason}" for reason in reasons)
        )
    for reason in reasons:
        logger.warning("left as it is: %s", reason)
    return model


def _compute(module: nn.Module, parts: _Parts, style: _Style, x: Tensor) -> Tensor:
    x_FLD = x if style.batch_first else x.transpose(0, 1)
    if x_FLD.shape[0] % parts.frames:
        raise ValueError(f"{x_FLD.shape[0]} frames given, which are not whole videos of {parts.frames} frames")
    drop = style.drops(parts, x_FLD) if module.training else DropScales()
    stream = cct_block(
        Stream(with_spare_row(x_FLD)),
        parts.frames,
        parts.heads,
        parts.message_fc,
        parts.message_ln,
        _weights(parts.fusion),
        parts.ln_1,
        _weights(parts.diffusion),
        parts.ln_2,
        parts.fc,
        parts.projection,
        drop,
    )
    y_FLD = stream.x[:, :-1]
    return y_FLD if style.batch_first else y_FLD.transpose(0, 1)


@functools.cache
def _subclass(original: Any, style: _Style, returns_tuple: bool) -> type[nn.Module]:
    """``original`` with our forward. As a subclass it is still found by isinstance, and by name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = style.parts(self)
        reason = "its parts have changed" if parts is None else _refuse_parts(parts)
        reason = reason or style.refuse_call(self, args, kwargs)
        if parts is None or reason is not None:
            _log_fallback(original.__name__, str(reason))
            return original.forward(self, *args, **kwargs)
        y = _compute(self, parts, style, args[0] if args else kwargs["hidden_states"])
        return (y,) if returns_tuple else y

    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (original, style.name, returns_tuple), dict(self.__dict__)

    body = {"forward": forward, "__reduce_ex__": reduce, "_accelerated_from": original, "__doc__": original.__doc__}
    return type(original.__name__, (original,), body)


def _rebuild(original: Any, style_name: str, returns_tuple: bool) -> nn.Module:
    """An empty block for copy and pickle, which cannot find a class made at run time."""
    style = next(style for style in _STYLES if style.name == style_name)
    swapped = _subclass(original, style, returns_tuple)
    return swapped.__new__(swapped)


def _weights(attention: Any) -> Attention:
    """An attention's weights with q, k and v packed. Where they come apart they are packed at every call: a kept copy
    would go stale, since not every change of a weight (a fused optimizer's, say) leaves a trace."""
    out = attention.out_proj
    if isinstance(attention, nn.MultiheadAttention):
        assert attention.in_proj_weight is not None
        assert attention.in_proj_bias is not None
        return Attention(attention.in_proj_weight, attention.in_proj_bias, out)
    linears = (attention.q_proj, attention.k_proj, attention.v_proj)
    weight, bias = (torch.cat([getattr(linear, name) for linear in linears]) for name in ("weight", "bias"))
    return Attention(weight, bias, out)


def _refuse_parts(parts: _Parts) -> str | None:
    """Why the parts, as they are now, cannot be computed by ours; asked at every call, for they may be replaced."""
    linears: list[Any] = [parts.message_fc, parts.fc, parts.projection]
    for attention in (parts.fusion, parts.diffusion):
        if isinstance(attention, nn.MultiheadAttention):
            if attention.batch_first or attention.in_proj_weight is None or attention.in_proj_bias is None:
                return "its attention is batch_first, has no bias, or keys of another width"
            if attention.bias_k is not None or attention.add_zero_attn:
                return "its attention adds a key"
        else:
            linears += [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
    for linear in linears:
        if type(linear) is not nn.Linear or linear.bias is None:
            return f"a {type(linear).__name__} stands where a plain Linear with a bias is wanted"
    for part in (*linears, parts.message_ln, parts.ln_1, parts.ln_2):  # Hugging Face itself hooks the attentions
        if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks:
            return f"a hook on its {type(part).__name__} would not be called"
    return None


def _refuse_block(module: nn.Module, parts: _Parts) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced by another library"
    if not all(isinstance(norm, nn.LayerNorm) for norm in (parts.message_ln, parts.ln_1, parts.ln_2)):
        return "its norms are not LayerNorms"
    if len(epsilons := {parts.message_ln.eps, parts.ln_1.eps, parts.ln_2.eps}) > 1:
        return f"its norms have different epsilons, {', '.join(map(str, sorted(epsilons)))}"
    if getattr(module, "attn_mask", None) is not None:
        return "it has an attention mask"
    if not isinstance(parts.drop_path, nn.Identity | None) and not hasattr(parts.drop_path, "drop_prob"):
        return f"the drop probability of {type(parts.drop_path).__name__} is not known"
    points = torch.linspace(-3, 3, 13, device="cpu")
    for child in operator.attrgetter("mlp")(module).children():
        if not isinstance(child, nn.Linear) and not torch.allclose(
            child(points), kernels.quick_gelu(points), atol=1e-5
        ):
            return f"{type(child).__name__} in its mlp is not quick GELU"
    return _refuse_parts(parts)


def _try_out(module: nn.Module, parts: _Parts, style: _Style) -> tuple[str | None, bool]:
    """Why the block answers a small input otherwise than ours does (or None), and whether it answers with a tuple."""
    like = parts.message_fc.weight
    x = torch.randn(2 * parts.frames, 3, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    x = x if style.batch_first else x.transpose(0, 1)
    required = [p for p in inspect.signature(module.forward).parameters.values() if p.default is p.empty]
    masks = [None] * (sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required) - 1)
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            theirs = module.forward(x, *masks)
            ours = _compute(module, parts, style, x)
    except (RuntimeError, TypeError, ValueError) as error:
        return f"it failed on a small input: {error}", False
    finally:
        for child, training in modes.items():
            child.training = training
    returns_tuple = isinstance(theirs, tuple)
    theirs = theirs[0] if returns_tuple else theirs
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 3e-2
    if like.is_meta or not theirs.isfinite().all():
        return None, returns_tuple
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    return (None if off <= tolerance else f"it computes something else: off by {off:.1g} in a trial"), returns_tuple


def _huggingface_drops(parts: _Parts, x_FLD: Tensor) -> DropScales:
    """Hugging Face drops paths of CFA only; its own module draws, so that a seed gives what it gave before."""
    if parts.drop_path is None or isinstance(parts.drop_path, nn.Identity):
        return DropScales()
    return DropScales(fusion=parts.drop_path(x_FLD.new_ones(x_FLD.shape[0] // parts.frames)))


def _released_drops(parts: _Parts, x_FLD: Tensor) -> DropScales:
    """All three branches, per video: the released code draws per token position, which is not what the paper means."""
    probability = getattr(parts.drop_path, "drop_prob", None) or 0.0
    if probability == 0.0:
        return DropScales()
    return DropScales(*(drop_path_scale(x_FLD.shape[0] // parts.frames, probability, x_FLD) for _ in range(3)))


def _refuse_huggingface_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if module.training and (module.self_attn.dropout or module.message_attn.dropout):
        return "attention dropout while training"
    if kwargs.get("output_attentions") or getattr(module.self_attn.config, "output_attentions", False):
        return "attention weights are asked for"
    masks = [*args[1:], *(kwargs.get(name) for name in ("attention_mask", "causal_attention_mask", "is_causal"))]
    if any(mask is not None and mask is not False for mask in masks):
        return "an attention mask, or more, is given"
    return None


def _refuse_released_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> str | None:
    if module.training and (module.attn.dropout or module.message_attn.dropout):
        return "attention dropout while training"
    if len(args) != 1 or kwargs:
        return "more than the tokens is given"
    return None


@functools.cache
def _log_fallback(name: str, reason: str) -> None:
    logger.warning("%s computes as before, not accelerated: %s", name, reason)


_STYLES = (
    _Style(
        name="Hugging Face's XCLIPVisionEncoderLayer",
        paths={
            "message_fc": "message_fc",
            "message_ln": "message_ln",
            "fusion": "message_attn",
            "ln_1": "layer_norm1",
            "diffusion": "self_attn",
            "ln_2": "layer_norm2",
            "fc": "mlp.fc1",
            "projection": "mlp.fc2",
            "frames": "num_frames",
            "heads": "self_attn.num_heads",
        },
        batch_first=True,
        drops=_huggingface_drops,
        refuse_call=_refuse_huggingface_call,
    ),
    _Style(
        name="the released CrossFramelAttentionBlock",
        paths={
            "message_fc": "message_fc",
            "message_ln": "message_ln",
            "fusion": "message_attn",
            "ln_1": "ln_1",
            "diffusion": "attn",
            "ln_2": "ln_2",
            "fc": "mlp.c_fc",
            "projection": "mlp.c_proj",
            "frames": "T",
            "heads": "attn.num_heads",
        },
        batch_first=False,
        drops=_released_drops,
        refuse_call=_refuse_released_call,
    ),
)

"""Replaces the blocks of another library's X-CLIP or CLIP by ours, in place. Parameters, names and hooks stay.

B videos, T frames, F = B T, L tokens of a frame (class token first), D width.
"""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

from .. import kernels
from ..kernels.dispatch import log_once
from ..nn.cct import DropScales, FastCCTBlock, Stream, cct_block
from ..nn.layers import Attention, TransformerBlock, Weights, attention_weights, pair
from ..nn.parts import is_watched
from .checks import find_change_of, kinds_of, read_activation, types_of
from .styles import STYLES, Call, Parts, Style

logger = logging.getLogger("xclip_fast")

Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model) -> Model:
    """Computes the transformer blocks of a model with our kernels. Outputs are unchanged to 1e-4.

    Args:
        model: a ``transformers.XCLIPModel``, ``CLIPModel`` or ``SiglipModel``, one of their towers, OpenAI's CLIP or an
            open_clip model, or any module with such blocks or with the released ``CrossFramelAttentionBlock``. Its
            parameters stay the same objects and its state dict keeps its keys. So optimizers, checkpoints, hidden
            states and gradient checkpointing go on working. Drop path of released blocks then drops whole videos, not
            token positions.

    Returns:
        the model itself. A second call changes nothing.

    Every call checks the block. It runs its own forward, which is logged once, if a part has a hook,
    an adapter, or another norm, activation or epsilon; a ``torch.func`` transform is active; the call asks for
    attention weights, a mask that is not causal, or dropout.

    X-CLIP's encoder (Hugging Face's, or the released code's ``Sequential``) passes a residual stream with a spare row
    for the message from block to block. The row is added once. With a hook on a whole block, with gradient
    checkpointing, or if hidden states are asked for, each block takes and returns plain tokens and adds the row itself.

    Raises:
        ValueError: if no block can be swapped. A single block that cannot be swapped stays, and the reason is logged.
    """
    swapped, reasons = 0, []
    for name, module in model.named_modules():
        if isinstance(module, FastCCTBlock | TransformerBlock) or hasattr(type(module), "_accelerated_from"):
            swapped += 1
            continue
        known = next(((style, parts) for style in STYLES if (parts := style.parts(module)) is not None), None)
        if known is None:
            continue
        style, parts = known
        _, reason = read_activation(module, parts, style)
        trials: dict[bool, _Trial] = {}
        kinds = kinds_of(types_of(module, parts), None)
        if reason is None and find_change_of(module, parts, style, kinds) is None:
            trials[False] = trial = _try_out(module, parts, style)
            reason = trial.reason
            call = style.read_call(module, (None,), {"is_causal": True}) if style.has_flag else None
            if isinstance(call, Call) and call.flag:
                trials[True] = _try_out(module, parts, style, flag=True)
        if reason is None:
            original: Any = type(module)
            module.__class__ = _subclass(original, style)
            module.__dict__["_trials"] = trials
            swapped += 1
        else:
            reasons.append(f"{name or type(module).__name__}: {reason}")
    if swapped == 0:
        looked_for = "\n".join(f"  {style.name}: {', '.join(style.paths.values())}" for style in STYLES)
        raise ValueError(
            f"{type(model).__name__} has no block that could be swapped. Looked for modules with the attributes of\n"
            + looked_for
            + "".join(f"\nRefused {reason}" for reason in reasons)
        )
    for reason in reasons:
        logger.warning("left as it is: %s", reason)
    for module in model.modules():
        _swap_tower(module)
    return model


class _Trial(NamedTuple):
    """The result of a block's trial on a small input, and the types of modules for which it holds."""

    types: tuple[type, ...]
    activation: str
    returns_tuple: bool = False
    reason: str | None = None  # why the block keeps its own forward


def _compute(module: nn.Module, parts: Parts, style: Style, activation: str, x: Any, causal: bool = False) -> Any:
    """Our forward: tokens in the block's layout to tokens, or a Stream to a Stream."""
    if not style.has_message:
        batch_first = style.is_batch_first(module)
        x_FLD = x if batch_first else x.transpose(0, 1)
        drop = style.drops(parts, x_FLD) if module.training else DropScales()
        y_FLD = _infer_apart(parts, activation, x_FLD, causal) if drop == DropScales() else None
        if y_FLD is None:
            y_FLD = kernels.cct_block(
                kernels.Block(
                    x_FLD,
                    *_block_weights(parts),
                    parts.heads,
                    parts.ln_1.eps,
                    activation,
                    drop_attention=drop.diffusion,
                    drop_feed_forward=drop.feed_forward,
                    causal=causal,
                )
            )[0]
        return y_FLD if batch_first else y_FLD.transpose(0, 1)
    stream = x if isinstance(x, Stream) else style.stream(x)
    frames = stream.x.shape[0]
    if frames % parts.frames:
        raise ValueError(f"{frames} frames given, which are not whole videos of {parts.frames} frames")
    drop = style.drops(parts, stream.x) if module.training else DropScales()
    message = (*pair(parts.message_fc), *pair(parts.message_ln), *_weights(parts.message_attention))
    numbers = parts.heads, parts.ln_1.eps, activation
    stream = cct_block(stream, parts.frames, _block_weights(parts), *numbers, message, drop)
    return stream if isinstance(x, Stream) else style.tokens(stream)


def _infer_apart(parts: Parts, activation: str, x_FLD: Tensor, causal: bool) -> Tensor | None:
    """A block without a message, for inference on a CPU, with separate weights of q, k and v. None for other calls.

    Three products take less time than packing the weights, which is 5 % of a block for one image.
    """
    attention = parts.attention
    if hasattr(attention, "in_proj_weight"):
        return None
    linears = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, parts.fc, parts.projection)
    query, key, value, out, fc, projection = ((each.weight, each.bias) for each in linears)
    ln_1, ln_2 = ((norm.weight, norm.bias) for norm in (parts.ln_1, parts.ln_2))
    if not kernels.cpu.takes(x_FLD, *ln_1, *ln_2, *query, *key, *value, *out, *fc, *projection):
        return None
    linear = kernels.cpu.linear
    normed = F.layer_norm(x_FLD, x_FLD.shape[-1:], *ln_1, parts.ln_1.eps)
    q, k, v = (linear(normed, *each).unflatten(-1, (parts.heads, -1)).transpose(1, 2) for each in (query, key, value))
    mixed = F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)
    return kernels.cpu.feed_forward(x_FLD + linear(mixed, *out), ln_2, fc, projection, parts.ln_2.eps, activation)


@functools.cache
def _subclass(original: Any, style: Style) -> type[nn.Module]:
    """A subclass of ``original`` with our forward and the same name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = style.parts(self)
        x: Any = args[0] if args else kwargs.get("hidden_states")
        plan = "its parts have changed" if parts is None else _read_call(self, parts, style, args, kwargs)
        if parts is None or isinstance(plan, str):
            if not torch.compiler.is_compiling():
                log_once(f"{original.__name__} computes as before, not accelerated: {plan}")
            if not isinstance(x, Stream):
                return original.forward(self, *args, **kwargs)
            y = original.forward(self, style.tokens(x), *args[1:], **kwargs)
            return (style.stream(y[0]), *y[1:]) if isinstance(y, tuple) else style.stream(y)
        call, trial = plan
        y = _compute(self, parts, style, trial.activation, x, call.causal)
        return (y,) if trial.returns_tuple else y

    return _derived(original, style, _subclass, forward, _block_style=style)


@functools.cache
def _tower_subclass(original: Any, style: Style) -> type[nn.Module]:
    """A subclass of a tower. Its blocks pass the stream on with its spare row and its statistics."""

    def forward(self: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        x = kwargs.pop("inputs_embeds", None) if x is None else x
        blocks = list(_blocks(self))
        if not _shares_stream(self, blocks, style, kwargs):
            return original.forward(self, x, *args, **kwargs)
        # the tower passes its input from block to block
        result = original.forward(self, style.stream(x), *args, **kwargs)
        if isinstance(result, Stream):
            return style.tokens(result)
        result.last_hidden_state = style.tokens(result.last_hidden_state)
        return result

    return _derived(original, style, _tower_subclass, forward)


def _derived(original: Any, style: Style, made_by: Any, forward: Callable[..., Any], **more: Any) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (made_by, original, style.name), dict(self.__dict__)

    body = {"forward": forward, "__reduce_ex__": reduce, "_accelerated_from": original, "__doc__": original.__doc__}
    return type(original.__name__, (original,), {**body, **more})


def _rebuild(made_by: Any, original: Any, style_name: str) -> nn.Module:
    """An empty module for copy and pickle, which cannot find a class that was made at run time."""
    swapped = made_by(original, next(style for style in STYLES if style.name == style_name))
    return swapped.__new__(swapped)


def _blocks(tower: nn.Module) -> Iterable[nn.Module]:
    layers = getattr(tower, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else tower.children()


def _swap_tower(tower: nn.Module) -> None:
    """Lets the blocks of a tower share one stream, if all of them were swapped."""
    kind: Any = type(tower)
    name = f"{kind.__module__}.{kind.__qualname__}"
    style = next((style for style in STYLES if style.tower == name), None)
    if style is not None and _are_swapped(list(_blocks(tower)), style):
        tower.__class__ = _tower_subclass(kind, style)


def _are_swapped(blocks: Sequence[nn.Module], style: Style) -> bool:
    return len(blocks) > 0 and all(getattr(type(block), "_block_style", None) is style for block in blocks)


def _shares_stream(tower: Any, blocks: Sequence[nn.Module], style: Style, kwargs: Mapping[str, Any]) -> bool:
    """Whether only these blocks see the tokens between them in this call."""
    config = getattr(tower, "config", None)
    asked = [
        given.get(f"output_{name}")
        for name in ("hidden_states", "attentions")
        for given in (kwargs, getattr(config, "__dict__", {}))
    ]
    if any(asked) or kwargs.get("return_dict") is False:
        return False
    saves = tower.training and any(getattr(each, "gradient_checkpointing", False) for each in (tower, *blocks))
    return not saves and not any(is_watched(block) for block in blocks) and _are_swapped(blocks, style)


def _read_call(
    module: nn.Module, parts: Parts, style: Style, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[Call, _Trial] | str:
    """The call and the block's trial, or the reason why the block runs its own forward."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func transforms or forward-mode differentiation are on"
    call = style.read_call(module, args, kwargs)
    if isinstance(call, str):
        return call
    trials: dict[bool, _Trial] = module.__dict__["_trials"]
    trial = trials.get(call.flag)
    types, activation = (types_of(module, parts), None) if trial is None else trial[:2]
    if reason := find_change_of(module, parts, style, kinds_of(types, activation)):
        return reason
    if trial is None:  # the first call of this kind; or an adapter or a hook was there until now
        if torch.compiler.is_compiling():
            return "it was not tried out before torch.compile"
        trial = trials[call.flag] = _try_out(module, parts, style, call.flag)
    return (call, trial) if trial.reason is None else trial.reason


def _block_weights(parts: Parts) -> Weights:
    layers = (*pair(parts.ln_2), *pair(parts.fc), *pair(parts.projection))
    return (*pair(parts.ln_1), *_weights(parts.attention), *layers)


def _weights(attention: Any) -> Attention:
    """An attention's weights with q, k and v packed, then those of its output layer.

    Separate weights are packed at every call. A kept copy would go stale: a fused optimizer, for example, changes a
    weight without raising its version.
    """
    if "in_proj_weight" in attention._parameters:
        return attention_weights(attention)
    modules = attention._modules
    projections = [pair(modules[name]) for name in ("q_proj", "k_proj", "v_proj")]
    weight, bias = (torch.cat(each) for each in zip(*projections, strict=True))
    return (weight, bias, *pair(modules["out_proj"]))


def _try_out(module: nn.Module, parts: Parts, style: Style, flag: bool = False) -> _Trial:
    """Compares the block's own forward with ours on a small input. ``flag``: with is_causal=True."""
    types = types_of(module, parts)
    activation, refused = read_activation(module, parts, style)
    if refused:
        return _Trial(types, activation, reason=refused)
    forward = getattr(type(module), "_accelerated_from", type(module)).forward
    like = parts.ln_1.weight
    mask = getattr(module, "attn_mask", None)  # OpenAI's, which fits one length only
    tokens = 3 if mask is None else mask.shape[-1]
    x = torch.randn(2 * parts.frames, tokens, like.shape[0], generator=torch.Generator().manual_seed(0))
    x = x.to(parts.fc.weight)
    x = x if style.is_batch_first(module) else x.transpose(0, 1)
    required = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty][1:]
    masks = [None] * (sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required) - 1)
    flags = {"is_causal": True} if flag else {}
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            theirs = forward(module, x, *masks, **flags)
            ours = _compute(module, parts, style, activation, x, flag or mask is not None)
    except (RuntimeError, TypeError, ValueError) as error:
        return _Trial(types, activation, reason=f"it failed on a small input: {error}")
    finally:
        for child, training in modes.items():
            child.training = training
    returns_tuple = isinstance(theirs, tuple)
    theirs = theirs[0] if returns_tuple else theirs
    tolerance = 1e-4 if x.dtype in (torch.float32, torch.float64) else 3e-2
    if like.is_meta or not theirs.isfinite().all():
        return _Trial(types, activation, returns_tuple)
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    reason = None if off <= tolerance else f"it computes something else: off by {off:.1g} in a trial"
    return _Trial(types, activation, returns_tuple, reason)

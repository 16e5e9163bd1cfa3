"""Swap the blocks of somebody else's X-CLIP for ours, in place: parameters, names and hooks stay as they are.

B videos, T frames, F = B T, L tokens of a frame (class token first), D width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from . import kernels
from .nn.cct import Attention, DropScales, FastCCTBlock, Stream, cct_block
from .nn.layers import drop_path_scale
from .nn.parts import PLAIN, Kinds, find_change, is_watched

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
    tower: str  # the class that calls such blocks one after another and does nothing else, as module.name

    def stream(self, x: Tensor) -> Stream:
        """Tokens as such blocks take them."""
        return Stream(x if self.batch_first else x.transpose(0, 1))

    def tokens(self, stream: Stream) -> Tensor:
        """Tokens as such blocks return them."""
        return stream.tokens() if self.batch_first else stream.tokens().transpose(0, 1)

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

    Every call looks at the block as it is then. With a hook on a part, an adapter, another norm, activation or epsilon,
    under ``torch.func`` transforms, or when the call asks for what ours does not compute (attention weights, a mask,
    dropout), the block computes by its own forward, which is logged once.

    The encoder (Hugging Face's, or the released code's ``Sequential``) hands the blocks a residual stream with a spare
    row for the message, which is added once. With a hook on a whole block, with gradient checkpointing, or when hidden
    states are asked for, every block takes and returns plain tokens, and adds the row itself.

    Raises:
        ValueError: if no block can be swapped. Single blocks that cannot are left as they are, with a logged reason.
    """
    swapped, reasons = 0, []
    for name, module in model.named_modules():
        if isinstance(module, FastCCTBlock) or hasattr(type(module), "_accelerated_from"):
            swapped += 1
            continue
        for style in _STYLES:
            if (parts := style.parts(module)) is None:
                continue
            reason = _refuse_block(module, parts)
            trial: _Trial | None = None
            if reason is None and _find_change(module, parts, _kinds(_types(module, parts))) is None:
                trial = _try_out(module, parts, style)
                reason = trial.reason
            if reason is None:
                original: Any = type(module)
                module.__class__ = _subclass(original, style)
                module.__dict__["_trial"] = trial
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
    for module in model.modules():
        _swap_tower(module)
    return model


class _Trial(NamedTuple):
    """What a block showed on a small input, and for which modules that holds."""

    types: tuple[type, ...]
    returns_tuple: bool = False
    reason: str | None = None  # why it is not ours


def _types(module: nn.Module, parts: _Parts) -> tuple[type, ...]:
    """The modules of a block that hold no weights themselves, beside torch's own."""
    mlp = operator.attrgetter("mlp")(module)
    others = [parts.fusion, parts.diffusion, mlp, *(each for each in mlp.children() if not list(each.parameters()))]
    return tuple({type(each): None for each in (*others, parts.drop_path) if each is not None})


@functools.cache
def _kinds(types: tuple[type, ...]) -> Kinds:
    found: dict[Any, Any] = {kind: kind.forward for kind in types if issubclass(kind, nn.Module)}
    return {**found, **PLAIN["quick_gelu"]}


def _find_change(module: nn.Module, parts: _Parts, kinds: Kinds) -> str | None:
    """Why the block's parameters do not say all that it computes, or None; see ``nn.parts.find_change``."""
    if reason := find_change(module._modules, kinds, parts.heads, getattr(parts.ln_1, "eps", None)):
        return reason
    for attention in (parts.fusion, parts.diffusion):
        if isinstance(attention, nn.MultiheadAttention):
            continue
        linears = [getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        if any(type(linear) is not nn.Linear or linear.bias is None for linear in linears):
            return "an attention has other projections than four linear layers with a bias"
        if getattr(attention, "num_heads", parts.heads) != parts.heads:
            return f"an attention has not {parts.heads} heads"
    return None


def _compute(module: nn.Module, parts: _Parts, style: _Style, stream: Stream) -> Stream:
    frames = stream.x.shape[0]
    if frames % parts.frames:
        raise ValueError(f"{frames} frames given, which are not whole videos of {parts.frames} frames")
    drop = style.drops(parts, stream.x) if module.training else DropScales()
    return cct_block(
        stream,
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


@functools.cache
def _subclass(original: Any, style: _Style) -> type[nn.Module]:
    """``original`` with our forward. As a subclass it is still found by isinstance, and by name."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        parts = style.parts(self)
        x: Any = args[0] if args else kwargs.get("hidden_states")
        reason = "its parts have changed" if parts is None else _refuse_call(self, parts, style, args, kwargs)
        if parts is None or reason is not None:
            if not torch.compiler.is_compiling():
                _log_fallback(original.__name__, str(reason))
            if not isinstance(x, Stream):
                return original.forward(self, *args, **kwargs)
            y = original.forward(self, style.tokens(x), *args[1:], **kwargs)
            return (style.stream(y[0]), *y[1:]) if isinstance(y, tuple) else style.stream(y)
        stream = x if isinstance(x, Stream) else style.stream(x)
        stream = _compute(self, parts, style, stream)
        y = stream if isinstance(x, Stream) else style.tokens(stream)
        return (y,) if self.__dict__["_trial"].returns_tuple else y

    return _derived(original, style, _subclass, forward, _block_style=style)


@functools.cache
def _tower_subclass(original: Any, style: _Style) -> type[nn.Module]:
    """``original`` whose blocks hand the stream on with its spare row and its statistics."""

    def forward(self: nn.Module, x: Any = None, *args: Any, **kwargs: Any) -> Any:
        x = kwargs.pop("inputs_embeds", None) if x is None else x
        blocks = list(_blocks(self))
        if not _shares_stream(self, blocks, style, kwargs):
            return original.forward(self, x, *args, **kwargs)
        # it passes what it is given from block to block
        result = original.forward(self, style.stream(x), *args, **kwargs)
        if isinstance(result, Stream):
            return style.tokens(result)
        result.last_hidden_state = style.tokens(result.last_hidden_state)
        return result

    return _derived(original, style, _tower_subclass, forward)


def _derived(original: Any, style: _Style, made_by: Any, forward: Callable[..., Any], **more: Any) -> type[nn.Module]:
    def reduce(self: nn.Module, protocol: object) -> tuple[Any, ...]:
        return _rebuild, (original, style.name, made_by.__name__), dict(self.__dict__)

    body = {"forward": forward, "__reduce_ex__": reduce, "_accelerated_from": original, "__doc__": original.__doc__}
    return type(original.__name__, (original,), {**body, **more})


def _rebuild(original: Any, style_name: str, made_by: str) -> nn.Module:
    """An empty module for copy and pickle, which cannot find a class made at run time."""
    style = next(style for style in _STYLES if style.name == style_name)
    swapped = {maker.__name__: maker for maker in (_subclass, _tower_subclass)}[made_by](original, style)
    return swapped.__new__(swapped)


def _blocks(tower: nn.Module) -> Iterable[nn.Module]:
    layers = getattr(tower, "layers", None)
    return layers if isinstance(layers, nn.ModuleList) else tower.children()


def _swap_tower(tower: nn.Module) -> None:
    """Lets the blocks of a tower share one stream, if it is a tower of blocks that were swapped."""
    kind: Any = type(tower)
    name = f"{kind.__module__}.{kind.__qualname__}"
    style = next((style for style in _STYLES if style.tower == name), None)
    if style is not None and _are_swapped(list(_blocks(tower)), style):
        tower.__class__ = _tower_subclass(kind, style)


def _are_swapped(blocks: Sequence[nn.Module], style: _Style) -> bool:
    return len(blocks) > 0 and all(getattr(type(block), "_block_style", None) is style for block in blocks)


def _shares_stream(tower: Any, blocks: Sequence[nn.Module], style: _Style, kwargs: Mapping[str, Any]) -> bool:
    """Whether nothing but these blocks sees their tokens in this call."""
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


def _refuse_call(
    module: nn.Module, parts: _Parts, style: _Style, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> str | None:
    """Why this call is not for ours, or None."""
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return "torch.func transforms or forward-mode differentiation are on"
    if getattr(module, "attn_mask", None) is not None:
        return "it has an attention mask"
    trial: _Trial | None = module.__dict__["_trial"]
    types = _types(module, parts) if trial is None else trial.types
    if reason := style.refuse_call(module, args, kwargs) or _find_change(module, parts, _kinds(types)):
        return reason
    if trial is None:  # an adapter or a hook was there until now
        if torch.compiler.is_compiling():
            return "it was not tried out before torch.compile"
        reason = _refuse_block(module, parts)
        trial = _Trial(types, reason=reason) if reason else _try_out(module, parts, style)
        module.__dict__["_trial"] = trial
    return trial.reason


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


def _refuse_block(module: nn.Module, parts: _Parts) -> str | None:
    if "forward" in module.__dict__:
        return "its forward was replaced by another library"
    if getattr(module, "attn_mask", None) is not None:
        return "it has an attention mask"
    if not isinstance(parts.drop_path, nn.Identity | None) and not hasattr(parts.drop_path, "drop_prob"):
        return f"the drop probability of {type(parts.drop_path).__name__} is not known"
    points = torch.linspace(-3, 3, 13, device="cpu")
    for child in operator.attrgetter("mlp")(module).children():
        if child in (parts.fc, parts.projection) or list(child.parameters()):
            continue
        with torch.no_grad():
            if not torch.allclose(child(points), kernels.quick_gelu(points), atol=1e-5):
                return f"{type(child).__name__} in its mlp is not quick GELU"
    return None


def _try_out(module: nn.Module, parts: _Parts, style: _Style) -> _Trial:
    """Computes a small input by the block's own forward and by ours."""
    types = _types(module, parts)
    forward = getattr(type(module), "_accelerated_from", type(module)).forward
    like = parts.message_fc.weight
    x = torch.randn(2 * parts.frames, 3, like.shape[1], generator=torch.Generator().manual_seed(0)).to(like)
    x = x if style.batch_first else x.transpose(0, 1)
    required = [p for p in inspect.signature(forward).parameters.values() if p.default is p.empty][1:]
    masks = [None] * (sum(p.kind is p.POSITIONAL_OR_KEYWORD for p in required) - 1)
    modes = {child: child.training for child in module.modules()}
    try:
        module.eval()
        with torch.no_grad():
            theirs = forward(module, x, *masks)
            ours = style.tokens(_compute(module, parts, style, style.stream(x)))
    except (RuntimeError, TypeError, ValueError) as error:
        return _Trial(types, reason=f"it failed on a small input: {error}")
    finally:
        for child, training in modes.items():
            child.training = training
    returns_tuple = isinstance(theirs, tuple)
    theirs = theirs[0] if returns_tuple else theirs
    tolerance = 1e-4 if like.dtype in (torch.float32, torch.float64) else 3e-2
    if like.is_meta or not theirs.isfinite().all():
        return _Trial(types, returns_tuple)
    off = ((ours - theirs).abs().max() / theirs.abs().max()).item()
    reason = None if off <= tolerance else f"it computes something else: off by {off:.1g} in a trial"
    return _Trial(types, returns_tuple, reason)


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
    implementation = getattr(module.self_attn.config, "_attn_implementation", None)
    if implementation == "eager" and torch.is_grad_enabled():
        return "eager attention is asked for, whose gradients have gradients (set_attn_implementation('sdpa'))"
    if implementation not in _ATTENTIONS or _is_replaced(implementation):
        return f"the attention implementation {implementation!r} may compute something else"
    if any(attention.scale != attention.head_dim**-0.5 for attention in (module.self_attn, module.message_attn)):
        return "an attention has another scale"
    if kwargs.get("output_attentions") or getattr(module.self_attn.config, "output_attentions", False):
        return "attention weights are asked for"
    masks = [*args[1:], *(kwargs.get(name) for name in ("attention_mask", "causal_attention_mask", "is_causal"))]
    if any(mask is not None and mask is not False for mask in masks):
        return "an attention mask, or more, is given"
    return None


_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")


def _is_replaced(implementation: str | None) -> bool:
    """Whether somebody registered another function under the name of one of transformers' own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as REGISTERED

    function = REGISTERED.get(implementation, None) if implementation not in (None, "eager") else None
    return function is not None and not function.__module__.startswith("transformers.")


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
        tower="transformers.models.x_clip.modeling_x_clip.XCLIPVisionEncoder",
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
        tower="torch.nn.modules.container.Sequential",
    ),
)

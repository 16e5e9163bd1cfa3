"""The blocks of other libraries that ``accelerate`` replaces: where their parts are, and which calls we compute.

B videos, T frames, F = B T, L tokens of a frame (class token first), D width.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import operator
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..nn.cct import DropScales, Stream
from ..nn.layers import drop_path_scales


class Parts(NamedTuple):
    """The modules of a block under our names."""

    ln_1: nn.LayerNorm
    attention: Any
    ln_2: nn.LayerNorm
    fc: nn.Linear
    projection: nn.Linear
    heads: int
    drop_path: nn.Module | None
    # of a cross-frame communication block
    message_fc: nn.Linear | None = None
    message_ln: nn.LayerNorm | None = None
    message_attention: Any = None
    frames: int = 1

    @property
    def attentions(self) -> tuple[Any, ...]:
        return tuple(each for each in (self.message_attention, self.attention) if each is not None)


class Call(NamedTuple):
    """The options of a call."""

    causal: bool = False
    flag: bool = False  # the call is causal by is_causal=True, not by a mask


@dataclasses.dataclass(frozen=True, eq=False)
class Style:
    """A kind of block: where its parts are, how it is called, and which calls keep its own forward."""

    name: str
    paths: Mapping[str, str]
    batch_first: bool | None  # None: as the attention of the block is
    drops: Callable[[Parts, Tensor], DropScales]
    read_call: Callable[[Any, tuple[Any, ...], dict[str, Any]], Call | str]  # str: why its own forward runs
    has_flag: bool = False  # is_causal=True may be given
    tower: str = ""  # the class, as module.name, that only calls such blocks one after another

    def parts(self, module: nn.Module) -> Parts | None:
        """The parts of a block of this kind; None for any other module."""
        try:
            found = operator.attrgetter(*self.paths.values())(module)
        except AttributeError:
            return None
        return Parts(**dict(zip(self.paths, found, strict=True)), drop_path=getattr(module, "drop_path", None))

    @property
    def has_message(self) -> bool:
        return "message_fc" in self.paths

    def is_batch_first(self, module: Any) -> bool:
        """Whether this block takes (F, L, D). Blocks with open_clip's own attention class do."""
        if self.batch_first is not None:
            return self.batch_first
        return module.attn.batch_first if isinstance(module.attn, nn.MultiheadAttention) else True

    def stream(self, x: Tensor) -> Stream:
        """Tokens as blocks with a message take them."""
        return Stream(x if self.batch_first else x.transpose(0, 1))

    def tokens(self, stream: Stream) -> Tensor:
        """Tokens as blocks with a message return them."""
        return stream.tokens() if self.batch_first else stream.tokens().transpose(0, 1)


# --- Hugging Face

_ATTENTIONS = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
_MASKS = ("attention_mask", "causal_attention_mask")


def _huggingface_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    modules = module._modules
    attentions = [modules[name] for name in ("self_attn", "message_attn") if name in modules]
    config = getattr(attentions[0], "config", None)
    if module.training and any(getattr(attention, "dropout", 0.0) for attention in attentions):
        return "attention dropout while training"
    implementation = getattr(config, "_attn_implementation", None)
    if implementation == "eager" and torch.is_grad_enabled():
        return "eager attention is asked for, because its gradients have gradients (set_attn_implementation('sdpa'))"
    if implementation not in _ATTENTIONS or _is_replaced(implementation):
        return f"the attention implementation {implementation!r} may compute something else"
    if any(attention.scale != attention.head_dim**-0.5 for attention in attentions):
        return "an attention has another scale"
    if any(getattr(attention, "is_causal", False) for attention in attentions):
        return "an attention is causal by itself"
    if kwargs.get("output_attentions") or getattr(config, "output_attentions", False):
        return "attention weights are asked for"
    given = [*args[1:], *(kwargs.get(name) for name in _MASKS)]
    given += [value for name, value in kwargs.items() if isinstance(value, Tensor) and name not in _TENSORS]
    masks = [each for each in given if each is not None and each is not False]
    flag = bool(kwargs.get("is_causal"))
    if len(attentions) > 1:
        return "an attention mask, or more, is given" if masks or flag else Call()
    if masks:
        if len(masks) > 1 or not isinstance(masks[0], Tensor):
            return "more than the tokens and an attention mask is given"
        length = (args[0] if args else kwargs["hidden_states"]).shape[1]
        if _is_causal(masks[0], length):
            return Call(causal=True)
        return "a mask of padding is given; text features are the same, and faster, without attention_mask"
    return Call(causal=True, flag=True) if flag and implementation not in (None, "eager") else Call()


_TENSORS = ("hidden_states", *_MASKS)


def _is_replaced(implementation: str | None) -> bool:
    """Whether another function is registered under the name of one of transformers' own."""
    from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS as REGISTERED

    function = REGISTERED.get(implementation, None) if implementation not in (None, "eager") else None
    return function is not None and not function.__module__.startswith("transformers.")


def _huggingface_drops(parts: Parts, x_FLD: Tensor) -> DropScales:
    """Hugging Face drops paths of CFA only. Its own module draws, so that a seed gives the same numbers as before."""
    if parts.drop_path is None or isinstance(parts.drop_path, nn.Identity):
        return DropScales()
    return DropScales(fusion=parts.drop_path(x_FLD.new_ones(x_FLD.shape[0] // parts.frames)))


# --- OpenAI's names: the released X-CLIP, CLIP, open_clip


def _released_drops(parts: Parts, x_FLD: Tensor) -> DropScales:
    """Drops all branches per video. The released code draws per token position, unlike the paper."""
    probability = getattr(parts.drop_path, "drop_prob", None) or 0.0
    return DropScales(*drop_path_scales(3, x_FLD.shape[0] // parts.frames, probability, x_FLD))


def _released_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    if getattr(module, "attn_mask", None) is not None:
        return "it has an attention mask"
    if module.training and (module.attn.dropout or module.message_attn.dropout):
        return "attention dropout while training"
    if len(args) != 1 or kwargs:
        return "more than the tokens is given"
    return Call()


def _openai_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | str:
    """The mask is an attribute of the block (OpenAI), or an argument (open_clip)."""
    x, *others = args if args else (None,)
    kind: Any = type(module)
    given = dict(zip(_argument_names(kind)[1:], others, strict=False)) | kwargs
    masks = [mask for mask in (given.pop("attn_mask", None), getattr(module, "attn_mask", None)) if mask is not None]
    if x is None or any(value is not None for value in given.values()) or len(masks) > 1:
        return "more than the tokens and an attention mask is given"
    if x.dim() != 3:
        return f"tokens of {x.dim()} dimensions are given"
    if not masks:
        return Call()
    if not isinstance(masks[0], Tensor) or masks[0].dtype == torch.bool:
        return "an attention mask that is not added to the scores is given"
    length = x.shape[1] if _OPENAI_STYLE.is_batch_first(module) else x.shape[0]
    return Call(causal=True) if _is_causal(masks[0], length) else "an attention mask that is not causal is given"


@functools.cache
def _argument_names(kind: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(getattr(kind, "_accelerated_from", kind).forward).parameters)[1:]


_causal_masks: dict[tuple[Any, ...], tuple[Any, bool]] = {}


def _is_causal(mask: Tensor, length: int) -> bool:
    """Whether a mask (..., length, length) hides exactly the later tokens. It is additive, or boolean (True: keep).

    The values of a mask are read once, because reading waits for a GPU. If they cannot be read now, returns False.
    """
    if mask.shape[-2:] != (length, length) or torch.compiler.is_compiling() or mask.is_meta:
        return False
    version = None if mask.is_inference() else mask._version
    key = (mask.data_ptr(), mask.shape, mask.stride(), mask.dtype, version)
    if version is not None and key in _causal_masks:
        return _causal_masks[key][1]
    if mask.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    seen = torch.ones(length, length, dtype=torch.bool, device=mask.device).tril()
    if mask.dtype == torch.bool:
        causal = bool((mask == seen).all())
    else:
        hidden = mask <= torch.finfo(mask.dtype).min
        causal = bool((hidden == ~seen).all() & (mask.masked_fill(hidden, 0) == 0).all())
    if version is not None:
        if len(_causal_masks) >= 4:
            _causal_masks.clear()
        _causal_masks[key] = mask.untyped_storage(), causal  # kept, so that no other mask gets its address
    return causal


_HUGGINGFACE = {
    "ln_1": "layer_norm1",
    "attention": "self_attn",
    "ln_2": "layer_norm2",
    "fc": "mlp.fc1",
    "projection": "mlp.fc2",
    "heads": "self_attn.num_heads",
}
_OPENAI = {
    "ln_1": "ln_1",
    "attention": "attn",
    "ln_2": "ln_2",
    "fc": "mlp.c_fc",
    "projection": "mlp.c_proj",
    "heads": "attn.num_heads",
}
_MESSAGE = {"message_fc": "message_fc", "message_ln": "message_ln", "message_attention": "message_attn"}

_OPENAI_STYLE = Style(
    name="the ResidualAttentionBlock of OpenAI's CLIP and open_clip",
    paths=_OPENAI,
    batch_first=None,
    drops=_released_drops,
    read_call=_openai_call,
)
# a block is of the first style that has all its parts
STYLES = (
    Style(
        name="Hugging Face's XCLIPVisionEncoderLayer",
        paths={**_MESSAGE, **_HUGGINGFACE, "frames": "num_frames"},
        batch_first=True,
        drops=_huggingface_drops,
        read_call=_huggingface_call,
        tower="transformers.models.x_clip.modeling_x_clip.XCLIPVisionEncoder",
    ),
    Style(
        name="the released CrossFramelAttentionBlock",
        paths={**_MESSAGE, **_OPENAI, "frames": "T"},
        batch_first=False,
        drops=_released_drops,
        read_call=_released_call,
        tower="torch.nn.modules.container.Sequential",
    ),
    Style(
        name="the encoder layers of Hugging Face's CLIP, SigLIP and X-CLIP",
        paths=_HUGGINGFACE,
        batch_first=True,
        drops=_huggingface_drops,
        read_call=_huggingface_call,
        has_flag=True,
    ),
    _OPENAI_STYLE,
)

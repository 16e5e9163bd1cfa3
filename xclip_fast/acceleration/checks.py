"""Whether the parameters of another library's block define all that it computes, and which activation it has."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..nn.parts import LINEARS, PLAIN, Kinds, find_change
from .styles import Parts, Style


def types_of(module: Any, parts: Parts) -> tuple[type, ...]:
    """The types of a block's modules without weights, and of its attentions and norms, except torch's own."""
    norms = (parts.message_ln, parts.ln_1, parts.ln_2)
    known = {*parts.attentions, module.mlp, *(norm for norm in norms if isinstance(norm, nn.LayerNorm))}
    for each in module.modules():
        if each is not module and not hasattr(each, "weight") and not list(each.parameters()):
            known.add(each)
    return tuple(sorted({type(each) for each in known}, key=lambda kind: (kind.__module__, kind.__qualname__)))


@functools.cache
def kinds_of(types: tuple[type, ...], activation: str | None) -> Kinds:
    """The modules that may be in a block whose trial had these types. Before the trial, of any activation."""
    found: dict[Any, Any] = {kind: kind.forward for kind in types if issubclass(kind, nn.Module)}
    for plain in PLAIN if activation is None else (activation,):
        found |= PLAIN[plain]
    return found


def find_change_of(module: nn.Module, parts: Parts, style: Style, kinds: Kinds) -> str | None:
    """Why the block's parameters do not define all that it computes, or None; see ``nn.parts.find_change``."""
    if module._parameters:
        return "it has parameters of its own"
    eps = getattr(parts.ln_1, "eps", None)
    if reason := find_change(module._modules, kinds, parts.heads, eps, style.is_batch_first(module)):
        return reason
    if reason := _find_another_part(module, parts):
        return reason
    for attention in parts.attentions:
        if isinstance(attention, nn.MultiheadAttention):
            continue
        if getattr(attention, "num_heads", parts.heads) != parts.heads:
            return f"an attention does not have {parts.heads} heads"
        if "in_proj_weight" in attention._parameters:
            if reason := _find_change_in_open_clip(attention):
                return reason
            continue
        linears = [attention._modules.get(name) for name in ("q_proj", "k_proj", "v_proj", "out_proj")]
        if any(type(linear) is not nn.Linear or linear._parameters.get("bias") is None for linear in linears):
            return "an attention has other projections than four linear layers with a bias"
    return None


def _find_another_part(module: nn.Module, parts: Parts) -> str | None:
    """Why a block has more than its known parts, or None. Plain modules in other places count, too."""
    for layer in (parts.message_fc, parts.fc, parts.projection, *(each.out_proj for each in parts.attentions)):
        if layer is not None and type(layer) not in LINEARS:
            return f"a linear layer is a {type(layer).__name__}"
    known = {each for each in parts if isinstance(each, nn.Module)}
    for name, child in module._modules.items():
        if name == "mlp" or child is None:
            continue
        if child not in known and type(child) is not nn.Identity:
            return f"it has another part {name}"
    for name, child in module._modules["mlp"]._modules.items():  # type: ignore[union-attr]
        if child not in known and child is not None and (child._parameters or child._modules):
            return f"its mlp has another part {name}"
    return None


def _find_change_in_open_clip(attention: Any) -> str | None:
    """``find_change_of`` for open_clip's own attention class, which can have norms and scales."""
    if any(attention._parameters.get(name) is None for name in ("in_proj_weight", "in_proj_bias")):
        return "an attention has keys of another width, or no bias"
    if any(getattr(attention, name, None) is not None for name in ("logit_scale", "head_scale")):
        return "an attention scales its heads"
    if any(type(getattr(attention, name, None)) is not nn.Identity for name in ("ln_q", "ln_k", "ln_inner")):
        return "an attention has norms inside"
    return None if attention.scale == attention.head_dim**-0.5 else "an attention has another scale"


_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": kernels.quick_gelu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
}


def read_activation(module: Any, parts: Parts, style: Style) -> tuple[str, str | None]:
    """The activation of a block's FFN, and the reason why the block cannot be replaced, or None."""
    if "forward" in module.__dict__:
        return "", "its forward was replaced by another library"
    if style.has_message and getattr(module, "attn_mask", None) is not None:
        return "", "it has an attention mask"
    if not isinstance(parts.drop_path, nn.Identity | None) and not hasattr(parts.drop_path, "drop_prob"):
        return "", f"the drop probability of {type(parts.drop_path).__name__} is unknown"
    points = torch.linspace(-3, 3, 13, device="cpu")
    found = "quick_gelu"
    for child in module.mlp.children():
        if child in (parts.fc, parts.projection) or list(child.parameters()) or isinstance(child, nn.Dropout):
            continue
        with torch.no_grad():
            values = child(points)
            names = [name for name, act in _ACTIVATIONS.items() if torch.allclose(values, act(points), atol=1e-5)]
        if not names:
            return "", f"{type(child).__name__} in its mlp is neither quick GELU nor GELU"
        found = names[0]
    return found, None

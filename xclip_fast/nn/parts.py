"""The modules inside blocks, and whether a block may compute from their parameters alone.

A block is fast because it reads the parameters of its modules instead of calling them. That is right only for the plain
modules below, without hooks. Other modules (an adapter, a quantized layer, a parametrization) have to be called.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from .. import kernels
from ..config import ACTIVATIONS
from ..kernels.dispatch import log_once
from ..kernels.linear import linear


class QuickGELU(nn.Module):
    """x sigmoid(1.702 x), CLIP's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return kernels.quick_gelu(x)


class Mlp(nn.Sequential):
    """An FFN: a linear layer, the activation, a linear layer.

    Args:
        width: D. activation: "quick_gelu" or "gelu". names: of the three modules; the released ones of a block.
    """

    c_fc: nn.Linear
    c_proj: nn.Linear

    def __init__(
        self, width: int, activation: str = "quick_gelu", names: tuple[str, str, str] = ("c_fc", "gelu", "c_proj")
    ) -> None:
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation is {activation!r}; one of {', '.join(ACTIVATIONS)} wanted")
        layers = nn.Linear(width, 4 * width), QuickGELU() if activation == "quick_gelu" else nn.GELU()
        super().__init__(OrderedDict(zip(names, (*layers, nn.Linear(4 * width, width)), strict=True)))


class CrossAttention(nn.Module):
    """The attention of one prompt layer, under its released names."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj = nn.Linear(width, width, bias=False)
        self.k_proj = nn.Linear(width, width, bias=False)
        self.v_proj = nn.Linear(width, width, bias=False)
        self.proj = nn.Linear(width, width)

    def forward(self, text: Tensor, patches_BNE: Tensor) -> Tensor:
        """Queries from text (K, E) or (B, K, E), keys and values from patches (B, N, E): (B, K, E)."""
        mixed_BKE = self.attend(self.q_proj(text), self.k_proj(patches_BNE), self.v_proj(patches_BNE))
        result: Tensor = self.proj(mixed_BKE)
        return result

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Attention of every head: query (..., K, E), key and value (B, N, E) to (B, K, E)."""
        query, key, value = (x.unflatten(-1, (self.heads, -1)).transpose(-3, -2) for x in (query, key, value))
        query = query.expand(key.shape[0], -1, -1, -1)
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(-2)


Kinds = dict[type, Callable[..., Any]]

LINEARS = (nn.Linear, NonDynamicallyQuantizableLinear)
_SHARED = (*LINEARS, nn.LayerNorm, nn.MultiheadAttention, nn.Conv2d)
_OURS = (Mlp, CrossAttention)
# By the activation of a block: the modules that it may replace, and their own forward.
PLAIN: dict[str, Kinds] = {
    activation: {kind: kind.forward for kind in (*_SHARED, *_OURS, *modules)}
    for activation, modules in (("quick_gelu", (QuickGELU,)), ("gelu", (nn.GELU,)), ("gelu_tanh", ()))
}
_WITHOUT_BIAS = ("q_proj", "k_proj", "v_proj", "reduction")
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_CAPTURES = "transformers.utils.output_capturing"  # its hooks do nothing unless attention weights are asked for
_UNWRAPS = "torch.distributed."
_TENSORS = (nn.Parameter, Tensor, type(None))


def is_plain(
    parts: Mapping[str, nn.Module | None],
    *,
    heads: int | None = None,
    eps: float | None = None,
    activation: str = "quick_gelu",
) -> bool:
    """Whether a block may compute from the parameters of its modules. If not, the reason is logged once.

    Takes a few microseconds.

    Args:
        parts: the modules by name, such as the ``_modules`` of a block. Modules inside them are checked, too.
        heads: of every attention. eps: of every LayerNorm. None: any.
        activation: of the FFN.
    """
    reason = find_change(parts, PLAIN[activation], heads, eps)
    if reason is not None and not torch.compiler.is_compiling():
        log_once(f"{reason}: such blocks call their modules one by one, which is slower")
    return reason is None


def is_plain_block(block: Any) -> bool:
    """Whether the block computes from the parameters of its parts; see ``is_plain``."""
    modules = block._modules  # block.ln_1 takes several times as long
    return is_plain(modules, heads=block.heads, eps=modules["ln_1"].eps, activation=block.activation)


def is_watched(block: nn.Module) -> bool:
    """Whether a hook, or a replaced ``forward``, sees the inputs or outputs of a whole block.

    Such a block takes and returns plain tensors. Hooks of torch.distributed (FSDP) find tensors inside any object, so
    they do not count.
    """
    state = block.__dict__
    hooks = _hooks(state)
    return "forward" in state or any(not getattr(hook, "__module__", "").startswith(_UNWRAPS) for hook in hooks)


def find_change(
    parts: Mapping[str, nn.Module | None],
    kinds: Kinds,
    heads: int | None = None,
    eps: float | None = None,
    batch_first: bool = False,
) -> str | None:
    """Why the parameters of ``parts`` do not define all that their modules compute, or None. See ``is_plain``.

    Args:
        kinds: the allowed types of modules (not subclasses), and their own ``forward``.
        batch_first: the layout of every ``nn.MultiheadAttention``.
    """
    for name, part in parts.items():
        if part is None:
            continue
        kind, state = type(part), part.__dict__
        if kinds.get(kind) is not kind.forward:
            return f"{name} is a {kind.__module__}.{kind.__qualname__}"
        if "forward" in state:
            return f"the forward of {name} was replaced"
        pre_hooks = state["_forward_pre_hooks"] or state["_backward_pre_hooks"]
        hooked = pre_hooks or state["_forward_hooks"] or state["_backward_hooks"]
        if hooked and any(getattr(hook, "__module__", "") != _CAPTURES for hook in _hooks(state)):
            return f"{name} has a hook"
        parameters = state["_parameters"]
        for tensor in parameters.values():
            if type(tensor) not in _TENSORS:
                return f"{name} has a parameter of type {type(tensor).__name__}"
        if kind in LINEARS:
            if parameters.get("weight") is None:
                return f"{name} has a weight that is no parameter"
            if parameters.get("bias") is None and name not in _WITHOUT_BIAS:
                return f"{name} has no bias"
        elif kind is nn.MultiheadAttention:
            if reason := _find_attention_change(state, heads, batch_first):
                return f"{name} {reason}"
        elif issubclass(kind, nn.LayerNorm):
            if parameters.get("weight") is None or parameters.get("bias") is None or len(parameters) != 2:
                return f"{name} has no weight, no bias or more than these"
            if eps is not None and state["eps"] != eps:
                return f"{name} has the epsilon {state['eps']} instead of {eps}"
        elif kind is nn.Conv2d:
            if parameters["bias"] is not None:
                return f"{name} has a bias"
        elif kind is nn.Dropout and state["p"] and state["training"]:
            return f"{name} drops values"
        elif kind is nn.GELU and state["approximate"] != "none":
            return f"{name} is approximate"
        if (inner := state["_modules"]) and (reason := find_change(inner, kinds, heads, eps, batch_first)):
            return f"{name}.{reason}"
    return None


def _hooks(state: dict[str, Any]) -> list[Any]:
    """The hooks of a module, from its ``__dict__``."""
    return [hook for kind in _HOOKS for hook in state[kind].values()]


def _find_attention_change(state: dict[str, Any], heads: int | None, batch_first: bool) -> str | None:
    parameters = state["_parameters"]
    if parameters.get("in_proj_weight") is None or parameters.get("in_proj_bias") is None:
        return "has keys of another width, or no bias"
    if parameters.get("bias_k") is not None or state["add_zero_attn"]:
        return "adds a key"
    if state["batch_first"] != batch_first:
        return f"has batch_first={state['batch_first']}"
    if heads is not None and state["num_heads"] != heads:
        return f"has {state['num_heads']} heads instead of {heads}"
    return "drops attention weights" if state["dropout"] and state["training"] else None


def layer_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """``norm(x)``, by our kernel if it is a plain LayerNorm."""
    if isinstance(norm, nn.LayerNorm) and is_plain({"LayerNorm": norm}):
        return kernels.layer_norm(x, norm.weight, norm.bias, norm.eps)
    result: Tensor = norm(x)
    return result


def apply_linear(name: str, layer: nn.Linear, x: Tensor) -> Tensor:
    """``layer(x)``, by our product if the layer of this name is plain."""
    if is_plain({name: layer}):
        return linear(x, layer.weight, layer.bias)
    result: Tensor = layer(x)
    return result


def self_attention(attention: Any, x_SBD: Tensor, mask: Tensor | None = None) -> Tensor:
    """Calls an attention module on B sequences, (S, B, D) -> (S, B, D).

    torch's attention only reads the weight of its ``out_proj``. If ``out_proj`` is an adapter, it is called here.
    torch's attention is not called in an export: its views hold for one memory layout of what it mixes, and an exporter
    may compute another.

    Args:
        mask: (S, S) or (B, H, S, S), added to the attention weights before their softmax.
    """
    mask = None if mask is None else mask.to(x_SBD.dtype)
    inner = find_change(attention._modules, PLAIN["quick_gelu"])
    whole = find_change({"attn": attention}, PLAIN["quick_gelu"])
    exported = torch.compiler.is_exporting() and type(attention) is nn.MultiheadAttention and not is_watched(attention)
    if exported or (inner is not None and whole == f"attn.{inner}"):  # all but the output layer is plain
        qkv = F.linear(x_SBD, attention.in_proj_weight, attention.in_proj_bias)
        query, key, value = qkv.unflatten(-1, (3, attention.num_heads, -1)).permute(2, 1, 3, 0, 4).unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, mask)
        if exported:
            mixed = mixed.clone(memory_format=torch.contiguous_format)
        result: Tensor = attention.out_proj(mixed.permute(2, 0, 1, 3).flatten(-2))
        return result
    x = x_SBD.transpose(0, 1) if getattr(attention, "batch_first", False) else x_SBD
    if mask is not None and mask.dim() == 4:
        mask = mask.flatten(0, 1)
    y: Tensor = attention(x, x, x, need_weights=False, attn_mask=mask)[0]
    return y if x is x_SBD else y.transpose(0, 1)


def add_branch(x: Tensor, branch: Tensor, drop_scale_B: Tensor | None, dim: int = 0) -> Tensor:
    """x + branch in x's dtype. Drop path scales the branch of each of the B samples along ``dim``."""
    if drop_scale_B is not None:
        shape = [1] * branch.dim()
        shape[dim] = branch.shape[dim]
        branch = branch * drop_scale_B.repeat_interleave(branch.shape[dim] // len(drop_scale_B)).view(shape)
    return (x + branch).to(x.dtype)

"""What the towers share: the parameters of a block under their released names, and the plain pre-norm block."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import kernels

logger = logging.getLogger("xclip_fast")


class Mlp(nn.Module):
    """The two linear layers of an FFN; the block computes with them."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.c_fc = nn.Linear(width, 4 * width)
        self.c_proj = nn.Linear(4 * width, width)


class TransformerBlock(nn.Module):
    """A pre-norm transformer block of CLIP: x + attention(LN(x)), then x + FFN(LN(x)).

    State dict: ``attn.in_proj_*``, ``attn.out_proj.*``, ``ln_1.*``, ``mlp.c_fc.*``, ``mlp.c_proj.*``, ``ln_2.*``.

    Args:
        width: D. heads: H. eps: of the LayerNorms.
        drop_path: probability that a sample skips a residual branch in training.
        activation: of the FFN, "quick_gelu" or "gelu".
    """

    def __init__(
        self, width: int, heads: int, eps: float, *, drop_path: float = 0.0, activation: str = "quick_gelu"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.drop_path = drop_path
        self.activation = activation
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width)
        self.ln_2 = nn.LayerNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        offsets: Tensor | None = None,
        longest: int = 0,
        rows: Tensor | None = None,
        samples: int | None = None,
    ) -> Tensor:
        """A block, or what is read of its output.

        Args:
            x: (F, S, D), or (M, D) with ``offsets``.
            causal: no row of a sequence sees a later one.
            offsets: (K + 1,) integer: x holds K causal sequences of unequal length, one after another; sequence k owns
                rows offsets[k] to offsets[k + 1] - 1. longest: rows of the longest.
            rows: (R,) integer: only these of all rows are taken past the attention, and returned (R, D). None: all.
            samples: the number of samples in x's first dimension, for drop path; None: each of its rows is one.
        """
        drop: tuple[Tensor | None, Tensor | None] = (None, None)
        if self.training and self.drop_path > 0.0:
            count = x.shape[0] if samples is None else samples
            drop = (drop_path_scale(count, self.drop_path, x), drop_path_scale(count, self.drop_path, x))
        linears = {"out": self.attn.out_proj, "fc": self.mlp.c_fc, "projection": self.mlp.c_proj}
        return compute(
            linears,
            x=x,
            ln_1_weight=self.ln_1.weight,
            ln_1_bias=self.ln_1.bias,
            in_weight=self.attn.in_proj_weight,
            in_bias=self.attn.in_proj_bias,
            ln_2_weight=self.ln_2.weight,
            ln_2_bias=self.ln_2.bias,
            heads=self.heads,
            eps=self.ln_1.eps,
            activation=self.activation,
            drop_attention=drop[0],
            drop_feed_forward=drop[1],
            causal=causal,
            offsets=offsets,
            longest=longest,
            rows=rows,
        )[0]


def compute(linears: Mapping[str, Any], **given: Any) -> tuple[Tensor, kernels.Statistics | None]:
    """``kernels.cct_block`` on a block's linear layers and its other arguments.

    A layer that was replaced (LoRA, quantized) is called as it is, and the block runs out of torch's parts.

    Args:
        linears: the modules by their names in ``kernels.Block``.
        given: the rest of ``kernels.Block``.
    """
    weights = {f"{name}_weight": getattr(module, "weight", None) for name, module in linears.items()}
    biases = {f"{name}_bias": getattr(module, "bias", None) for name, module in linears.items()}
    block = kernels.Block(**weights, **biases, **given)
    replaced = {name: module for name, module in linears.items() if not is_plain(module)}
    if not replaced:
        return kernels.cct_block(block)
    if not torch.compiler.is_compiling():
        _log_replaced(", ".join(sorted({type(module).__name__ for module in replaced.values()})))

    def apply(name: str, x: Tensor) -> Tensor:
        result: Tensor = replaced[name](x) if name in replaced else kernels.own_linear(block, name, x)
        return result

    return kernels.composed(block, apply), None


def is_plain(module: object) -> bool:
    """Whether a module computes what torch's Linear does with a weight and a bias."""
    return isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward and module.bias is not None


@functools.cache
def _log_replaced(kinds: str) -> None:
    logger.warning("%s in place of torch's Linear: these blocks run out of torch's parts, not as one op", kinds)


def run_block(block: nn.Module, recompute: bool, x: Any, *args: Any) -> Any:
    """``block(x, *args)``; with ``recompute`` only x is kept for backward, which runs the block again.

    Random numbers (drop path) and the backend are those of the first run.
    """
    if not recompute or not torch.is_grad_enabled():
        return block(x, *args)
    from torch.utils.checkpoint import checkpoint  # it imports triton

    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
    if not torch.compiler.is_compiling():  # traced, a block is one graph and its backend settled
        forced = kernels.forced_backend()
        options["context_fn"] = lambda: (contextlib.nullcontext(), kernels.backend(forced))
    return checkpoint(lambda tokens: block(tokens, *args), x, **options)


def init_block(block: Any, width: int, layers: int) -> None:
    """CLIP's initialisation of a block's ``attn`` and ``mlp``: residual branches shrink with depth."""
    residual_std = (2 * layers * width) ** -0.5
    nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)


def init_linear(module: nn.Module) -> None:
    """The initialisation of new, not inherited, parts: truncated normal of 0.02, biases 0."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            nn.init.trunc_normal_(child.weight, std=0.02)
            if child.bias is not None:
                nn.init.zeros_(child.bias)
        elif isinstance(child, nn.MultiheadAttention):
            nn.init.trunc_normal_(child.in_proj_weight, std=0.02)
            nn.init.zeros_(child.in_proj_bias)


def drop_path_scale(batch: int, probability: float, like: Tensor) -> Tensor:
    """One drop path factor per sample, (B,): 0 with ``probability``, else 1 / (1 - probability)."""
    keep = 1.0 - probability
    return torch.empty(batch, dtype=torch.float32, device=like.device).bernoulli_(keep).div_(keep)


class WithoutInit(TorchFunctionMode):
    """While it is active, ``torch.nn.init`` leaves tensors as they are: for parameters that a checkpoint will replace.

    On the meta device initialisation computes nothing, but it imports torch's compiler, which takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))

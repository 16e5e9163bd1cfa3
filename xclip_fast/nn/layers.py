"""The plain pre-norm block of the towers, and how parameters are initialized."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import kernels
from .parts import Mlp, add_branch, is_plain_block, self_attention

Pair = tuple[Tensor, Tensor]  # weight and bias
Attention = tuple[*Pair, *Pair]  # the packed projection (3D, D), (3D,), and the output layer
Weights = tuple[*Pair, *Attention, *Pair, *Pair, *Pair]  # as ``kernels.Block`` has them, from ``ln_1_weight`` on


# The modules are plain (parts.py), so their parameters are read where torch keeps them: ``module.weight`` takes
# several times as long.


def pair(module: Any) -> Pair:
    """The weight and bias of a layer."""
    parameters = module._parameters
    return parameters["weight"], parameters["bias"]


def attention_weights(attention: Any) -> Attention:
    """The weights of an ``nn.MultiheadAttention``."""
    parameters = attention._parameters
    return parameters["in_proj_weight"], parameters["in_proj_bias"], *pair(attention._modules["out_proj"])


def block_weights(modules: Mapping[str, Any]) -> Weights:
    """The weights of the modules of a block under their released names."""
    attention, mlp = attention_weights(modules["attn"]), modules["mlp"]._modules
    return *pair(modules["ln_1"]), *attention, *pair(modules["ln_2"]), *pair(mlp["c_fc"]), *pair(mlp["c_proj"])


class TransformerBlock(nn.Module):
    """A pre-norm transformer block of CLIP: x + attention(LN(x)), then x + FFN(LN(x)).

    State dict: ``attn.in_proj_*``, ``attn.out_proj.*``, ``ln_1.*``, ``mlp.c_fc.*``, ``mlp.c_proj.*``, ``ln_2.*``.

    Args:
        width: D. heads: H. eps: of the LayerNorms.
        drop_path: probability that a sample skips a residual branch in training.
        activation: of the FFN, "quick_gelu" or "gelu".
    """

    is_plain = is_plain_block

    def __init__(
        self, width: int, heads: int, eps: float, *, drop_path: float = 0.0, activation: str = "quick_gelu"
    ) -> None:
        super().__init__()
        self.heads = heads
        self.drop_path = drop_path
        self.activation = activation
        self.attn = nn.MultiheadAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width, eps)
        self.mlp = Mlp(width, activation)
        self.ln_2 = nn.LayerNorm(width, eps)

    def forward(
        self,
        x: Tensor,
        causal: bool = False,
        offsets: Tensor | None = None,
        longest: int = 0,
        rows: Tensor | None = None,
        samples: int | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The block, or some rows of its output.

        Args:
            x: (F, S, D), or (M, D) with ``offsets``.
            causal: no row of a sequence sees a later row.
            offsets: (K + 1,) integer: x holds K causal sequences of unequal length, one after another. Sequence k has
                rows offsets[k] to offsets[k + 1] - 1. longest: rows of the longest sequence.
            rows: (R,) integer: only these rows are computed after the attention, and returned as (R, D). None: all.
            samples: the number of samples in x's first dimension, for drop path (default: the dimension's size).
            bias: (W, H, S, S), added to the scores. Sequence f takes the bias of window f mod W.
        """
        if not self.is_plain():
            y = self._call_modules(x, causal, samples, bias)
            return y if rows is None else y.flatten(0, 1)[rows]
        drop = self._draw_drop_scales(x, samples)
        modules: Mapping[str, Any] = self._modules
        b = kernels.Block(
            x,
            *block_weights(modules),
            self.heads,
            modules["ln_1"].eps,
            self.activation,
            drop_attention=drop[0],
            drop_feed_forward=drop[1],
            causal=causal,
            offsets=offsets,
            longest=longest,
            bias=bias,
            rows=rows,
        )
        return kernels.cct_block(b)[0]

    def _call_modules(self, x_BSD: Tensor, causal: bool, samples: int | None, bias: Tensor | None) -> Tensor:
        """The block by calling its modules, on tokens in the released layout (S, B, D)."""
        drop = self._draw_drop_scales(x_BSD, samples)
        x_SBD, mask = x_BSD.transpose(0, 1), None
        if causal:
            length = x_BSD.shape[1]
            mask = torch.full((length, length), float("-inf"), device=x_BSD.device).triu(1)
        elif bias is not None:
            mask = bias.repeat(x_BSD.shape[0] // len(bias), 1, 1, 1)
        x_SBD = add_branch(x_SBD, self_attention(self.attn, self.ln_1(x_SBD), mask), drop[0], dim=1)
        return add_branch(x_SBD, self.mlp(self.ln_2(x_SBD)), drop[1], dim=1).transpose(0, 1)

    def _draw_drop_scales(self, x: Tensor, samples: int | None) -> tuple[Tensor | None, ...]:
        probability = self.drop_path if self.training else 0.0
        return drop_path_scales(2, x.shape[0] if samples is None else samples, probability, x)


def run_block(block: nn.Module, recompute: bool, x: Any, *args: Any) -> Any:
    """``block(x, *args)``. With ``recompute`` only x is stored for backward, which runs the block again.

    The second run has the random numbers (drop path) and the backend of the first.
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
    """CLIP's initialization of a block's ``attn`` and ``mlp``: residual branches shrink with depth."""
    residual_std = (2 * layers * width) ** -0.5
    nn.init.normal_(block.attn.in_proj_weight, std=width**-0.5)
    nn.init.normal_(block.attn.out_proj.weight, std=residual_std)
    nn.init.normal_(block.mlp.c_fc.weight, std=(2 * width) ** -0.5)
    nn.init.normal_(block.mlp.c_proj.weight, std=residual_std)


def init_linear(module: nn.Module) -> None:
    """The initialization of new, not inherited, parts: truncated normal of 0.02, biases 0."""
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


def drop_path_scales(branches: int, samples: int, probability: float, like: Tensor) -> tuple[Tensor | None, ...]:
    """Fresh factors (samples,) for each residual branch. None: nothing is dropped."""
    if probability == 0.0:
        return (None,) * branches
    return tuple(drop_path_scale(samples, probability, like) for _ in range(branches))


class WithoutInit(TorchFunctionMode):
    """While it is active, ``torch.nn.init`` does nothing: for parameters that a checkpoint will replace.

    On the meta device initialization computes nothing, but it imports torch's compiler, which takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))

"""The plain pre-norm block of the towers, and how parameters are initialized."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import kernels
from .parts import Mlp, add_branch, is_plain, self_attention


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
        self.mlp = Mlp(width, activation)
        self.ln_2 = nn.LayerNorm(width, eps)

    def forward(
        self, x: Tensor, attention: Callable[[Tensor], Tensor], rows: Any = None, samples: int | None = None
    ) -> Tensor:
        """A block, or what is read of its output.

        Args:
            x: (..., D).
            attention: maps the packed projection (..., 3, H, D / H) to (..., H, D / H).
            rows: an index into x; only these rows are taken past the attention and returned. None: all.
            samples: the number of samples in x's first dimension, for drop path; None: each of its rows is one.
        """
        norm = self.ln_1
        if not self.is_plain():
            y = self._call_modules(x, attention is not attend, samples)
            return y if rows is None else y[rows]
        qkv = kernels.ln_linear(x, norm.weight, norm.bias, self.attn.in_proj_weight, self.attn.in_proj_bias, norm.eps)
        mixed = attention(qkv.unflatten(-1, (3, self.heads, -1))).flatten(-2)
        if rows is not None:
            x, mixed = x[rows], mixed[rows]
        drop = self._draw_drop_scales(x, samples)
        out = self.attn.out_proj
        x = kernels.linear_residual(mixed, out.weight, out.bias, x, drop[0])
        return feed_forward(x, self.ln_2, self.mlp.c_fc, self.mlp.c_proj, drop[1], self.activation)

    def is_plain(self) -> bool:
        """Whether the block computes from the parameters of its parts; see ``parts.is_plain``."""
        return is_plain(self._modules, heads=self.heads, eps=self.ln_1.eps, activation=self.activation)

    def _call_modules(self, x_BSD: Tensor, causal: bool, samples: int | None) -> Tensor:
        """The block by calling its parts, which see tokens in the released layout (S, B, D)."""
        drop = self._draw_drop_scales(x_BSD, samples)
        x_SBD, mask_SS = x_BSD.transpose(0, 1), None
        if causal:
            length = x_BSD.shape[1]
            mask_SS = torch.full((length, length), float("-inf"), device=x_BSD.device).triu(1)
        x_SBD = add_branch(x_SBD, self_attention(self.attn, self.ln_1(x_SBD), mask_SS), drop[0], dim=1)
        return add_branch(x_SBD, self.mlp(self.ln_2(x_SBD)), drop[1], dim=1).transpose(0, 1)

    def _draw_drop_scales(self, x: Tensor, samples: int | None) -> tuple[Tensor | None, Tensor | None]:
        """Fresh drop path factors for each sample and residual branch; none outside training."""
        if not self.training or self.drop_path == 0.0:
            return None, None
        count = x.shape[0] if samples is None else samples
        return drop_path_scale(count, self.drop_path, x), drop_path_scale(count, self.drop_path, x)


def attend(qkv: Tensor) -> Tensor:
    """Every row of a sequence over all of them: (B, S, 3, H, C) to (B, S, H, C)."""
    query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(query, key, value).transpose(1, 2)


def feed_forward(
    x: Tensor,
    norm: nn.LayerNorm,
    fc: Any,
    projection: Any,
    drop_scale: Tensor | None = None,
    activation: str = "quick_gelu",
) -> Tensor:
    """``kernels.mlp`` on the parameters of a LayerNorm and of two linear layers; with "gelu", its parts."""
    parts = (norm.weight, norm.bias), (fc.weight, fc.bias), (projection.weight, projection.bias)
    if drop_scale is None and kernels.cpu.takes(x, *(parameter for part in parts for parameter in part)):
        return kernels.cpu.feed_forward(x, *parts, norm.eps, activation)
    if activation == "gelu":
        u = kernels.ln_linear(x, norm.weight, norm.bias, fc.weight, fc.bias, norm.eps)
        return kernels.linear_residual(F.gelu(u), projection.weight, projection.bias, x, drop_scale)
    return kernels.mlp(
        x, norm.weight, norm.bias, fc.weight, fc.bias, projection.weight, projection.bias, norm.eps, drop_scale
    )


def run_block(block: nn.Module, recompute: bool, x: Tensor, *args: Any) -> Tensor:
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
    result: Tensor = checkpoint(lambda tokens: block(tokens, *args), x, **options)
    return result


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


class WithoutInit(TorchFunctionMode):
    """While it is active, ``torch.nn.init`` leaves tensors as they are: for parameters that a checkpoint will replace.

    On the meta device initialization computes nothing, but it imports torch's compiler, which takes seconds.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(func, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return func(*args, **(kwargs or {}))

"""The ops of X-CLIP. Each file holds one op: reference, kernels, launcher, autograd, public function."""

from ._dispatch import BackendError, backend, forced_backend
from .causal_attention_packed import causal_attention_packed
from .cosine_logits import cosine_logits
from .diffusion_attention import diffusion_attention
from .layer_norm import layer_norm
from .linear_residual import linear_residual, linear_residual_statistics
from .ln_linear import ln_linear
from .message_kv import message_kv
from .mlp import mlp
from .patch_embed import patch_embed
from .quick_gelu import quick_gelu

__all__ = [
    "BackendError",
    "backend",
    "causal_attention_packed",
    "cosine_logits",
    "diffusion_attention",
    "forced_backend",
    "layer_norm",
    "linear_residual",
    "linear_residual_statistics",
    "ln_linear",
    "message_kv",
    "mlp",
    "patch_embed",
    "quick_gelu",
]

"""The ops of X-CLIP. Each file holds one op: reference, kernels, launcher, autograd, public function."""

# With the repository's root on sys.path, `import kernels` finds this folder. transformers tries that name, another
# package's, to ask for its version: it must find nothing here, above all no second copy of the ops.
if __name__ == "xclip_fast.kernels":
    from . import cpu
    from ._dispatch import BackendError, backend, forced_backend
    from ._fp8 import quantize_weight
    from .causal_attention_packed import causal_attention_packed
    from .cosine_logits import cosine_logits
    from .diffusion_attention import diffusion_attention
    from .layer_norm import layer_norm
    from .linear_residual import linear_residual, linear_residual_statistics
    from .ln_linear import ln_linear
    from .ln_linear_fp8 import ln_linear_fp8
    from .message_kv import message_kv
    from .mlp import mlp
    from .mlp_fp8 import mlp_fp8
    from .patch_embed import patch_embed
    from .quick_gelu import quick_gelu

__all__ = [
    "BackendError",
    "backend",
    "causal_attention_packed",
    "cosine_logits",
    "cpu",
    "diffusion_attention",
    "forced_backend",
    "layer_norm",
    "linear_residual",
    "linear_residual_statistics",
    "ln_linear",
    "ln_linear_fp8",
    "message_kv",
    "mlp",
    "mlp_fp8",
    "patch_embed",
    "quantize_weight",
    "quick_gelu",
]

"""The ops of X-CLIP: one block, and what stands before and behind the blocks."""

# With the repository's root on sys.path, `import kernels` finds this folder. transformers tries that name, another
# package's, to ask for its version: it must find nothing here, above all no second copy of the ops.
if __name__ == "xclip_fast.kernels":
    from . import cpu
    from .cct_block import Block, Statistics, cct_block, composed
    from .cosine_logits import cosine_logits
    from .dispatch import BackendError, backend, forced_backend
    from .layer_norm import layer_norm
    from .linear import linear
    from .patch_embed import patch_embed
    from .quick_gelu import quick_gelu

    __all__ = [
        "BackendError",
        "Block",
        "Statistics",
        "backend",
        "cct_block",
        "composed",
        "cosine_logits",
        "cpu",
        "forced_backend",
        "layer_norm",
        "linear",
        "patch_embed",
        "quick_gelu",
    ]

"""The ops of X-CLIP: one block, and what stands before and behind the blocks."""

# With the repository's root on sys.path, `import kernels` finds this folder. transformers tries that name, another
# package's, to ask for its version: it must find nothing here, above all no second copy of the ops.
if __name__ == "xclip_fast.kernels":
    from . import _cuda as cuda_library
    from . import _overlap as overlap
    from . import cpu
    from ._choices import architecture
    from ._dispatch import OPS, BackendError, backend, backends, forced_backend
    from ._fp8 import quantize_weight
    from ._linear import NATIVE_ON_CPU, linear
    from ._parts import PARTS
    from .cct_block import Block, Statistics, cct_block, composed, diffuse, own_linear
    from .cosine_logits import cosine_logits
    from .layer_norm import layer_norm
    from .ln_linear_fp8 import ln_linear_fp8
    from .mlp_fp8 import mlp_fp8
    from .patch_embed import patch_embed
    from .quick_gelu import quick_gelu

    __all__ = [
        "NATIVE_ON_CPU",
        "OPS",
        "PARTS",
        "BackendError",
        "Block",
        "Statistics",
        "architecture",
        "backend",
        "backends",
        "cct_block",
        "composed",
        "cosine_logits",
        "cpu",
        "cuda_library",
        "diffuse",
        "forced_backend",
        "layer_norm",
        "linear",
        "ln_linear_fp8",
        "mlp_fp8",
        "overlap",
        "own_linear",
        "patch_embed",
        "quantize_weight",
        "quick_gelu",
    ]

"""Every op at the shapes of B/16's blocks, by backend and dtype, forward and with gradients.

    pytest benchmarks/ops -n 0 --benchmark-only --no-cov --benchmark-json=ops.json

One video of 8 frames and 100 labels on a CPU, 32 videos and 400 labels on a GPU. A backend that refuses is a skip with
its reason, and one that disagrees with the reference is a failure: no timing of a wrong answer.
"""

import math

import pytest
import torch
from xclip_fast.kernels import quantize_weight
from xclip_fast.kernels._dispatch import FLOAT8, OPS, BackendError, backend
from xclip_fast.kernels.cct_block.example import example

from xclip_fast.config import IMAGENET_MEAN, IMAGENET_STD, VARIANTS

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32, torch.bfloat16]
CONFIG = VARIANTS["B/16-8f"]
B, T, K = (32, 8, 400) if GPU else (1, 8, 100)
D, H, N, E = CONFIG.vision.width, CONFIG.vision.heads, CONFIG.vision.patches, CONFIG.embed_dim
F, L, C, P = B * T, N + 1, D // H, CONFIG.vision.patch_size
EPS = CONFIG.layer_norm_eps
NOT_DIFFERENTIABLE = {"patch_embed"}  # as far as uint8 frames go
NOT_DIFFERENTIABLE |= {name for name, op in OPS.items() if not op.differentiable}


def rand(*shape):
    return torch.randn(shape, device=DEVICE)


def weight(rows, columns):
    return rand(rows, columns) / math.sqrt(columns)


def weight8(rows, columns):
    return quantize_weight(weight(rows, columns))


def mlp_fp8():
    scale = 8.0 / 448  # for quick_gelu up to 8
    narrow8, narrow_scale = weight8(D, 4 * D)
    wide8 = (*weight8(4 * D, D), rand(4 * D))
    return rand(F, L, D), rand(D), rand(D), *wide8, narrow8, narrow_scale * scale, rand(D), scale, EPS


def patch_embed():
    frames = torch.randint(256, (F, CONFIG.vision.image_size, CONFIG.vision.image_size, 3), device=DEVICE)
    kernel = weight(D, 3 * P * P).view(D, 3, P, P)
    embeddings = rand(D), rand(L, D), rand(D), rand(D)
    return frames.to(torch.uint8), kernel, *embeddings, list(IMAGENET_MEAN), list(IMAGENET_STD), EPS


# the arguments of each op, in float32
CASES = {
    "cct_block": lambda: tuple(example(F, L + 1, D, T, device=DEVICE)),
    "cosine_logits": lambda: (rand(B, E), rand(B, K, E), torch.tensor(4.6, device=DEVICE)),
    "layer_norm": lambda: (rand(F, N, D), rand(D), rand(D), EPS),
    "ln_linear_fp8": lambda: (rand(F, L, D), rand(D), rand(D), *weight8(3 * D, D), rand(3 * D), EPS),
    "mlp_fp8": mlp_fp8,
    "patch_embed": patch_embed,
    "quick_gelu": lambda: (rand(F, L, 4 * D),),
}
ROWS = [(op, name) for op in OPS for name in OPS[op].names]


def cast(args, dtype):
    """The floating arguments in `dtype`, except float8."""

    def one(arg):
        floating = isinstance(arg, torch.Tensor) and arg.is_floating_point() and arg.dtype != FLOAT8
        return arg.to(dtype) if floating else arg

    return [one(arg) for arg in args]


def first(op, result):
    """The first result; of a block without the spare row, which nobody reads."""
    result = result[0] if isinstance(result, tuple) else result
    return result[:, :-1] if op == "cct_block" else result


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("direction", ["forward", "forward and backward"])
@pytest.mark.parametrize(("op", "name"), ROWS, ids=[f"{op}-{name}" for op, name in ROWS])
def test_op(benchmark, op, name, direction, dtype):
    differentiated = direction != "forward"
    if differentiated and op in NOT_DIFFERENTIABLE:
        pytest.skip("its input is uint8, or it is for inference only")
    torch.manual_seed(0)
    args = cast(CASES[op](), dtype)
    with backend(name):  # some are taken only where they are asked for
        try:
            OPS[op].choose(tuple(args), differentiated)
        except BackendError as refused:
            pytest.skip(str(refused))
    wide = first(op, OPS[op].reference(*cast(args, torch.float32)))
    with backend(name):
        error = (first(op, OPS[op](*args)).float() - wide).norm() / wide.norm()
    assert error < 100 * torch.finfo(dtype).eps

    leaves = [arg for arg in args if isinstance(arg, torch.Tensor) and arg.is_floating_point()]
    if differentiated:
        for leaf in leaves:
            leaf.requires_grad_()
    grad = torch.ones_like(first(op, OPS[op](*args)))

    def call():
        with backend(name), torch.set_grad_enabled(differentiated):
            result = first(op, OPS[op](*args))
            if differentiated:
                torch.autograd.grad(result, leaves, grad, allow_unused=True)
        if GPU:
            torch.cuda.synchronize()

    benchmark.group = f"{op} {direction} {str(dtype).removeprefix('torch.')}"  # backends side by side
    benchmark.extra_info.update(device=torch.cuda.get_device_name() if GPU else "cpu", torch=torch.__version__)
    benchmark.pedantic(call, warmup_rounds=10 if GPU else 1, rounds=30 if GPU else 3)

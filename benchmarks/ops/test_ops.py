"""Every op at the shapes of B/16's blocks, by backend and dtype, forward and with gradients.

    pytest benchmarks/ops -n 0 --benchmark-only --no-cov --benchmark-json=ops.json

One video of 8 frames and 100 labels on a CPU, 32 videos and 400 labels on a GPU. A backend that refuses is a skip with
its reason, and one that disagrees with the reference is a failure: no timing of a wrong answer.
"""

import pytest
import torch
import xclip_fast.kernels  # noqa: F401  which defines the ops
from xclip_fast.kernels.common.example import Maker, Sizes
from xclip_fast.kernels.dispatch import OPS, BackendError, backend
from xclip_fast.kernels.tune.backends import cast

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32] if GPU else [torch.float32, torch.bfloat16]
B, K = (32, 400) if GPU else (1, 100)
SIZES = Sizes(videos=B, labels=K)
NOT_DIFFERENTIABLE = {"patch_embed"}  # with uint8 frames
ROWS = [(op, name) for op in OPS for name in OPS[op].names]


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
        pytest.skip("its input is uint8")
    torch.manual_seed(0)
    args = cast(OPS[op].example(SIZES, Maker(DEVICE)), dtype)
    with backend(name):  # some are used only if they are forced
        try:
            OPS[op].choose(args, differentiated)
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
